"""Runs a TensorPlan: every tensor of the output by its method, from streams of its inputs, in place in its shard.

In the order of its files, so that each is hashed as it is written: a tensor is shared out by chunks over all threads.
Each of them computes with one OpenMP thread: more of them on small chunks stand in each other's way. Results do not
depend on the number of threads.

Memory: a few chunks a thread, and the counters of thresholds (methods/select.py), whatever the size of the model.
"""

from __future__ import annotations

import keyword
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError, ResourceError, listed
from .io.header import ITEM_BYTES
from .io.writer import CheckpointWriter
from .jobs import TensorJob, TensorPlan
from .journal import Journal, save_kept
from .memory import format_size
from .methods import METHODS
from .progress import Progress
from .scan import Shard
from .stream import CHUNK, FLOATS, Buffers, Merge, common_dtype
from .threads import in_parallel

_KEPT = 48 << 20  # bytes that the allocator keeps for a thread; measured: at most 45 (karcher)
_COPY = 1 << 20  # bytes that are copied at a time


class _Piece(NamedTuple):
    """Bytes of a tensor that are copied, or were written by an earlier run: `count` from `start` on; the piece `number`
    of its shard."""

    name: str
    read: Callable[..., None]
    start: int
    count: int
    shard: Shard
    number: int


def check_jobs(plan: TensorPlan) -> None:
    """InputError that lists every job which cannot run: an unknown method, a dtype that nothing computes in, inputs of
    other shapes than the output."""
    problems = []
    copies = plan.output.copies
    for job in plan.jobs:
        inputs = [*job.sources, *([job.base] if job.base else [])]
        shapes = {s.checkpoint.tensors[s.key].shape for s in inputs if s.rows is None}
        name = job.out.name
        if job.method not in METHODS:
            problems.append(f"{name}: unknown method {job.method!r}, known are {', '.join(METHODS)}")
        elif shapes - {tuple(job.out.shape)}:
            problems.append(f"{name}: its inputs have the shapes {sorted(shapes)}, the output {job.out.shape}")
        elif name not in copies and (common_dtype(job) not in FLOATS or job.out.dtype not in FLOATS):
            problems.append(f"{name}: {common_dtype(job)} is no dtype that can be merged (to {job.out.dtype}): "
                            f"wanted {', '.join(FLOATS)}")
    if problems:
        raise InputError(listed(f"{plan.source}: these tensors cannot be merged:", problems))


def thread_bytes(plan: TensorPlan) -> int:
    """Upper bound of what one thread holds: buffers of every input and the output, the arrays of a formula (fp64 where
    it adds up), counters, and what the allocator keeps of what was freed."""
    most = 0
    for job in plan.jobs:
        inputs = [*job.sources, *([job.base] if job.base else [])]
        rows = math.prod(job.out.shape[1:]) if len(job.out.shape) > 1 else 0
        chunk = max(_largest_chunk(job.method), rows)
        stored = sum(ITEM_BYTES[s.checkpoint.tensors[s.key].dtype] for s in inputs) + ITEM_BYTES[job.out.dtype]
        most = max(most, chunk * (stored + 8 * (2 * len(inputs) + 4)) + _counters(job))
    return most + _KEPT


def _largest_chunk(method: str) -> int:
    return 1 << 20 if method == "slerp" else CHUNK


def _counters(job: TensorJob) -> int:
    thresholds = {"ties": 1, "breadcrumbs": 2, "breadcrumbs_ties": 2}.get(job.method, 0) * len(job.sources)
    return (8 << 20) * (thresholds or (job.method == "sce"))


