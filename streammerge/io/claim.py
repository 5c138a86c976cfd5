"""The right to write into one output directory, and the journal of what was created there.

The lock is a flock, which the kernel drops when its process dies however it dies, so no stale lock can block a user.
The record is the lock file's own content: the pid, then every name that the writer is about to create. After a kill
the next writer takes over exactly those names, to go on with them or to remove them; whatever else lies in the
directory is refused, never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import InputError, Refused
from .checkpoint import Checkpoint

_ARTIFACTS = ("journal.json", "journal.json.partial", "activations-*.safetensors", ".tmp*")  # the last: a kill while
# the safetensors library saves
STATE = ".streammerge"  # the one name that an output directory may hold: artifacts of an earlier, unfinished merge

_FINISHED = "/finished"  # the record's last line once all of the merge is there: no plain name


def refuse_finished(out: Path, record: list[str]) -> None:
    """InputError where the record says that the merge in OUT had come to its end, and only its lock was left."""
    if record and record[-1] == _FINISHED:
        raise Refused(f"{out}: holds a finished merge, which was killed while it tidied up: nothing is missing "
                      f"(streammerge verify {out}); choose a new directory for another")


def refuse_inside(out: Path, models: Iterable[Checkpoint]) -> None:
    """InputError where OUT would lie among the files of one of the models: nothing is ever written there."""
    real = Path(os.path.realpath(out))
    for model in models:
        if any(real.is_relative_to(folder) for folder in _folders(model)):
            raise InputError(f"{out}: lies in {model.role} {model.path}, or in the part of the Hub cache that holds "
                             "it, in which nothing is written: choose a directory outside of the models")


def _folders(model: Checkpoint) -> Iterator[Path]:
    """The model's directory, those in which its files really lie, and all that the Hub's cache keeps of it."""
    real = Path(os.path.realpath(model.path))
    yield real
    yield from {Path(os.path.realpath(info.file)).parent for info in model.tensors.values()}
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        yield real.parent.parent


def _pid() -> bytes:
    """The record's first line, always as long: written in place it leaves the names behind it alone."""
    return str(os.getpid()).encode().ljust(20, b"\n")


class Claim:
    """Holds OUT for one writer, from `acquire` to `release`. Creates OUT, its parents and OUT/.streammerge/lock."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / STATE / "lock"
        self._fd = -1
        self._names: list[str] = []  # as in the journal
        self._folders: list[Path] = []  # created here, outermost first

    def acquire(self, go_on: Callable[[], bool] = lambda: False) -> bool:
        """Create and lock OUT. Where a writer left unfinished files, `go_on` says, under the lock, whether they are
        kept; else they are removed. Returns whether they were kept. InputError if OUT is in use or holds anything else.

        On an error nothing is left behind that was not there. OSError where OUT cannot be created or locked.
        """
        kept = False
        try:
            if os.path.lexists(self.out) and not self.out.is_dir():
                raise InputError(f"{self.out}: is a file, wanted a new directory: choose another name")
            self._make(self.out)
            if not self.path.exists():  # no journal: before we put a lock into somebody's directory, look at it
                self._check_empty()
            self._make(self.path.parent)
            self._lock()
            record = os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode("utf-8", "replace").splitlines()
            if record[-1:] == [_FINISHED]:
                self._folders = [self.path.parent]
                self.release(discard=False)
                refuse_finished(self.out, record)
            if record:
                left = [n for n in dict.fromkeys(record[1:]) if n and Path(n).name == n]  # believe plain names
                kept = self._decide(go_on)
                if kept:
                    self._names = left
                else:
                    self._unlink(left)
                    self._clear_state()
                self._folders.append(self.path.parent)
            self._check_empty()
            if kept:  # names are never rewritten: a kill in between would leave files that nobody owns
                self._append("")  # end a line that a kill has cut
                os.pwrite(self._fd, _pid(), 0)
            else:
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, _pid(), 0)
        except BaseException:
            self.release(discard=True)
            raise
        return kept

    def _decide(self, go_on: Callable[[], bool]) -> bool:
        """Ask; where the answer is an error, what was left stays as it was."""
        try:
            return go_on()
        except BaseException:
            os.close(self._fd)
            self._fd, self._folders = -1, []
            raise

    def record(self, name: str) -> None:
        """Note a name in OUT, to be called before it is created: only recorded names are ever removed."""
        self._append(name)
        self._names.append(name)

    def retain(self, names: set[str]) -> None:
        """Of the files that were taken over, remove all but these."""
        self._unlink([n for n in self._names if n not in names])
        self._names = [n for n in self._names if n in names]

    def suspend(self) -> None:
        """Give OUT up and leave everything in it, for a later writer to go on with."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._names, self._folders = -1, [], []

    def release(self, discard: bool) -> None:
        """Give OUT up; with `discard` remove all that was recorded and every directory that was created and is empty.

        Never raises: it runs while another error is on its way to the user. A second call does nothing.
        """
        if self._fd >= 0:
            if not discard:  # a kill from here on leaves a finished merge, not one to be done again
                with contextlib.suppress(OSError):
                    self._append(_FINISHED)
            self._clear_state()
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

    def _clear_state(self) -> None:
        """Remove the journal and the artifacts of an unfinished merge; nothing that is not called as they are."""
        folder = self.path.parent
        for pattern in _ARTIFACTS:
            for entry in folder.glob(pattern) if folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    entry.unlink()

    def _check_empty(self) -> None:
        found = sorted(e for e in os.listdir(self.out) if e != STATE and e not in self._names)
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
                raise Refused(f"another merge (pid {pid}) is writing to {self.out}: wait for it to end, or choose "
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
