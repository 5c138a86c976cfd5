"""The output checkpoint: every shard at its full size and with its header first, then each tensor put at its offset.

All shapes are known from the input headers, so no shard is ever buffered: memory is the one tensor in hand, and a full
disk shows before the work begins. Nothing has its final name until all of it is on the disk; the index (or the only
shard) is renamed last. What a killed writer leaves, the next one clears (claim.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, ResourceError, listed
from ..memory import format_size
from .checkpoint import INDEX, Checkpoint
from .claim import STATE, Claim
from .disk import pieces, reserve, start_writeback, sync_folder
from .header import TensorInfo, encode_header, tensor_bytes
from .shards import OutTensor, plan_shards

if TYPE_CHECKING:
    import torch

_LARGE = 1 << 18  # bytes worth a system call of their own


class CheckpointWriter:
    """Writes one checkpoint into `out`. A context manager: leaving it without `finish` removes all that it created,
    or leaves it for a later run to go on with where `keep()` was called. What a checkpoint's own check finds after
    `finish`, before the manager is left, still undoes it.

    `go_on(folder)` is asked once OUT, where an earlier writer left unfinished files, is locked; `folder` is
    OUT/.streammerge. It returns the names of the tensors that are in place, or None to begin anew.

    `files` are the final names, `bytes_written` the bytes handed to the kernel so far. What writes
    tensors may be called from several threads, which must have ended before `finish` or `abort`. Raises InputError
    where `out` cannot be used, ResourceError where the disk cannot.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[OutTensor],
        shard_bytes: int,
        go_on: Callable[[Path], set[str] | None] = lambda folder: None,
    ) -> None:
        self.out, self.bytes_written = Path(out), 0
        self._tensors = {t.name: t for t in tensors}
        if len(self._tensors) < len(tensors) or "__metadata__" in self._tensors or shard_bytes <= 0:
            raise ValueError("tensor names must be unique and none '__metadata__', shard_bytes must be positive")
        self._place: dict[str, tuple[str, int]] = {}  # tensor -> file name, offset
        headers: dict[str, tuple[bytes, int]] = {}  # file name -> first bytes, full size
        for name, members in plan_shards(tensors, shard_bytes).items():
            raw, offsets = encode_header([(t.name, t.dtype, tuple(t.shape)) for t in members])
            headers[name] = raw, len(raw) + sum(tensor_bytes(t.dtype, t.shape) for t in members)
            self._place |= {tensor: (name, offset) for tensor, offset in offsets.items()}
        self._shards, self._side = list(headers), []
        self._fds: dict[str, int] = {}
        self._left: dict[str, int] = {}  # tensor that is filled by pieces -> bytes still to come
        self._done: dict[str, bool] = {}  # tensor -> False while it is being written, then True
        self._mutex, self._claim, self._open = threading.Lock(), Claim(self.out), True
        self._needed, self._free = sum(size for _, size in headers.values()), 0
        self._kept, placed = False, None

        def ask() -> bool:
            nonlocal placed
            placed = go_on(self.out / STATE)
            return placed is not None

        try:
            with self._guard(self.out):
                self._kept = self._claim.acquire(ask)
            self._allocate(headers)
            self._done = dict.fromkeys(placed or (), True)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> list[str]:
        """Final names in the order in which they appear; the last one makes the checkpoint loadable."""
        return self._side + self._shards + ([INDEX] if len(self._shards) > 1 else [])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a CPU tensor of any contiguity in place, in any order; a non-contiguous one is copied once."""
        import torch

        from .header import TORCH_DTYPES

        code = next((c for c, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
        file, offset = self._start(name, code, tensor.shape, tensor.device.type)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._put(file, memoryview(raw.numpy()), offset)
        self._done[name] = True

    def copy(self, name: str, source: Checkpoint) -> None:
        """Copy a tensor's bytes from a checkpoint, inside the kernel where it can, else through one small buffer."""
        info = source.tensors[name]
        file, offset = self._start(name, info.dtype, info.shape, "cpu")
        if name in source.encoded or not self._copy_in_kernel(file, offset, source.descriptor(name), info):
            for piece in source.chunks(name):
                self._put(file, piece, offset)
                offset += len(piece)
        self._done[name] = True

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Announce a tensor that `put` fills piece by piece: every byte once, in any order."""
        self._start(name, dtype, shape, "cpu")
        self._left[name] = tensor_bytes(dtype, shape)
        self._filled(name, 0)

    def put(self, name: str, data: memoryview, offset: int) -> None:
        """Put bytes of a tensor that was begun at a byte offset inside it. ValueError outside of the tensor: a bug."""
        wanted = self._tensors.get(name)
        size = tensor_bytes(wanted.dtype, wanted.shape) if wanted else 0
        if not self._open or name not in self._left or offset < 0 or offset + len(data) > size:
            raise ValueError(f"{name}: not begun, or bytes {offset} to {offset + len(data)} are outside of its {size}")
        file, start = self._place[name]
        self._put(file, data, start + offset)
        self._filled(name, len(data))

    def _filled(self, name: str, nbytes: int) -> None:
        with self._mutex:
            self._left[name] -= nbytes
            self._done[name] = self._left[name] == 0

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Add a side file (config, tokenizer, report …) under a plain name; it is on the disk when this returns."""
        plain = Path(name).name == name and "\n" not in name and not name.endswith(".partial")
        if not plain or name in (*self.files, INDEX, STATE, "", ".."):
            raise ValueError(f"{name!r} is no plain file name, or is taken: {self.files}")
        self._create(name)
        self._side.append(name)
        if isinstance(content, bytes):
            self._put(name, memoryview(content), 0)
        else:
            for offset, piece in pieces(content):
                self._put(name, memoryview(piece), offset)
        self._sync(name)

    def finish(self) -> None:
        """Make the checkpoint appear: fsync, then final names, the index last. ValueError lists unwritten tensors."""
        missing = [n for n in self._tensors if not self._done.get(n)]
        if missing:
            raise ValueError(listed(f"{self.out}: {len(missing)} planned tensors were never written:", missing))
        for name in self._shards:
            self._sync(name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": sum(tensor_bytes(t.dtype, t.shape) for t in self._tensors.values())},
                     "weight_map": {t: self._place[t][0] for t in sorted(self._place)}}
            self._create(INDEX)
            self._put(INDEX, memoryview((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()), 0)
            self._sync(INDEX)
        with self._guard(self.out):
            *others, last = self.files
            for name in self.files:
                self._claim.record(name)
            for name in others:
                os.rename(self._partial(name), self.out / name)
            sync_folder(self.out)  # even a power cut must not keep the last name and lose another
            os.rename(self._partial(last), self.out / last)
            sync_folder(self.out)
            sync_folder(self.out.absolute().parent)
        self._open = False

    def placed(self) -> list[str]:
        """Names of the tensors whose every byte was written."""
        with self._mutex:
            return [name for name, done in self._done.items() if done]

    def keep(self) -> None:
        """From now on an error leaves what was written, for a later run to go on with."""
        self._kept = True

    def flush(self) -> None:
        """What was written so far is on the disk."""
        for file, fd in list(self._fds.items()):
            with self._guard(self._partial(file)):
                os.fdatasync(fd)

    def note(self, name: str) -> Path:
        """The path of a file that somebody else is about to create in OUT: it goes with the rest on an error."""
        with self._guard(self.out / name):
            self._claim.record(name)
        return self.out / name

    def abort(self) -> None:
        """Remove every file and directory that this writer created. Does nothing after `finish` or a second time."""
        if self._open:
            self._discard()

    def _discard(self) -> None:
        self._open = False
        while self._fds:
            os.close(self._fds.popitem()[1])
        self._claim.release(discard=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and not self._open:
            self._claim.release(discard=False)
        elif kind is not None and self._kept and not getattr(kind, "final", False):
            self._open = False
            while self._fds:
                os.close(self._fds.popitem()[1])
            self._claim.suspend()
        else:
            self._discard()

    def _start(self, name: str, dtype: str, shape: Sequence[int], device: str) -> tuple[str, int]:
        """Check a tensor against the plan and mark it as begun -> (file name, byte offset). ValueError: a bug."""
        if not self._open:
            raise ValueError(f"{name}: the writer of {self.out} is closed")
        wanted = self._tensors.get(name)
        if wanted is None or (wanted.dtype, tuple(wanted.shape), "cpu") != (dtype, tuple(shape), device):
            raise ValueError(f"{name}: planned is {wanted}, got {dtype} {list(shape)} on {device}")
        with self._mutex:
            if name in self._done:
                raise ValueError(f"{name}: written twice")
            self._done[name] = False
        return self._place[name]

    def _allocate(self, headers: dict[str, tuple[bytes, int]]) -> None:
        """Create all shards at their full size, headers included: a disk that is too small shows here."""
        if self._kept:
            self._claim.retain({f"{name}{end}" for name in headers for end in ("", ".partial")})
        self._free = shutil.disk_usage(self.out).free
        if self._needed > self._free and not self._kept:
            raise ResourceError(self._disk_full(self.out))
        for name, (raw, size) in headers.items():
            if self._kept:
                self._adopt(name, raw, size)
                continue
            self._create(name)
            with self._guard(self._partial(name)):
                reserve(self._fds[name], size)
            self._put(name, memoryview(raw), 0)

    def _adopt(self, name: str, raw: bytes, size: int) -> None:
        """Take over a shard that an earlier run began, or had already given its final name."""
        partial, final = self._partial(name), self.out / name
        with self._guard(partial):
            if final.exists() and not partial.exists():
                os.rename(final, partial)
            try:
                fd = self._fds[name] = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                fd = -1
            if fd < 0 or os.fstat(fd).st_size != size or os.pread(fd, len(raw), 0) != raw:
                raise InputError(f"{partial}: is not what the unfinished merge in {self.out} had written: something "
                                 "else has changed it. Add --restart to begin anew")

    def _partial(self, name: str) -> Path:
        return self.out / f"{name}.partial"

    def _create(self, name: str) -> None:
        with self._guard(self._partial(name)):
            self._claim.record(f"{name}.partial")
            self._fds[name] = os.open(self._partial(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _put(self, file: str, data: memoryview, offset: int) -> None:
        with self._guard(self._partial(file)):
            done = 0
            while done < len(data):
                done += os.pwrite(self._fds[file], data[done:], offset + done)
        self._count(file, offset, len(data))

    def _copy_in_kernel(self, file: str, offset: int, source: int, info: TensorInfo) -> bool:
        """copy_file_range from the descriptor `source`; False where it cannot: reading and writing then says why."""
        done, target = 0, self._fds[file]
        while done < info.nbytes:
            try:
                count = os.copy_file_range(source, target, info.nbytes - done, info.start + done, offset + done)
            except (OSError, AttributeError):
                return False
            if count == 0:
                return False
            done += count
        self._count(file, offset, done)
        return True

    def _count(self, file: str, offset: int, nbytes: int) -> None:
        with self._mutex:
            self.bytes_written += nbytes
        if nbytes >= _LARGE:
            start_writeback(self._fds[file], offset, nbytes)

    def _sync(self, file: str) -> None:
        """The file's bytes are on the disk, its descriptor is closed."""
        with self._guard(self._partial(file)):
            os.fsync(self._fds[file])
            os.close(self._fds.pop(file))

    @contextlib.contextmanager
    def _guard(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(self._disk_full(file)) from error
            raise ResourceError(f"{file}: cannot be written: {error.strerror}. Check the disk and its permissions, or "
                                "choose another output directory") from error

    def _disk_full(self, file: Path) -> str:
        return (f"{file}: not enough disk: the weights need {format_size(self._needed)} ({self._needed} bytes), "
                f"{format_size(self._free)} ({self._free} bytes) were free at the start. Free some space, or choose an "
                "output directory on another disk")
