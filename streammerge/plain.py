"""Merges that need no data: W* = W_R + λ (W_I − W_B) chunk by chunk, at the speed of the disk.

No stream passes through a layer, so layers mean nothing here: each thread takes the next piece of the output, reads its
elements from the three models into buffers of its own, merges them in the core's caches, puts them in place, and hashes
them when its turn has come (scan.py). The arithmetic is the sweep's, bit for bit (tests/test_plain_merge.py), in numpy:
torch would take longer to import than a small model to merge.

Memory: a chunk of each model and of the output a thread, and three in a wider dtype, whatever the size of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np

from . import scan
from .arithmetic import Chunk, Told
from .errors import InputError, ResourceError
from .io.header import ITEM_BYTES
from .io.writer import CheckpointWriter
from .journal import Journal, save_kept
from .memory import format_size
from .outcome import Composed
from .planned import Plan
from .progress import Progress
from .recipe import Recipe
from .scan import Shard, dealt
from .threads import in_parallel
from .verified import non_finite_everywhere


def is_plain(recipe: Recipe) -> bool:
    """No sample passes through a layer: neither for bases, nor for coefficients, nor to measure L_think; α is 1, and
    Δ the difference of two stored weights."""
    samples = recipe.calibration.reasoning or recipe.needs_reasoning or recipe.needs_instruction
    chunkwise = recipe.sparsify.method == "none" and not recipe.adapts  # Δ of an element is its own
    return not samples and recipe.coefficients.value == 1 and chunkwise


class _Stretch(NamedTuple):
    """The bytes of the output that are merged or copied at a time: `nbytes` of a tensor from byte `start` on, the
    piece `number` of its shard."""

    name: str
    start: int
    nbytes: int
    number: int
    shard: Shard


class _NotFinite(Exception):
    """A merged value is infinite or NaN: an input is, or the output's dtype is too narrow."""


@dataclass(frozen=True)
class Threads:
    """How many threads merge, and the bytes that they hold."""

    count: int
    nbytes: int


