"""What a merge will take: predicted peaks by term, and the token batch that the budgets allow.

tests/test_memory.py and tests/test_smollm2.py hold measured peaks to these sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .calibration import CalibrationSet
from .errors import ResourceError, listed
from .io.checkpoint import TORCH_DTYPES
from .io.feed import SLOT, SLOTS
from .memory import format_size, parse_size, total
from .plan import Plan

_INTERPRETER = 64 << 20  # what loads after the meter's start: a tokenizer (40 MB for 50k tokens), a family's modules
_CHUNK_CPU, _CHUNK_GPU = 1 << 19, 1 << 22  # fp32 elements of a weight in hand while it is composed (kernels)
_CHUNKS = 6  # the three weights, the delta, the result, what is measured


@dataclass(frozen=True)
class Choice:
    """What a smaller budget changes."""

    tokens: int
    workers: int
    offload: bool
    ahead_part: int  # a layer over this is read ahead
    spill: bool = False


@dataclass(frozen=True)
class Estimate:
    """Predicted peaks beyond the imports, in bytes, with the terms of each sum, and the settings they follow from."""

    choice: Choice
    ahead: int  # bytes of weights read ahead
    keep: int  # bytes of the LRM's layers that may stay on a GPU between two passes
    device: dict[str, int]  # empty on the CPU, where everything is on the host
    host: dict[str, int]
    disk: int
    scratch: int  # bytes of activations that are spilled

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that pass through a layer together."""
        return self.choice.tokens

    @property
    def workers(self) -> int:
        """Batches that pass side by side."""
        return self.choice.workers

    @property
    def spill(self) -> bool:
        """Activations wait on disk."""
        return self.choice.spill

    @property
    def offload(self) -> bool:
        """Activations wait on the host, not on the GPU."""
        return self.choice.offload

    def as_dict(self) -> dict:
        """For the report."""
        totals = {"device_total": sum(self.device.values()), "host_total": sum(self.host.values())}
        names = ("tokens_per_batch", "workers", "offload", "spill", "ahead", "device", "host", "disk", "scratch")
        return {name: getattr(self, name) for name in names} | totals


