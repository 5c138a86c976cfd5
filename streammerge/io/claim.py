"""The right to write into one output directory, and the journal of what was created there.

The lock is a flock, which the kernel drops when its process dies however it dies, so no stale lock can block a user.
The journal is the lock file's own content: the pid, then every name that the writer is about to create. After a kill
the next writer removes exactly those names and starts over; whatever else lies in the directory is refused, never
touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from ..errors import InputError

STATE = ".streammerge"  # the one name that an output directory may hold: artifacts of an earlier, unfinished merge


class Claim:
    """Holds OUT for one writer, from `acquire` to `release`. Creates OUT, its parents and OUT/.streammerge/lock."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / STATE / "lock"
        self._fd = -1
        self._names: list[str] = []  # as in the journal
        self._folders: list[Path] = []  # created here, outermost first

    def acquire(self) -> None:
        """Create and lock OUT, clear what a killed writer left. InputError if OUT is in use or holds anything else.

        On an error nothing is left behind. OSError where the directory cannot be created or locked.
        """
        try:
            if os.path.lexists(self.out) and not self.out.is_dir():
                raise InputError(f"{self.out}: is a file, wanted a new directory: choose another name")
            self._make(self.out)
            if not self.path.exists():  # no journal: before we put a lock into somebody's directory, look at it
                self._check_empty()
            self._make(self.path.parent)
            self._lock()
            journal = os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode("utf-8", "replace").splitlines()
            if journal:
                self._unlink(journal[1:])
                self._folders.append(self.path.parent)
            self._check_empty()
            os.ftruncate(self._fd, 0)
            self._append(str(os.getpid()))
        except BaseException:
            self.release(discard=True)
            raise

    def record(self, name: str) -> None:
        """Note a name in OUT, to be called before it is created: only recorded names are ever removed."""
        self._append(name)
        self._names.append(name)

    def release(self, discard: bool) -> None:
        """Give OUT up; with `discard` remove all that was recorded and every directory that was created and is empty.

        Never raises: it runs while another error is on its way to the user. A second call does nothing.
        """
        if discard:
            self._unlink(self._names)
        self._names = []
        if self._fd >= 0:
            self._unlink([f"{STATE}/lock"])
            os.close(self._fd)
            self._fd = -1
        for folder in reversed(self._folders):
            if discard or folder == self.path.parent:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # the kernel refuses if anything is in it
        self._folders = []

    def _make(self, folder: Path) -> None:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            with contextlib.suppress(FileExistsError):
                missing.mkdir()
                self._folders.append(missing)

    def _check_empty(self) -> None:
        found = sorted(e for e in os.listdir(self.out) if e != STATE)
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise InputError(f"{self.out} is not empty: found {', '.join(found[:5])}{more}; choose a new directory")

    def _lock(self) -> None:
        while self._fd < 0:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    # its owner may have removed the file between our open and our flock: then lock the new one
                    if os.path.samestat(os.fstat(fd), self.path.stat()):
                        self._fd = fd
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                pid = os.pread(fd, 32, 0).split(b"\n")[0].decode("utf-8", "replace") or "unknown"
                raise InputError(f"another merge (pid {pid}) is writing to {self.out}: wait for it to end, or choose "
                                 "another output directory") from None
            finally:
                if self._fd != fd:
                    os.close(fd)

    def _append(self, line: str) -> None:
        os.pwrite(self._fd, f"{line}\n".encode(), os.fstat(self._fd).st_size)

    def _unlink(self, names: list[str]) -> None:
        for name in names:
            if name == f"{STATE}/lock" or Path(name).name == name:  # a journal is a file: believe only plain names
                with contextlib.suppress(OSError):
                    (self.out / name).unlink()