def fit_threads(plan: TensorPlan, threads: int, limit: float) -> int:
    """At most `threads`, fewer where `limit` bytes ask for it. ResourceError where not even one fits."""
    one = thread_bytes(plan)
    if one > limit:
        raise ResourceError(f"The merge does not fit the memory budget: one thread's buffers take {format_size(one)}, "
                            f"{format_size(limit)} given. Raise the budget")
    return int(max(1, min(threads, limit // max(1, one))))


def merge_tensors(
    plan: TensorPlan,
    writer: CheckpointWriter,
    progress: Progress,
    threads: int,
    journal: Journal | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Shard]:
    """Write every tensor of the plan. Returns what was put into each file.

    `device`: where formulas are computed; chunks go there and back. `seed`: of the methods that drop at random.
    `journal`: what an earlier run has done is left alone (and read again for the hash), and what this one has done is
    saved now and then. Raises InputError for weights that are not finite, and what the reader and the writer raise.
    """
    check_jobs(plan)
    placed = set(journal.state["placed"]) if journal and journal.state else set()
    jobs = {job.out.name: job for job in plan.jobs}
    for name in (n for n in jobs if n not in placed):
        writer.begin(name, jobs[name].out.dtype, jobs[name].out.shape)
    shards = {file: Shard(file, *told, plan.output.hashed) for file, told in writer.layout.items()}
    sizes = {name: size for shard in shards.values() for name, size in shard.sizes.items()}
    total, done = sum(sizes.values()), sum(sizes[name] for name in placed)
    progress.start("merge", total)
    progress.advance(done)
    buffers, copies = Buffers(), plan.output.copies

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress.advance(nbytes, nbytes=nbytes)
        if journal and done < total and journal.due():
            _save(journal, plan, writer)

    try:
        with _one_openmp_thread():
            for shard, name in [(file, name) for file in shards.values() for name in file.sizes]:
                if name in placed:
                    read = partial(writer.read_back, name)
                    in_parallel(_pieces(shard, name, read), lambda: lambda p: 0 * _look(p, buffers), threads)
                elif name in copies:
                    read = partial(copies[name][0].read_into, copies[name][1])
                    in_parallel(_pieces(shard, name, read), lambda: lambda p: _look(p, buffers, writer), threads, tick)
                elif shard.sizes[name]:
                    merge = Merge(jobs[name], writer, buffers, threads=threads, device=device, seed=seed, tick=tick,
                                  shard=shard)  # fmt: skip
                    METHODS[jobs[name].method].run(merge, **arguments(jobs[name]))
    finally:
        progress.stop()
    return shards


def arguments(job: TensorJob) -> dict[str, Any]:
    """A job's parameters as keywords of its method, defaults filled in."""
    spec = METHODS[job.method]
    found = {key: job.parameters.get(key, told.default) for key, told in spec.parameters.items()}
    for key, told in spec.model_parameters.items():
        found[key] = [source.parameters.get(key, told.default) for source in job.sources]
    return {key + "_" * keyword.iskeyword(key): value for key, value in found.items()}


def _save(journal: Journal, plan: TensorPlan, writer: CheckpointWriter) -> None:
    """Make what is written durable, and note it."""
    began, placed = time.monotonic(), writer.placed()
    writer.flush()
    told = {"placed": placed, "label": f"merge: {len(placed)} of {len(plan.jobs)} tensors"}
    save_kept(writer, journal, told, began)


def _pieces(shard: Shard, name: str, read: Callable[..., None]) -> Iterator[_Piece]:
    size, turn = shard.sizes[name], shard.turn
    for n, at in enumerate(range(0, size, _COPY)):
        yield _Piece(name, read, at, min(_COPY, size - at), shard, turn + n)


def _look(piece: _Piece, buffers: Buffers, writer: CheckpointWriter | None = None) -> int:
    """Read a piece, write it where there is a `writer`, and tell the shard."""
    with buffers.lend([piece.count]) as (raw,):
        here = None
        try:
            piece.read(raw, piece.start)
            if writer:
                writer.put(piece.name, raw, piece.start)
            here = np.frombuffer(raw, np.uint8)
            piece.shard.add_sum(piece.name, piece.start, here)
        finally:
            piece.shard.add(piece.number, here)  # also after an error: the others wait for their turn
    return piece.count


@contextmanager
def _one_openmp_thread() -> Iterator[None]:
    """torch computes with one thread in each of ours; what it had is given back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def methods_of(jobs: Sequence[TensorJob]) -> dict[str, int]:
    """{method: how many tensors it makes}."""
    found: dict[str, int] = {}
    for job in jobs:
        found[job.method] = found.get(job.method, 0) + 1
    return found