def predict(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The fastest choice that the budgets allow, and the memory it takes.

    Raises ResourceError that names the minimum when even the smallest does not fit.
    """
    budget = plan.recipe.budget
    longest = max((len(s.ids) for s in (*data.reasoning, *data.heldout, *data.instruction)), default=1)
    wanted = {"device": budget.device_memory, "host": budget.host_memory}
    limits = {side: _limit(side, text, device) for side, text in wanted.items()}
    choices = list(_choices(longest, budget.tokens_per_batch, device))
    for choice in choices + [replace(c, spill=True) for c in choices]:
        estimate = _estimate(plan, data, device, dtype, choice)
        needed = {"device": sum(estimate.device.values()), "host": sum(estimate.host.values())}
        over = [side for side, limit in limits.items() if needed[side] > limit]
        if not over:
            spare = limits["device"] - needed["device"]
            return replace(estimate, keep=int(spare) if device.type == "cuda" and spare < float("inf") else 0)
    raise _too_little(over, needed, limits, wanted, may_lower=choice.tokens > max(longest, 256))


def _choices(longest: int, asked: int | None, device: torch.device) -> Iterator[Choice]:
    """From the fastest to the smallest. A sample longer than a batch makes a batch of its own, so that below the
    longest sample smaller batches save nothing; what was asked for is not lowered."""
    cpu = device.type == "cpu"
    tokens = asked or (2048 if cpu else 8192)
    least = min(tokens, max(longest, asked or 256))
    workers, offload, part = torch.get_num_threads() if cpu else 1, False, 1
    yield Choice(tokens, workers, offload, part)
    while workers > 1:
        workers //= 2
        yield Choice(tokens, workers, offload, part)
    if not cpu:
        offload = True
        yield Choice(tokens, workers, offload, part)
    while tokens > least or part < 8:
        if tokens > least:
            tokens = max(least, tokens // 2)
            yield Choice(tokens, workers, offload, part)
        if part < 8:
            part *= 2
            yield Choice(tokens, workers, offload, part)


def _too_little(over: list[str], needed: dict, limits: dict, wanted: dict, may_lower: bool) -> ResourceError:
    needs = [
        f"{s} memory: {format_size(needed[s])} needed, {format_size(limits[s])} "
        + ("is nine tenths of what there is" if wanted[s] == "auto" else "given")
        for s in over
    ]
    fewer = "lower budget.tokens_per_batch, " if may_lower else ""
    return ResourceError(listed("The merge does not fit the memory budget:", needs, f"Raise the budget, {fewer}"
                                "or drop the longest calibration samples (calibration.max_tokens with "
                                "on_long: drop)."))


def _limit(side: str, text: str, device: torch.device) -> float:
    """A budget in bytes. `auto` is a share of what the machine has in all: what is free now would change the batches,
    and with them the last bits of the result, from run to run."""
    if text != "auto":
        return parse_size(text)
    if side == "device" and device.type == "cpu":
        return float("inf")
    return 0.9 * total("host" if side == "host" else str(device)) or float("inf")


@dataclass(frozen=True)
class _Sizes:
    """What the sums are made of, in bytes unless said otherwise."""

    native: int  # the largest layer as stored
    written: int  # the same as written
    copy: int  # the same in the compute dtype; 0 where that is how it is stored
    largest: int  # the largest tensor of a layer as stored
    formed: tuple[int, int]  # the largest task vector, and a layer's, where they are formed before they are composed
    features: int  # rows or covariances of one layer, without the values' own
    values: int  # those of v_proj, all heads
    one_value: int  # of one head while its basis is built
    held: int  # activations of the streams that move in one pass
    batch: int  # one token batch on its way through a layer
    hidden: int  # its hidden states alone
    composing: int
    embedding: int  # the rows of the embedding that occur


def _sizes(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, tokens: int) -> _Sizes:
    config, layout = plan.lrm.config, plan.layout
    width, wide, attn = config["hidden_size"], config["intermediate_size"], layout.heads * layout.head_dim
    item = dtype.itemsize
    infos = [[plan.lrm.tensors[n] for n in plan.layer_tensors(i)] for i in range(plan.layers)]
    native = max(sum(t.nbytes for t in layer) for layer in infos)
    elements = max(sum(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for t in layer) for layer in infos)
    largest = max(t.nbytes for layer in infos for t in layer)
    copied = any(TORCH_DTYPES[t.dtype] != dtype for layer in infos for t in layer)
    rows = sum(len(s.omega) for s in data.reasoning)
    features = sum(4 * w * min(max(rows, 1), w) for w in (width, attn, width, wide)) if rows else 0
    attended = rows * (1 + layout.group) if rows and plan.recipe.thinking.attended_values else 0
    one_value = 4 * width * min(attended, width)
    waiting = 4 * width * (attended if attended <= 4 * width else width)  # capture.waits
    sets = (data.reasoning, data.heldout, data.instruction)
    thinking, checking, asking = (sum(len(s.ids) for s in samples) for samples in sets)
    held = thinking + 2 * checking
    held = max(held, asking) if plan.recipe.surveys else held + asking
    longest = max((len(s.ids) for samples in sets for s in samples), default=0)
    whole = int(1.25 * max(sum(len(s.ids) for s in samples) for samples in sets))  # padding: a quarter
    batch = max(longest, min(tokens, whole))
    passing = batch * (8 * width + 3 * attn + 3 * wide) * item
    if config.get("sliding_window"):
        passing += 2 * longest**2  # the mask, which plain causal attention does without
    if attended:
        passing += 4 * width * longest  # one sample's inputs of v_proj in fp32
    if device.type == "cpu":
        composing = largest + 4 * _CHUNKS * max(_CHUNK_CPU, 128 * max(width, attn, wide))
    else:
        composing = largest + 4 * _CHUNKS * _CHUNK_GPU + features  # the last is Δ U of all rows
    return _Sizes(
        native=native,
        written=max(native, elements * 4) if plan.recipe.dtype == "float32" else native,
        copy=elements * item if copied else 0,
        largest=largest,
        formed=_formed(plan),
        features=features,
        values=layout.kv_heads * waiting,
        one_value=waiting + 2 * one_value,
        held=int(1.25 * held * width * item),
        batch=passing,
        hidden=batch * width * item,
        composing=composing,
        embedding=min(held, config.get("vocab_size") or held) * width * (item + 2),
    )


def _formed(plan: Plan) -> tuple[int, int]:
    """Bytes of the largest task vector and of the largest layer's, in fp32, where task_vector.py forms them; else 0."""
    if not plan.adapter and plan.recipe.sparsify.method == "none":
        return 0, 0
    layers: dict[int, list[int]] = {}
    for name, job in plan.merged.items():
        info = plan.lrm.tensors[name]
        layers.setdefault(job.layer, []).append(4 * info.nbytes // TORCH_DTYPES[info.dtype].itemsize)
    return max(map(max, layers.values())), max(map(sum, layers.values()))


def _estimate(
    plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, choice: Choice
) -> Estimate:
    """The sums for one choice, each of the pass that takes more."""
    size, recipe = _sizes(plan, data, device, dtype, choice.tokens), plan.recipe
    twice = recipe.needs_instruction and recipe.coefficients.scope == "layer"  # a probe first, then the merge
    ahead = size.native // choice.ahead_part
    gpu = device.type != "cpu"
    layer = {"the LRM's layer, then the merged one": size.written, "its compute copy": size.copy}
    layer |= {"read ahead": max(ahead, size.largest)}
    batches = {"token batches": choice.workers * size.batch}
    if gpu and choice.offload:
        batches["activations on their way"] = 3 * size.hidden
    layer |= {"waiting to be written": max(ahead, size.largest)}
    features = {"features": 2 * size.features, "one basis of v_proj": size.one_value}
    merging = {"ITM and base": 2 * size.largest}
    if twice:
        merging["ITM and base"] = 2 * size.native
        merging["the probe"] = size.written
    if any(size.formed):
        merging["ITM and base"] = 2 * size.largest
        merging["task vectors"] = size.formed[twice]
    rest = {"composing beyond a batch": max(0, size.composing - choice.workers * size.batch)}
    rest["bases of a module"] = size.features
    first, second = layer | batches | features, layer | merging | batches | rest
    passes = [first | second] if twice else [first, second]
    waiting = {"offloaded activations": size.held, "features of v_proj, and bases": 2 * size.values}
    scratch = size.held + size.values if choice.spill else 0
    if choice.spill:
        waiting = {"activations on their way to disk": 2 * choice.workers * size.hidden, "bases": size.values}
    if not gpu:
        host = max(passes, key=lambda terms: sum(terms.values())) | waiting | {"tokenizer and model code": _INTERPRETER}
        return Estimate(choice, ahead, 0, {}, host, _disk(plan), scratch)
    for terms in passes:
        terms |= {} if choice.offload else {"activations": size.held}
        before = size.embedding + (0 if choice.offload else size.held)
        terms["embedding rows, before the layers"] = max(0, before - sum(terms.values()))
    if not choice.offload:
        waiting.pop("offloaded activations", None)
    host = {
        "pinned slots": SLOT * SLOTS,
        "bases of a layer": 2 * size.features,
        "a tensor on its way to disk": size.largest,
        "tokenizer and model code": _INTERPRETER,
    } | waiting
    return Estimate(choice, ahead, 0, max(passes, key=lambda terms: sum(terms.values())), host, _disk(plan), scratch)


def _disk(plan: Plan) -> int:
    return sum(t.nbytes for t in plan.lrm.tensors.values())