def fit_threads(plan: Plan, threads: int, limit: float) -> Threads:
    """At most `threads`, fewer where `limit` bytes ask for it. ResourceError where not even one fits."""
    one = Chunk.sizes(*_codes(plan), scan.PIECE)[2]
    if one > limit:
        raise ResourceError(f"The merge does not fit the memory budget: one thread's buffers take {format_size(one)}, "
                            f"{format_size(limit)} given. Raise the budget")
    count = int(max(1, min(threads, limit // one)))
    return Threads(count, one * count)


def _codes(plan: Plan) -> tuple[set[str], set[str]]:
    """The dtypes of all that is merged, inputs and outputs; of the outputs."""
    written = {t.dtype for t in plan.tensors if t.name in plan.merged}
    return written | {c.tensors[name].dtype for c in (plan.lrm, plan.itm, plan.base) for name in plan.merged}, written


def merge_plain(
    plan: Plan, writer: CheckpointWriter, progress: Progress, threads: int, journal: Journal | None = None
) -> tuple[dict[str, Composed], dict[str, Shard]]:
    """Write every tensor of the plan: merged as the recipe says, or the LRM's bytes. Returns what became of the merged
    tensors, and of each shard what was put there.

    `journal`: what an earlier run has done is left alone (and read again for the hash), and what this one has done is
    saved now and then. Raises InputError for weights that are not finite, before or after, and what the reader and the
    writer raise.
    """
    state = journal.state if journal and journal.state else {"placed": [], "composed": {}}
    done = _Done(plan, state)
    shards = {file: Shard(file, *told, plan.output.hashed) for file, told in writer.layout.items()}
    left = [t for t in plan.tensors if t.name not in done.placed]
    for tensor in left:
        writer.begin(tensor.name, tensor.dtype, tensor.shape)
    total = sum(t.nbytes for t in plan.lrm.tensors.values())
    todo = sum(plan.lrm.tensors[t.name].nbytes for t in left)
    progress.start("merge", total)
    progress.advance(total - todo)

    def tick(nbytes: int) -> None:
        nonlocal todo
        todo -= nbytes
        progress.advance(nbytes, nbytes=nbytes)
        if journal and todo and nbytes and journal.due():  # nothing new where only placed tensors were read again
            _save(journal, plan, writer, done)

    try:
        stretches = dealt(map(_stretches, shards.values()), threads)
        in_parallel(stretches, lambda: _Worker(plan, writer, done).do, threads, tick)
    except _NotFinite as error:
        raise non_finite_everywhere(plan, _overflow(plan, str(error))) from None
    finally:
        progress.stop()
    return done.composed(), shards


def _stretches(shard: Shard) -> Iterator[_Stretch]:
    """A shard from the first tensor to the last, cut as the verification cuts it."""
    number = 0
    for name, size in shard.sizes.items():
        for start in range(0, size, scan.PIECE):
            yield _Stretch(name, start, min(scan.PIECE, size - start), number, shard)
            number += 1


class _Done:
    """What became of the merged tensors, told chunk by chunk by several threads. `placed`: tensors of an earlier run.

    What is held of a chunk goes with the last chunk of its tensor.
    """

    def __init__(self, plan: Plan, state: Mapping):
        self.placed = set(state["placed"])
        self._plan, self._lock = plan, Lock()
        self._whole = {name: Composed(**told) for name, told in state["composed"].items()}
        self._parts: dict[str, dict[int, Told]] = {}

    def tell(self, stretch: _Stretch, told: Told) -> None:
        name, size = stretch.name, stretch.shard.sizes[stretch.name]
        with self._lock:
            parts = self._parts.setdefault(name, {})
            parts[stretch.start] = told
            if len(parts) == -(-size // scan.PIECE):
                in_order = [parts[start] for start in sorted(parts)]  # sums do not know which thread was first
                self._whole[name] = _composed(self._plan, name, in_order)
                del self._parts[name]

    def composed(self) -> dict[str, Composed]:
        """Of all tensors that are whole, in the plan's order."""
        with self._lock:
            return {name: self._whole[name] for name in self._plan.merged if name in self._whole}


def _save(journal: Journal, plan: Plan, writer: CheckpointWriter, done: _Done) -> None:
    """Make what is written durable, and note it."""
    began, placed, found = time.monotonic(), writer.placed(), done.composed()
    writer.flush()
    placed = [name for name in placed if name not in plan.merged or name in found]
    save_kept(writer, journal, {
        "placed": placed, "composed": {n: asdict(told) for n, told in found.items() if n in set(placed)},
        "label": f"merge: {len(placed)} of {len(plan.tensors)} tensors",
    }, began)  # fmt: skip


class _Worker:
    """One thread's buffers, and `do`, which does one stretch with them."""

    def __init__(self, plan: Plan, writer: CheckpointWriter, done: _Done):
        self._plan, self._writer, self._done = plan, writer, done
        self._models = (plan.lrm, plan.itm, plan.base)
        self._written = {t.name: t.dtype for t in plan.tensors}
        self._chunk = Chunk(*_codes(plan), scan.PIECE)

    def do(self, stretch: _Stretch) -> int:
        """Merge or copy one stretch; returns how many of the LRM's bytes that was."""
        name, shard = stretch.name, stretch.shard
        here: np.ndarray | None = None
        try:
            if name in self._done.placed:
                data, done = self._chunk.stored[0, : stretch.nbytes], 0
                self._writer.read_back(name, memoryview(data), stretch.start)
            elif name in self._plan.merged:
                data, done = self._merge(stretch)
            else:
                data, done = self._chunk.stored[0, : stretch.nbytes], stretch.nbytes
                self._plan.lrm.read_into(name, memoryview(data), stretch.start)
                self._writer.put(name, memoryview(data), stretch.start)
            shard.sum(name, stretch.start, data)
            here = data
        finally:
            shard.add(stretch.number, here)  # also after an error: the others wait for their turn
        return done

    def _merge(self, stretch: _Stretch) -> tuple[np.ndarray, int]:
        """-> the bytes that were written, how many of the LRM's they took the place of."""
        name, code = stretch.name, self._written[stretch.name]
        begin, count = stretch.start // ITEM_BYTES[code], stretch.nbytes // ITEM_BYTES[code]
        stored, codes = self._chunk.stored, [c.tensors[name].dtype for c in self._models]
        for checkpoint, row, read_as in zip(self._models, stored, codes, strict=False):
            item = ITEM_BYTES[read_as]
            checkpoint.read_into(name, memoryview(row[: count * item]), begin * item)
        told = self._chunk.merge(codes, code, count, self._plan.merged[name].lam)
        if told is None:
            raise _NotFinite(name)
        data = stored[3, : stretch.nbytes]
        self._writer.put(name, memoryview(data), stretch.start)
        self._done.tell(stretch, told)
        return data, count * ITEM_BYTES[codes[0]]


def _composed(plan: Plan, name: str, chunks: list[Told]) -> Composed:
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
