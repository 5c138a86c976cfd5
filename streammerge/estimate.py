"""What a merge will take: predicted peaks by term, and the token batch that the budgets allow.

tests/test_memory.py and tests/test_smollm2.py hold measured peaks to these sums.
"""

from __future__ import annotations

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
class Estimate:
    """Predicted peaks beyond the imports, in bytes, with the terms of each sum, and the settings they follow from."""

    tokens_per_batch: int
    workers: int  # batches that pass side by side
    offload: bool  # activations wait on the host, not on the GPU
    ahead: int  # bytes of weights read ahead
    keep: int  # bytes of the LRM's layers that may stay on a GPU between two passes
    device: dict[str, int]  # empty on the CPU, where everything is on the host
    host: dict[str, int]
    disk: int

    def as_dict(self) -> dict:
        """For the report."""
        totals = {"device_total": sum(self.device.values()), "host_total": sum(self.host.values())}
        names = ("tokens_per_batch", "workers", "offload", "ahead", "device", "host", "disk")
        return {name: getattr(self, name) for name in names} | totals


def predict(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The largest token batch, and on a CPU the most workers, that the budgets allow, and the memory they take.

    Raises ResourceError that names the minimum when even the smallest batch does not fit.
    """
    budget = plan.recipe.budget
    longest = max((len(s.ids) for s in (*data.reasoning, *data.heldout, *data.instruction)), default=1)
    tokens = max(longest, budget.tokens_per_batch or (8192 if device.type == "cuda" else 2048))
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    offload = False
    wanted = {"device": budget.device_memory, "host": budget.host_memory}
    limits = {side: _limit(side, text, device) for side, text in wanted.items()}
    while True:
        estimate = _estimate(plan, data, device, dtype, tokens, workers, offload)
        needed = {"device": sum(estimate.device.values()), "host": sum(estimate.host.values())}
        over = [side for side, limit in limits.items() if needed[side] > limit]
        if not over:
            spare = limits["device"] - needed["device"]
            return replace(estimate, keep=int(spare) if device.type == "cuda" and spare < float("inf") else 0)
        if device.type == "cuda" and not offload:
            offload = True
        elif workers > 1:
            workers //= 2
        elif tokens > max(longest, 256) and not budget.tokens_per_batch:
            tokens = max(longest, 256, tokens // 2)
        else:
            raise _too_little(over, needed, limits, wanted, may_lower=tokens > max(longest, 256))


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
    features: int  # rows or covariances of one layer, without the values' own
    values: int  # those of v_proj, all heads
    one_value: int  # of one head
    held: int  # activations of all streams
    batch: int  # one token batch on its way through a layer
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
    sets = (data.reasoning, data.heldout, data.instruction)
    held = sum(len(s.ids) for s in (*data.reasoning, *data.instruction)) + 2 * sum(len(s.ids) for s in data.heldout)
    longest = max((len(s.ids) for samples in sets for s in samples), default=0)
    batch = min(tokens, int(1.25 * max(sum(len(s.ids) for s in samples) for samples in sets)))  # padding: a quarter
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
        features=features,
        values=layout.kv_heads * one_value,
        one_value=one_value,
        held=int(1.25 * held * width * item),
        batch=passing,
        composing=composing,
        embedding=min(held, config.get("vocab_size") or held) * width * (item + 2),
    )


def _estimate(
    plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, tokens: int, workers: int, offload: bool
) -> Estimate:
    """The sums for one choice of batch, workers and place of the activations."""
    size, recipe = _sizes(plan, data, device, dtype, tokens), plan.recipe
    twice = recipe.needs_instruction and recipe.coefficients.scope == "layer"  # a probe first, then the merge
    weights = {
        "the LRM's layer, then the merged one": size.written,
        "compute copy of a layer": size.copy,
        "read ahead": size.native,
        "waiting to be written": size.written,
        "ITM's and base's layer, and the probe" if twice else "one tensor of ITM and base": (
            2 * size.native + size.written if twice else 2 * size.largest
        ),
    }
    streams = {"offloaded activations": size.held}
    disk = sum(t.nbytes for t in plan.lrm.tensors.values())
    if device.type == "cpu":
        passing = {
            "features and bases": 3 * (size.features + size.values),
            "token batches, or composing": max(workers * size.batch, size.composing),
        }
        host = weights | streams | passing | {"tokenizer and model code": _INTERPRETER}
        return Estimate(tokens, workers, False, size.native, 0, {}, host, disk)
    passing = {
        "features and bases": 3 * size.features + 4 * size.one_value,
        "a token batch, or composing": max(size.batch, size.composing),
    }
    if offload:
        passing["activations on their way"] = 3 * tokens * plan.lrm.config["hidden_size"] * dtype.itemsize
    on_device = weights | passing | ({} if offload else {"activations": size.held})
    on_device["embedding rows, before the layers"] = max(0, size.embedding - sum(weights.values()))
    host = {
        "pinned slots": SLOT * SLOTS,
        "features of v_proj, and bases on their way to disk": 2 * size.values + size.features,
        "a tensor on its way to disk": size.largest,
        "tokenizer and model code": _INTERPRETER,
    } | (streams if offload else {})
    return Estimate(tokens, 1, offload, size.native, 0, on_device, host, disk)
