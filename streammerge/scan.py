"""Looking at stored bytes once: SHA256 of whole files, equality with a twin, finite values, in the same buffers.

A file's hash needs its bytes in order, which leaves one core for a checkpoint of one shard. So the pieces of a file
are dealt to all threads: each reads its piece (or makes it: plain.py) and looks at it beside the others, and then waits
for its turn to hash it. Shards are dealt alternately. Memory: two pieces a thread.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from .codec import all_finite
from .errors import InputError
from .io.checkpoint import Checkpoint, TensorInfo
from .io.disk import byte_buffer
from .threads import in_parallel, usable_cores

PIECE = 1 << 19  # bytes, a multiple of every element's size: stays in a core's cache between reading and hashing
Read = Callable[[memoryview], None]
T = TypeVar("T")


class InOrder:
    """The SHA256 of pieces that threads bring as they have them: each waits for its turn."""

    def __init__(self, hashed: bool = True) -> None:
        self._hash = hashlib.sha256() if hashed else None
        self._turn, self._moved = 0, threading.Condition()

    def add(self, number: int, data: np.ndarray | None) -> None:
        """Hash the piece `number`, once all before it are; None where there is none after all."""
        if self._hash is None:
            return
        with self._moved:
            self._moved.wait_for(lambda: self._turn == number)
        if data is not None:
            self._hash.update(data)  # outside of the lock: whose turn it is is alone here
        with self._moved:
            self._turn += 1
            self._moved.notify_all()

    @property
    def turn(self) -> int:
        """The number of the next piece."""
        return self._turn

    def hexdigest(self) -> str:
        """The SHA256 of all that was added, "" where nothing is hashed."""
        return "" if self._hash is None else self._hash.hexdigest()


class Shard(InOrder):
    """What is put into a file of the output: its SHA256, and a sum of every piece, by which a later reading knows it.

    `header`: the file's first bytes, which count as hashed; `sizes`: {tensor: its bytes} in the file's order. The first
    tensor's first piece has the number 0.
    """

    def __init__(self, name: str, header: bytes, sizes: dict[str, int], hashed: bool) -> None:
        super().__init__(hashed)
        self.sizes, raw = sizes, np.frombuffer(header, np.uint8)
        self._sums = {n: np.zeros(-(-size // PIECE), np.uint64) for n, size in ({name: len(raw)} | sizes).items()}
        for offset in range(0, len(raw), PIECE):
            self.sum(name, offset, raw[offset : offset + PIECE])
        if self._hash:
            self._hash.update(raw)

    def sum(self, name: str, offset: int, data: np.ndarray) -> None:
        """Note the sum of the piece of a tensor that begins at a byte `offset`."""
        self._sums[name][offset // PIECE] = word_sum(data)

    def add_sum(self, name: str, start: int, data: np.ndarray) -> None:
        """Note bytes of a tensor that begin at any byte `start`, and end anywhere: sums of parts add up."""
        at = 0
        while at < len(data):
            offset = start + at
            part = data[at : at + PIECE - offset % PIECE]
            into = -offset % 8  # bytes up to the next word
            value = (int.from_bytes(part[:into].tobytes(), "little") << 8 * (8 - into)) + word_sum(part[into:])
            with self._moved:
                sums = self._sums[name]
                sums[offset // PIECE] = (int(sums[offset // PIECE]) + value) % (1 << 64)
            at += len(part)

    def sum_of(self, name: str, offset: int) -> int:
        """The noted sum; -1, which none is, for a piece that was never put here."""
        sums, index = self._sums.get(name, ()), offset // PIECE
        return int(sums[index]) if index < len(sums) else -1


class Digest(InOrder):
    """A file that is read, and hashed in order. `error`: why it cannot be read."""

    def __init__(self, file: Path, hashed: bool = True) -> None:
        super().__init__(hashed)
        self.file, self.size, self.error, self._fd = file, 0, "", -1
        try:
            self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            self.error = f"cannot be read: {error.strerror}"

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from a byte of the file on. InputError where the file has ended or the disk fails."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{self.file}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise InputError(f"{self.file}: ends at byte {offset + done}, is something else changing it?")
            done += count

    def hexdigest(self) -> str:
        """As of every InOrder; "" where the file cannot be read, too."""
        return "" if self.error else super().hexdigest()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Piece(NamedTuple):
    """A stretch of bytes to look at. `what` findings are told of; `code` is the dtype of what must be finite."""

    what: Hashable
    read: Read
    nbytes: int
    code: str = ""
    twin: Read | None = None  # reads what must be the same bytes
    digest: Digest | None = None
    number: int = 0  # of the piece in its file
    sum: int | None = None  # what `word_sum` found when the bytes were written


@dataclass
class Found:
    """What `scan` met, by the pieces' `what`: those that differ from their twin, those that have another sum than when
    they were written, and those with NaN or infinities."""

    changed: set[Hashable] = field(default_factory=set)
    altered: set[Hashable] = field(default_factory=set)
    infinite: set[Hashable] = field(default_factory=set)


def tensor_pieces(checkpoint: Checkpoint, name: str) -> Iterator[Piece]:
    """A tensor, piece by piece, told as (role, name)."""
    info = checkpoint.tensors[name]
    for offset in range(0, info.nbytes, PIECE):
        read = partial(checkpoint.read_into, name, offset=offset)
        yield Piece((checkpoint.role, name), read, min(PIECE, info.nbytes - offset), info.dtype)


def file_pieces(
    digest: Digest,
    tensors: Iterable[TensorInfo] = (),
    twin: Callable[[str], Callable[..., None] | None] | None = None,
    shard: Shard | None = None,
) -> Iterator[Piece]:
    """A whole file in order, cut at its tensors' borders; `twin` of a tensor's name, or of the file's, is what reads
    the same: it fills a view from a byte `offset` on. `shard`: what was put into the file.

    `tensors` are those of a header that was read without a problem, or none: then the file is plain bytes.
    """
    infos = sorted(tensors, key=lambda t: t.start)
    header = infos[0].start if infos else digest.size
    stretches = [(digest.file.name, 0, header, "")] + [(t.name, t.start, t.nbytes, t.dtype) for t in infos]
    number = 0
    for name, start, size, code in stretches:
        like = twin(name) if twin else None
        for offset in range(0, size, PIECE):
            nbytes = min(PIECE, size - offset)
            other = partial(like, offset=offset) if like else None
            read, known = partial(digest.read, offset=start + offset), shard.sum_of(name, offset) if shard else None
            yield Piece(name, read, nbytes, code, other, digest, number, known)
            number += 1


def dealt(files: Iterable[Iterator[T]], ways: int) -> Iterator[T]:
    """Pieces of `ways` files at a time, in turn: threads then rarely wait for each other."""
    waiting, active = iter(files), deque()
    while True:
        while len(active) < ways and (lane := next(waiting, None)) is not None:
            active.append(lane)
        if not active:
            return
        lane = active.popleft()
        piece = next(lane, None)
        if piece is not None:
            active.append(lane)
            yield piece


@contextmanager
def opened(files: Iterable[Path], unhashed: Collection[str] = ()) -> Iterator[dict[str, Digest]]:
    """{file name: its open Digest}, closed at the end. `unhashed`: names of files that are read only."""
    found: dict[str, Digest] = {}
    try:
        for file in files:
            found[file.name] = Digest(file, file.name not in unhashed)
        yield found
    finally:
        for digest in found.values():
            digest.close()


def scan(
    pieces: Iterable[Piece], threads: int | None = None, tick: Callable[[int], None] = lambda n: None,
    forgive: bool = False,
) -> Found:  # fmt: skip
    """Look at every piece; `tick` hears of bytes. Pieces of one file must come in its order.

    Raises InputError where bytes cannot be read; with `forgive` the file's Digest is told instead.
    """
    found = Found()

    def start() -> Callable[[Piece], int]:
        mine, other, differ = byte_buffer(PIECE), byte_buffer(PIECE), np.empty(PIECE // 8 + 1, bool)

        def look(piece: Piece) -> int:
            here: np.ndarray | None = mine[: piece.nbytes]
            try:
                piece.read(memoryview(here))
                if piece.twin:
                    there = other[: piece.nbytes]
                    piece.twin(memoryview(there))
                    if not _equal(here, there, differ):
                        found.changed.add(piece.what)
                if piece.sum not in (None, word_sum(here)):
                    found.altered.add(piece.what)
                if piece.code and not all_finite(here, piece.code):
                    found.infinite.add(piece.what)
            except InputError as error:
                here = None
                if not forgive or piece.digest is None:
                    raise
                piece.digest.error = str(error).removeprefix(f"{piece.digest.file}: ")
            except BaseException:
                here = None
                raise
            finally:
                if piece.digest:
                    piece.digest.add(piece.number, here)  # also after an error: the others wait for their turn
            return piece.nbytes

        return look

    in_parallel(pieces, start, threads or usable_cores(), tick)
    return found


def word_sum(data: np.ndarray) -> int:
    """The sum of the bytes' 64-bit words, modulo 2^64: at the speed of memory, one changed bit always shows."""
    whole = len(data) // 8 * 8
    rest = int.from_bytes(data[whole:].tobytes(), "little")
    return (int(np.add.reduce(data[:whole].view(np.uint64))) + rest) % (1 << 64)


def _equal(a: np.ndarray, b: np.ndarray, differ: np.ndarray) -> bool:
    """The same bytes, eight at a time; `differ` is a scratch of bools."""
    whole = len(a) // 8
    words = (x[: 8 * whole].view(np.uint64) for x in (a, b))
    different = np.not_equal(*words, out=differ[:whole])
    return not different.any() and bool((a[8 * whole :] == b[8 * whole :]).all())
