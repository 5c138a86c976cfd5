"""A tensor as a stream: a method sees its inputs as aligned chunks, as often as it asks, and writes its output so.

    norm = merge.reduce(lambda chunk: squares(chunk))      # partial results, added in the order of the chunks
    merge.map(lambda chunk: formula(chunk, norm))          # the output, chunk by chunk

Every pass reads the inputs again, from the page cache where they fit: memory is a few chunks a thread, whatever the
size of the tensor. Arithmetic is in torch, in the inputs' common dtype D. Formulas that mix dtypes hold numbers in a
wider one (fp32 for fp16 and bf16) and round them to D by `merge.round` after each step, which gives the bits of D's own
operations; those are the faster where a formula needs no other (measured: a sum of bf16 19 us for 128K elements, 30 by
way of fp32). No result depends on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from .codec import all_finite
from .errors import InputError
from .io.disk import byte_buffer
from .io.header import ITEM_BYTES
from .io.writer import CheckpointWriter
from .jobs import Source, TensorJob, mapped_rows
from .scan import Shard
from .threads import in_parallel

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18  # elements merged at a time: with half of it threads wait longer for the interpreter (6.9 s, not 4.6)
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
FLOATS = tuple(_CODES.values())  # what methods compute in


@dataclass(frozen=True)
class Span:
    """`count` elements from `start` on; `index`: its place among the spans of one pass."""

    index: int
    start: int
    count: int


@dataclass(frozen=True)
class Chunk:
    """One span of every input, in D: [count] each. They are views of reused buffers: keep nothing, change nothing."""

    span: Span
    sources: list[torch.Tensor]
    base: torch.Tensor | None

    def delta(self, i: int) -> torch.Tensor:
        """W_i − W_B in D."""
        return self.sources[i] - self.base


def common_dtype(job: TensorJob) -> str:
    """The code of D: what the job says, else what torch promotes its inputs to."""
    if job.dtype:
        return job.dtype
    import torch

    from .io.header import TORCH_DTYPES

    inputs = [*job.sources, *([job.base] if job.base else [])]
    found = TORCH_DTYPES[inputs[0].checkpoint.tensors[inputs[0].key].dtype]
    for source in inputs[1:]:
        found = torch.promote_types(found, TORCH_DTYPES[source.checkpoint.tensors[source.key].dtype])
    return next(code for code, dtype in TORCH_DTYPES.items() if dtype == found)


class Buffers:
    """Byte buffers that threads lend for a chunk; `made` tells how many there are. Grows to the largest row."""

    def __init__(self) -> None:
        self._free: SimpleQueue[list[np.ndarray]] = SimpleQueue()

    @contextmanager
    def lend(self, sizes: Sequence[int]) -> Iterator[list[memoryview]]:
        """One writable view of each size in bytes."""
        held = [] if self._free.empty() else self._free.get()
        for i, size in enumerate(sizes):
            if i == len(held):
                held.append(byte_buffer(size))
            elif len(held[i]) < size:
                held[i] = byte_buffer(size)
        yield [memoryview(raw[:size]) for raw, size in zip(held, sizes, strict=False)]
        self._free.put(held)


class Scratch:
    """A tensor on the disk. Threads may read and write different spans of it at a time."""

    def __init__(self, descriptor: int, dtype: torch.dtype, device: str):
        self._descriptor, self._dtype, self._device = descriptor, dtype, device

    def write(self, span: Span, values: torch.Tensor) -> None:
        import torch

        raw = memoryview(values.cpu().view(torch.uint8).numpy())
        done, at = 0, span.start * self._dtype.itemsize
        while done < len(raw):
            done += os.pwrite(self._descriptor, raw[done:], at + done)

    def read(self, span: Span) -> torch.Tensor:
        import torch

        raw = bytearray(span.count * self._dtype.itemsize)
        done, at = 0, span.start * self._dtype.itemsize
        while done < len(raw):
            done += os.preadv(self._descriptor, [memoryview(raw)[done:]], at + done)
        return torch.frombuffer(raw, dtype=self._dtype).to(self._device)


class Merge:
    """One tensor of the output: its inputs, its place, and the passes over them.

    `models`: the number of sources; `dtype`: D; `wide`: what numbers of D are held in; `shape`, `count`: of the tensor.
    `threads` share the chunks of a pass; `tick` hears of the bytes of the output as they are written, and `shard`, its
    file, is told them: a file's tensors come in its order, one at a time.
    """

    def __init__(
        self,
        job: TensorJob,
        writer: CheckpointWriter,
        buffers: Buffers,
        *,
        threads: int = 1,
        device: str = "cpu",
        seed: int = 0,
        chunk: int = CHUNK,
        tick: Callable[[int], None] = lambda nbytes: None,
        shard: Shard | None = None,
    ):
        import torch

        from .io.header import TORCH_DTYPES

        self.job, self.models, self.base = job, len(job.sources), job.base is not None
        self.shape, self.count = tuple(job.out.shape), math.prod(job.out.shape)
        self.dtype = TORCH_DTYPES[common_dtype(job)]
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.device, self.chunk = device, chunk
        self._types, self._out = TORCH_DTYPES, TORCH_DTYPES[job.out.dtype]
        self._writer, self._buffers, self._threads, self._tick, self._seed = writer, buffers, threads, tick, seed
        self._shard, self._turn = shard, shard.turn if shard else 0

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x of the wide dtype with the values that it has in D."""
        return x if self.dtype == self.wide else x.to(self.dtype).to(self.wide)

    def values(self, numbers: Sequence[float]) -> list[torch.Tensor]:
        """Numbers of the recipe rounded to D, as scalars of the wide dtype."""
        import torch

        return [torch.tensor(x, dtype=self.dtype, device=self.device).to(self.wide) for x in numbers]

    def spans(self, unit: int = 1, size: int = 0) -> list[Span]:
        """The tensor in spans of about `size` elements (0: the usual), each of whole rows of `unit` elements."""
        step = max(1, (size or self.chunk) // unit) * unit
        starts = range(0, self.count, step)
        return [Span(i, start, min(step, self.count - start)) for i, start in enumerate(starts)]

    def each(self, work: Callable[[Chunk], Any], spans: Sequence[Span] | None = None) -> list[Any]:
        """work(chunk) for every span, in any order -> results in the spans' order."""
        return self._run(lambda chunk, _: work(chunk), self.spans() if spans is None else spans)

    def reduce(self, work: Callable[[Chunk], torch.Tensor], spans: Sequence[Span] | None = None) -> torch.Tensor:
        """Σ work(chunk), added one by one in the spans' order whatever thread was first."""
        spans = self.spans() if spans is None else spans
        turns = {span.index: turn for turn, span in enumerate(spans)}
        waiting: dict[int, torch.Tensor] = {}  # few: kept, small results would lie between large blocks of the heap
        lock, done, total = Lock(), 0, None

        def add(chunk: Chunk) -> None:
            nonlocal done, total
            found = work(chunk)
            with lock:
                waiting[turns[chunk.span.index]] = found
                while done in waiting:
                    partial = waiting.pop(done)
                    total = partial if total is None else total + partial
                    done += 1

        self.each(add, spans)
        return total

    def map(self, work: Callable[[Chunk], torch.Tensor], spans: Sequence[Span] | None = None) -> None:
        """Write work(chunk), values of D in D or in the wide dtype, as the output's span. InputError: not finite."""
        code = self.job.out.dtype

        def write(chunk: Chunk, out: memoryview) -> int:
            import torch

            target = torch.frombuffer(out, dtype=self._out)
            result = work(chunk).reshape(-1)
            target.copy_(result if result.dtype == self.dtype else result.to(self.dtype))
            if not all_finite(np.frombuffer(out, np.uint8), code):
                raise InputError(self._not_finite(chunk))
            self._writer.put(self.job.out.name, out, chunk.span.start * ITEM_BYTES[code])
            return len(out)

        self._run(write, self.spans() if spans is None else spans, writes=True)

    @contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """A tensor of D to write and read by spans: a file without a name beside the output, gone with the process."""
        with tempfile.TemporaryFile(dir=self._writer.out) as file:
            yield Scratch(file.fileno(), self.dtype, self.device)

    def uniform(self, span: Span, model: int) -> np.ndarray:
        """Random words, uint32 [span.count], of the elements of a span: the same whatever the spans and the threads.

        A counter-based generator (Philox) keyed by seed, tensor and model; eight words are one step of its counter.
        """
        text = f"{self._seed}\0{model}\0{self.job.out.name}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        first, end = span.start // 8, -(-(span.start + span.count) // 8)
        words = np.random.Philox(key=key, counter=first).random_raw(4 * (end - first)).view(np.uint32)
        return words[span.start - 8 * first :][: span.count]

    def _run(self, work: Callable[[Chunk, memoryview], Any], spans: Sequence[Span], writes: bool = False) -> list[Any]:
        done: list[Any] = [None] * len(spans)
        inputs = [*self.job.sources, *([self.job.base] if self.job.base else [])]
        codes = [s.checkpoint.tensors[s.key].dtype for s in inputs]
        widths = [ITEM_BYTES[code] for code in (*codes, self.job.out.dtype)]

        def one(task: tuple[int, Span]) -> int:
            at, span = task
            with self._buffers.lend([span.count * width for width in widths]) as views:
                here = None
                try:
                    tensors = []
                    for source, code, view in zip(inputs, codes, views, strict=False):
                        tensors.append(self._read(source, code, view, span))
                    base = tensors.pop() if self.job.base else None
                    done[at] = work(Chunk(span, tensors, base), views[-1])
                    here = np.frombuffer(views[-1], np.uint8)
                finally:
                    if writes:
                        self._told(span, here)  # also after an error: the others wait for their turn
            return done[at] if writes else 0

        tasks = list(enumerate(spans))
        if self._threads == 1 or len(tasks) == 1:
            for task in tasks:
                self._tick(one(task))
        else:
            in_parallel(tasks, lambda: one, min(self._threads, len(tasks)), self._tick)
        return done

    def _told(self, span: Span, written: np.ndarray | None) -> None:
        if self._shard:
            if written is not None:
                self._shard.add_sum(self.job.out.name, span.start * ITEM_BYTES[self.job.out.dtype], written)
            self._shard.add(self._turn + span.index, written)

    def _read(self, source: Source, code: str, view: memoryview, span: Span) -> torch.Tensor:
        """An input's span in D: through `view`, or row by row where it has another vocabulary."""
        import torch

        if source.rows is None:
            source.checkpoint.read_into(source.key, view, span.start * ITEM_BYTES[code])
            return torch.frombuffer(view, dtype=self._types[code]).to(device=self.device, dtype=self.dtype)
        width = math.prod(self.shape[1:])
        first, end = span.start // width, -(-(span.start + span.count) // width)
        rows = mapped_rows(source, first, end, self.dtype).reshape(-1)
        return rows[span.start - first * width :][: span.count].to(self.device)

    def _not_finite(self, chunk: Chunk) -> str:
        """Which of a job's inputs is to blame, or the output's dtype."""
        inputs = [*self.job.sources, *([self.job.base] if self.job.base else [])]
        tensors = [*chunk.sources, *([chunk.base] if chunk.base is not None else [])]
        for source, tensor in zip(inputs, tensors, strict=True):
            if not tensor.isfinite().all():
                info = source.checkpoint.tensors[source.key]
                return (f"{source.checkpoint.role}: {source.key} in {info.file} has NaN or infinite values (or values "
                        f"too large for {self.dtype}): download or save this file again")
        return (f"{self.job.out.name}: the merged values overflow {self.job.out.dtype} by {self.job.method}: lower the "
                "weights, or merge and write a wider dtype (dtype: float32 or bfloat16 in the recipe)")
