"""The unfinished files of one output directory: NAME.partial, open for writing from several threads.

What the system refuses becomes a ResourceError that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError
from ..memory import format_size
from .disk import start_writeback
from .header import TensorInfo

_STRIDE = 1 << 23  # bytes after which the disk is set to work: a system call for each of many small writes costs more


class Partials:
    """Files of `out` by their final names. `needed`: bytes that they will take, `free`: that were there at the start;
    for the error of a full disk. `bytes_written`: handed to the kernel so far."""

    def __init__(self, out: Path, needed: int) -> None:
        self.out, self.needed, self.free, self.bytes_written = out, needed, 0, 0
        self._fds: dict[str, int] = {}
        self._paths: dict[str, Path] = {}
        self._waiting: dict[str, int] = {}  # file -> bytes that the disk was not told of yet
        self._mutex = threading.Lock()

    def path(self, name: str) -> Path:
        """Where a file of this final name is, as long as it is unfinished."""
        return self._paths[name] if name in self._paths else self._paths.setdefault(name, self.out / f"{name}.partial")

    def create(self, name: str) -> int:
        """A new, empty file -> its descriptor."""
        with self.guard(self.path(name)):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = self._fds[name] = os.open(self.path(name), flags, 0o666)
        return fd

    def adopt(self, name: str, raw: bytes, size: int) -> bool:
        """Take over a file that an earlier run began, or had already given its final name. Whether there is one, of
        this size and with these first bytes."""
        partial, final = self.path(name), self.out / name
        with self.guard(partial):
            if final.exists() and not partial.exists():
                os.rename(final, partial)
            try:
                fd = self._fds[name] = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            return os.fstat(fd).st_size == size and os.pread(fd, len(raw), 0) == raw

    def put(self, name: str, data: memoryview, offset: int) -> None:
        """Write all of `data` at a byte `offset`."""
        with self.guard(self.path(name)):
            done = 0
            while done < len(data):
                done += os.pwrite(self._fds[name], data[done:], offset + done)
        self._count(name, len(data))

    def read(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view` from a byte `offset` on; all of it was written."""
        with self.guard(self.path(name)):
            done = 0
            while done < len(view):
                count = os.preadv(self._fds[name], [view[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "it has become shorter")
                done += count

    def copy(self, name: str, offset: int, source: int, info: TensorInfo) -> bool:
        """copy_file_range from the descriptor `source`; False where it cannot: reading and writing then says why."""
        done, target = 0, self._fds[name]
        while done < info.nbytes:
            try:
                count = os.copy_file_range(source, target, info.nbytes - done, info.start + done, offset + done)
            except (OSError, AttributeError):
                return False
            if count == 0:
                return False
            done += count
        self._count(name, done)
        return True

    def _count(self, name: str, nbytes: int) -> None:
        with self._mutex:
            self.bytes_written += nbytes
            waiting = self._waiting.get(name, 0) + nbytes
            self._waiting[name] = 0 if waiting >= _STRIDE else waiting
        if waiting >= _STRIDE:
            start_writeback(self._fds[name])

    def flush(self) -> None:
        """What was written so far is on the disk."""
        for name, fd in list(self._fds.items()):
            with self.guard(self.path(name)):
                os.fdatasync(fd)

    def sync(self, name: str) -> None:
        """The file's bytes are on the disk, its descriptor is closed."""
        with self.guard(self.path(name)):
            os.fsync(self._fds[name])
            os.close(self._fds.pop(name))

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    @contextlib.contextmanager
    def guard(self, file: Path) -> Iterator[None]:
        """Turn an OSError over `file` into a ResourceError."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(self.disk_full(file)) from error
            raise ResourceError(f"{file}: cannot be written: {error.strerror}. Check the disk and its permissions, or "
                                "choose another output directory") from error

    def disk_full(self, file: Path) -> str:
        return (f"{file}: not enough disk: the weights need {format_size(self.needed)} ({self.needed} bytes), "
                f"{format_size(self.free)} ({self.free} bytes) were free at the start. Free some space, or choose an "
                "output directory on another disk")
