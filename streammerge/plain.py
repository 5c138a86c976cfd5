"""Merges that need no data: W* = W_R + λ (W_I − W_B) chunk by chunk, at the speed of the disk.

No stream passes through a layer, so layers mean nothing here: each thread takes the next chunk, reads it from the three
models into buffers of its own, merges it block by block in the core's cache, and puts it in place. The arithmetic is
the sweep's, bit for bit (tests/test_plain_merge.py), in numpy: torch would take longer to import than a small model to
merge.

Memory: four chunks and a few blocks a thread, whatever the size of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from .codec import WORDS, all_finite, decode, encode
from .errors import InputError, ResourceError
from .io.disk import byte_buffer
from .io.header import ITEM_BYTES
from .io.writer import CheckpointWriter
from .journal import Journal
from .memory import format_size
from .outcome import Composed
from .plan import Plan
from .progress import Progress
from .recipe import Recipe
from .threads import in_parallel
from .verify import non_finite_everywhere

CHUNK = 1 << 19  # elements that are read and written in one call: 1 MB of bf16
BLOCK = 1 << 17  # elements that are merged at a time: three arrays of 512 KiB stay in the caches
_COPY = 1 << 20  # bytes that are copied at a time: through a warm buffer that is faster than copy_file_range (ext4)
_ROW = 8192  # elements of a dot product: long enough to be fast, too short for BLAS to start threads of its own


def is_plain(recipe: Recipe) -> bool:
    """No sample passes through a layer: neither for bases, nor for coefficients, nor to measure L_think; α is 1, and
    Δ the difference of two stored weights."""
    samples = recipe.calibration.reasoning or recipe.needs_reasoning or recipe.needs_instruction
    chunkwise = recipe.sparsify.method == "none" and not recipe.adapts  # Δ of an element is its own
    return not samples and recipe.coefficients.value == 1 and chunkwise


class _Chunk(NamedTuple):
    """`count` elements of a merged tensor from element `start` on; for a copied tensor both are bytes."""

    name: str
    start: int
    count: int


class _Told(NamedTuple):
    """What became of one chunk: the squares of ‖Δ‖ and ‖W_R‖, and the elements that changed."""

    delta: float
    weight: float
    changed: int


class _NotFinite(Exception):
    """A merged value is infinite or NaN: an input is, or the output's dtype is too narrow."""


@dataclass(frozen=True)
class Threads:
    """How many threads merge, and the bytes that they hold."""

    count: int
    nbytes: int


