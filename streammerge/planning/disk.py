"""How fast are the disks of this merge? A bounded sample of the real inputs, and a nameless file beside the output."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..io.checkpoint import Checkpoint
from ..io.disk import byte_buffer
from ..planned import distinct

PIECE = 4 << 20  # bytes read or written at a time
READ, READ_SECONDS = 256 << 20, 2.0
WRITE, WRITE_SECONDS = 64 << 20, 2.0


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second, bytes that were moved to find out, and the share of them that the page cache held before (None:
    this system does not tell)."""

    rate: float
    sample: int
    cached: float | None


def read_speed(checkpoints: Sequence[Checkpoint]) -> DiskSpeed:
    """Pieces spread evenly over the weight files of the models, read one after the other until READ bytes or
    READ_SECONDS are spent. Raises InputError where a file cannot be read."""
    files = sorted({(t.file, c.role) for c in distinct(*checkpoints) for t in c.tensors.values()})
    places = [(file, role, at) for file, role in files for at in range(0, file.stat().st_size, PIECE)]
    stride = max(1, -(-len(places) // (READ // PIECE)))
    order = places[::stride]
    random.Random(0).shuffle(order)  # where the time is up first, what was read is still spread out
    buffer, done, cached, spent = memoryview(byte_buffer(PIECE)), 0, [], 0.0
    for file, role, at in order:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                cached.append(_is_cached(fd, at))
                began = time.perf_counter()
                done += os.preadv(fd, [buffer], at)
                spent += time.perf_counter() - began
            finally:
                os.close(fd)
        except OSError as error:
            raise InputError(f"{role}: {file}: cannot be read: {error.strerror}. Download it again, or check its "
                             "permissions and the disk") from None
        if spent > READ_SECONDS:
            break
    known = [c for c in cached if c is not None]
    return DiskSpeed(done / max(spent, 1e-9), done, sum(known) / len(known) if known else None)


def _is_cached(fd: int, at: int) -> bool | None:
    """Whether a byte is in the page cache; None where that cannot be asked. Does not read from the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        return os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return None


def write_speed(folder: Path, room: int) -> DiskSpeed | None:
    """A file without a name in `folder`, written and synced; at most WRITE bytes and a tenth of `room`.

    Nobody sees it, the folder's times stay as they are, and it is gone with this process whatever happens. None where
    the file system has no such files, or does not let us write.
    """
    size = min(WRITE, room // 10) // PIECE * PIECE
    block, done = os.urandom(PIECE), 0  # a file system may leave zeros out, or compress them
    if not size or not hasattr(os, "O_TMPFILE"):
        return None
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        began = time.perf_counter()
        while done < size and time.perf_counter() - began < WRITE_SECONDS:
            done += os.write(fd, block)
        os.fsync(fd)
        return DiskSpeed(done / (time.perf_counter() - began), done, None)
    except OSError:
        return None
    finally:
        os.close(fd)
