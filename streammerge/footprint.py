"""How many bytes a merge holds at once: the sums behind a plan, one for every moment that can be the peak.

On a CPU the sums are meant to be what is measured, to a tenth (benchmarks/bench_budget.py): what a batch holds inside a
layer was measured (3 FFN widths and 2 hidden states a token, or what attention holds where that is more), batches are
grouped as they will run. On a GPU nothing was measured yet: there a batch is counted as an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .batches import groups
from .calibration import CalibrationSet
from .io.checkpoint import TORCH_DTYPES
from .io.drain import WAITING
from .io.feed import SLOT, SLOTS
from .planned import Plan

LIBRARIES = 38 << 20  # what loads after the meter's start: modules, thread pools, LAPACK (36 to 40 MB, tiny models)
_HOLES = 6 << 20  # bytes of its heap that a worker's small blocks leave unused (7 to 20 MB in all, one and two workers)
_TOKENIZER = 18  # bytes of memory a byte of tokenizer.json, while samples are laid out (0.5 and 3.5 MB: 18 times)
_TOKEN = 44  # bytes a token of a sample: its id as a Python number, and in its batch
_CHUNK_CPU, _CHUNK_GPU = 1 << 19, 1 << 22  # fp32 elements of a weight in hand while it is composed (kernels)
_CHUNKS = 6  # the three weights, the delta, the result, what is measured
_DENSE = 1024  # bases.py: up to so many rows or features a factorisation is exact, and holds copies of them

Terms = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """What the sums are made of, in bytes."""

    native: int  # the largest layer as stored
    written: int  # the same as written
    copy: int  # the same in the compute dtype; 0 where that is how it is stored
    largest: int  # the largest tensor of a layer as stored
    formed: tuple[int, int]  # the largest task vector, and a layer's, where they are formed before they are composed
    features: int  # rows or covariances of one layer, without the values' own
    values: int  # those of v_proj, all heads
    basis: int  # what building one basis holds besides its features
    asking: int  # activations of the instruction set
    thinking: int  # of the other streams
    batches: dict[str, tuple[int, ...]]  # by stream: a batch on its way through a layer, largest first
    hidden: int  # hidden states of the largest batch
    composing: int
    embedding: int  # the rows of the embedding that occur
    samples: int
    tokenizer: int

    def held(self, *, surveyed: bool) -> int:
        """Activations of the streams that move in one pass, in the pass that has more of them."""
        return max(self.asking, self.thinking) if surveyed else self.asking + self.thinking

    def passing(self, workers: int, *streams: str) -> int:
        """The largest batches of these streams side by side."""
        return max((sum(self.batches[name][:workers]) for name in streams), default=0)


def sizes(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, tokens: int) -> Sizes:
    """Of a merge with batches of `tokens`."""
    config, layout, item = plan.lrm.config, plan.layout, dtype.itemsize
    width, wide, attn = config["hidden_size"], config["intermediate_size"], layout.heads * layout.head_dim
    infos = [[plan.lrm.tensors[n] for n in plan.layer_tensors(i)] for i in range(plan.layers)]
    native = max(sum(t.nbytes for t in layer) for layer in infos)
    elements = max(sum(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for t in layer) for layer in infos)
    largest = max(t.nbytes for layer in infos for t in layer)
    copied = any(TORCH_DTYPES[t.dtype] != dtype for layer in infos for t in layer)
    rows = sum(len(s.omega) for s in data.reasoning)
    attended = rows * (1 + layout.group) if rows and plan.recipe.thinking.attended_values else 0
    waits = attended <= 4 * width  # capture.waits
    values = 4 * width * ((rows + layout.kv_heads * layout.group * rows) if waits else (1 + layout.kv_heads) * width)
    sets = {"reasoning": data.reasoning, "heldout": data.heldout, "instruction": data.instruction}
    padded = {name: _padded(samples, tokens) for name, samples in sets.items()}
    longest = max((len(s.ids) for samples in sets.values() for s in samples), default=0)
    state = width * item
    a_token = item * _floats(plan, device)
    extra = (2 * longest**2 if config.get("sliding_window") else 0)  # the mask, which causal attention does without
    if device.type == "cpu":
        composing = largest + 4 * _CHUNKS * max(_CHUNK_CPU, 128 * max(width, attn, wide))
    else:
        extra += 4 * width * longest if attended else 0  # one sample's inputs of v_proj in fp32
        composing = largest + 4 * _CHUNKS * _CHUNK_GPU
    every = [n for counts in padded.values() for n in counts]
    thinking = state * (sum(padded["reasoning"]) + 2 * sum(padded["heldout"]))
    asking = state * sum(padded["instruction"])
    return Sizes(
        native=native,
        written=max(native, elements * 4) if plan.recipe.dtype == "float32" else native,
        copy=elements * item if copied else 0,
        largest=largest,
        formed=_formed(plan),
        features=sum(4 * w * min(rows, w) for w in (width, attn, width, wide)),
        values=values if attended else 0,
        basis=max(_basis(rows, wide), _basis(attended, width)),
        asking=asking,
        thinking=thinking,
        batches={name: tuple(a_token * n + extra for n in counts) for name, counts in padded.items()},
        hidden=state * max(every, default=0),
        composing=composing,
        embedding=min(sum(every), config.get("vocab_size") or sum(every)) * width * (item + 2),
        samples=_TOKEN * sum(len(s.ids) for samples in sets.values() for s in samples),
        tokenizer=_TOKENIZER * _size(plan.lrm.path / "tokenizer.json"),
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


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _floats(plan: Plan, device: torch.device) -> int:
    """Numbers that one token holds inside a layer."""
    config, layout = plan.lrm.config, plan.layout
    width, wide = config["hidden_size"], config["intermediate_size"]
    attn, kv = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    if device.type != "cpu":
        return 8 * width + 3 * attn + 3 * wide
    return 2 * width + max(3 * wide, 4 * attn + 2 * kv)


def _padded(samples: Sequence, tokens: int) -> list[int]:
    """Positions of each batch, padding included, the largest first."""
    return sorted((len(g) * len(samples[g[0]].ids) for g in groups(samples, tokens)), reverse=True)


def _basis(rows: int, width: int) -> int:
    """Rows in one piece and the factors made of them; or a covariance and its own."""
    small = min(rows, width)
    return 4 * width * small * (3 if small <= _DENSE else 2)


def _merging(size: Sizes, *, twice: bool) -> Terms:
    """What is held of the ITM and the base."""
    if any(size.formed):
        return {"ITM and base": 2 * size.largest, "task vectors": size.formed[twice]}
    return {"ITM and base": 2 * (size.native if twice else size.largest)}


def _twice(plan: Plan) -> bool:
    """Each layer is merged as a probe first: scope `layer`."""
    return plan.recipe.needs_instruction and plan.recipe.coefficients.scope == "layer"


def cpu_moments(size: Sizes, workers: int, ahead: int, plan: Plan, *, spill: bool) -> list[Terms]:
    """The sums of a CPU, where everything is on the host: the survey; the merging pass at its stages."""
    surveys, twice = plan.recipe.surveys, _twice(plan)
    always = {"libraries": LIBRARIES, "samples": size.samples, "holes in the heap": workers * _HOLES}
    layer = {"the LRM's layer": size.native, "read ahead": max(ahead, size.largest)}
    lent, merged = {"its compute copy": size.copy}, layer | {"the LRM's layer": size.written}

    def batches(*streams: str) -> Terms:
        found = {"token batches": size.passing(workers, *streams)}
        return found | ({"spilled activations at hand": workers * size.hidden} if spill else {})

    def held(nbytes: int) -> Terms:
        return {} if spill else {"activations": nbytes}

    pair, bases = _merging(size, twice=twice), {"bases": size.features + size.values}
    found = [always | {"tokenizer": size.tokenizer}]
    if surveys:
        found.append(always | layer | lent | batches("instruction") | held(size.asking))
    later = always | held(size.thinking if surveys else size.thinking + size.asking)
    later |= {"waiting to be written": max(ahead // WAITING, size.largest)}
    later |= {} if spill else {"features of v_proj": size.values}
    found.append(later | layer | lent | batches("reasoning") | {"features": size.features})
    found.append(later | layer | lent | {"features": size.features, "building a basis": size.basis})
    if twice:
        probe = {"the probe": size.written, "its compute copy": 2 * size.copy}
        found.append(later | layer | pair | probe | batches("instruction") | bases)
    found.append(later | merged | pair | bases | {"composing": size.composing})
    found.append(later | merged | lent | (pair if twice else {}) | bases | batches("heldout"))
    return [{name: nbytes for name, nbytes in terms.items() if nbytes} for terms in found]


def gpu_moments(
    size: Sizes, offload: bool, spill: bool, ahead: int, held: int, plan: Plan
) -> tuple[list[Terms], Terms]:
    """(The sums of a GPU, the host's sum beside it.)"""
    twice = _twice(plan)
    batch = size.passing(1, *size.batches)
    layer = {"the LRM's layer, then the merged one": size.written, "its compute copy": size.copy}
    layer |= {"read ahead": max(ahead, size.largest), "token batches": batch}
    layer |= {"activations on their way": 3 * size.hidden} if offload else {"activations": held}
    layer |= {"waiting to be written": max(ahead // WAITING, size.largest)}
    features = {"features": 2 * size.features, "one basis of v_proj": size.basis}
    merging = _merging(size, twice=twice) | {"bases of a module": size.features}
    merging |= {"the probe": size.written} if twice else {}
    merging |= {"composing beyond a batch": max(0, size.composing + size.features - batch)}  # the features: of Δ U
    moments = [layer | features | merging] if twice else [layer | features, layer | merging]
    before = size.embedding + (0 if offload else held)
    moments.append({"embedding rows, before the layers": before})
    host = {"pinned slots": SLOT * SLOTS, "bases of a layer": 2 * size.features, "libraries": LIBRARIES,
            "a tensor on its way to disk": size.largest, "samples": size.samples}  # fmt: skip
    if spill:
        host |= {"activations on their way to disk": 2 * size.hidden, "bases of v_proj": size.values}
    else:
        host |= {"activations": held} if offload else {}
        host |= {"features of v_proj, and bases": 2 * size.values}
    return moments, max([host, {"libraries": LIBRARIES, "tokenizer": size.tokenizer}], key=lambda t: sum(t.values()))