def fit_threads(plan: Plan, threads: int, limit: float) -> Threads:
    """At most `threads`, fewer where `limit` bytes ask for it. ResourceError where not even one fits."""
    one = 4 * _chunk_bytes(plan) + BLOCK * 5 * 8  # _blocks, and what numpy returns while it compares
    if one > limit:
        raise ResourceError(f"The merge does not fit the memory budget: one thread's buffers take {format_size(one)}, "
                            f"{format_size(limit)} given. Raise the budget")
    count = int(max(1, min(threads, limit // one)))
    return Threads(count, one * count)


def _chunk_bytes(plan: Plan) -> int:
    """Bytes of a chunk in the widest dtype that is read or written."""
    codes = {c.tensors[name].dtype for c in (plan.lrm, plan.itm, plan.base) for name in plan.merged}
    codes |= {t.dtype for t in plan.tensors if t.name in plan.merged}
    return max(_COPY, CHUNK * max((ITEM_BYTES[code] for code in codes), default=0))


def merge_plain(
    plan: Plan, writer: CheckpointWriter, progress: Progress, threads: int, journal: Journal | None = None
) -> dict[str, Composed]:
    """Write every tensor of the plan: merged as the recipe says, or the LRM's bytes. Returns what became of the merged.

    `journal`: what an earlier run has done is left alone, and what this one has done is saved now and then. Raises
    InputError for weights that are not finite, before or after, and what the reader and the writer raise.
    """
    state = journal.state if journal and journal.state else {"placed": [], "composed": {}}
    before = {name: Composed(**told) for name, told in state["composed"].items()}
    left = [t for t in plan.tensors if t.name not in set(state["placed"])]
    merged, copied = ([t.name for t in left if (t.name in plan.merged) == wanted] for wanted in (True, False))
    told: dict[_Chunk, _Told] = {}
    jobs = [*_chunks(plan, copied, _COPY, 1), *_chunks(plan, merged, CHUNK, None)]
    for tensor in left:
        writer.begin(tensor.name, tensor.dtype, tensor.shape)
    total = sum(t.nbytes for t in plan.lrm.tensors.values())
    todo = sum(plan.lrm.tensors[t.name].nbytes for t in left)
    progress.start("merge", total)
    progress.advance(total - todo)

    def composed() -> dict[str, Composed]:
        chunks: dict[str, list[_Told | None]] = {name: [] for name in merged}
        for chunk in jobs:  # in their order: sums do not know which thread was first
            if chunk.name in chunks:
                chunks[chunk.name].append(told.get(chunk))
        return before | {name: _composed(plan, name, found) for name, found in chunks.items() if None not in found}

    def tick(nbytes: int) -> None:
        nonlocal todo
        todo -= nbytes
        progress.advance(nbytes, nbytes=nbytes)
        if journal and todo and journal.due():
            _save(journal, plan, writer, composed)

    try:
        in_parallel(jobs, lambda: _Worker(plan, writer, told).do, threads, tick)
    except _NotFinite as error:
        raise non_finite_everywhere(plan, _overflow(plan, str(error))) from None
    finally:
        progress.stop()
    return composed()


def _save(journal: Journal, plan: Plan, writer: CheckpointWriter, composed: Callable[[], dict[str, Composed]]) -> None:
    """Make what is written durable, and note it."""
    began, placed, found = time.monotonic(), writer.placed(), composed()
    writer.flush()
    placed = [name for name in placed if name not in plan.merged or name in found]
    writer.keep()
    journal.save({
        "placed": placed, "composed": {n: asdict(told) for n, told in found.items() if n in set(placed)},
        "label": f"merge: {len(placed)} of {len(plan.tensors)} tensors",
    }, began)  # fmt: skip


def _chunks(plan: Plan, names: Iterable[str], step: int, item: int | None) -> Iterator[_Chunk]:
    """The tensors in pieces of `step` elements, each of `item` bytes (None: of the LRM's dtype)."""
    for name in names:
        info = plan.lrm.tensors[name]
        size = info.nbytes // (item or ITEM_BYTES[info.dtype])
        yield from (_Chunk(name, start, min(step, size - start)) for start in range(0, size, step))


class _Worker:
    """One thread's buffers, and `do`, which does one chunk with them."""

    def __init__(self, plan: Plan, writer: CheckpointWriter, told: dict[_Chunk, _Told]):
        self._plan, self._writer, self._told = plan, writer, told
        self._models = (plan.lrm, plan.itm, plan.base)
        self._written = {t.name: t.dtype for t in plan.tensors}
        self._raw = [byte_buffer(_chunk_bytes(plan)) for _ in range(4)]
        self._blocks = [np.empty(BLOCK) for _ in range(3)]

    def do(self, chunk: _Chunk) -> int:
        """Merge or copy one chunk; returns how many of the LRM's bytes that was."""
        name, start, count = chunk
        if name not in self._plan.merged:
            raw = memoryview(self._raw[0][:count])
            self._plan.lrm.read_into(name, raw, start)
            self._writer.put(name, raw, start)
            return count
        codes = [c.tensors[name].dtype for c in self._models]
        words = [raw[: count * ITEM_BYTES[code]] for raw, code in zip(self._raw, codes, strict=False)]
        for checkpoint, raw, code in zip(self._models, words, codes, strict=True):
            checkpoint.read_into(name, memoryview(raw), start * ITEM_BYTES[code])
        code = self._written[name]
        out = self._raw[3][: count * ITEM_BYTES[code]]
        stored = [raw.view(WORDS[c]) for raw, c in zip((*words, out), (*codes, code), strict=True)]
        with np.errstate(all="ignore"):  # what overflows is found by looking
            found = [self._block([w[at : at + BLOCK] for w in stored], codes, code, name)
                     for at in range(0, count, BLOCK)]  # fmt: skip
        self._writer.put(name, memoryview(out), start * ITEM_BYTES[code])
        self._told[chunk] = _Told(*(sum(values) for values in zip(*found, strict=True)))
        return len(words[0])

    def _block(self, stored: list[np.ndarray], codes: list[str], code: str, name: str) -> _Told:
        """Merge one block: stored elements of the three models, and of the output, which is filled. _NotFinite."""
        wide = np.float64 if "F64" in codes else np.float32
        lrm, delta, other = (b.view(wide)[: len(stored[0])] for b in self._blocks)
        for words, stored_as, into in zip(stored, codes, (lrm, delta, other), strict=False):
            decode(words, stored_as, into)
        np.subtract(delta, other, out=delta)
        squares = _squares(delta), _squares(lrm)
        if None in squares:
            raise _NotFinite(name)
        task_arithmetic(lrm, delta, self._plan.merged[name].lam)
        encode(delta, code, stored[3], other.view(np.float32)[: len(other)])
        if not all_finite(stored[3], code):
            raise _NotFinite(name)
        return _Told(*squares, _changed(stored[0], codes[0], stored[3], code))


def task_arithmetic(lrm: np.ndarray, delta: np.ndarray, lam: float) -> None:
    """W_R + λ Δ, in place of Δ: the product and the sum are rounded, as in kernels.reference.project."""
    np.multiply(delta, delta.dtype.type(lam), out=delta)
    np.add(delta, lrm, out=delta)


def _squares(x: np.ndarray) -> float | None:
    """‖x‖², rows of _ROW elements in the dtype of x, summed in fp64; None where x is not finite."""
    whole = len(x) // _ROW * _ROW
    rows = x[:whole].reshape(-1, 1, _ROW)
    total = float(np.matmul(rows, rows.transpose(0, 2, 1)).sum(dtype=np.float64)) + float(x[whole:] @ x[whole:])
    if 1e-30 < total < float("inf"):
        return total
    if not all_finite(x, "F64" if x.dtype == np.float64 else "F32"):
        return None
    return float(np.square(x, dtype=np.float64).sum())  # too large or too small to square in fp32


def _changed(lrm: np.ndarray, stored_as: str, out: np.ndarray, code: str) -> int:
    """Elements that differ from the LRM's in the output's dtype; a zero's sign counts."""
    if code != stored_as:
        wide = np.empty(len(lrm), np.float64 if "F64" in (code, stored_as) else np.float32)
        decode(lrm, stored_as, wide)
        lrm = np.empty_like(out)
        encode(wide, code, lrm, np.empty(len(out), np.float32))
    bits = f"u{out.itemsize}"
    return int(np.count_nonzero(lrm.view(bits) != out.view(bits)))


def _composed(plan: Plan, name: str, chunks: list[_Told]) -> Composed:
    """What became of a tensor, from its chunks."""
    delta = math.fsum(c.delta for c in chunks) ** 0.5
    return Composed(
        delta=delta,
        kept=delta,
        applied=abs(plan.merged[name].lam) * delta,
        weight=math.fsum(c.weight for c in chunks) ** 0.5,
        inside=0.0,
        leak=0.0,
        written_leak=0.0,
        changed=sum(c.changed for c in chunks),
        rank=0,
        width=plan.lrm.tensors[name].shape[-1],
        energy=0.0,
        rows=0,
        finite=True,
    )


def _overflow(plan: Plan, name: str) -> InputError:
    dtype = next(t.dtype for t in plan.tensors if t.name == name)
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return InputError(f"{name}: the merged weights overflow {names[dtype]}, in which they are written; lower lambda, "
                      "or write dtype: bfloat16 (or float32) in the recipe")
