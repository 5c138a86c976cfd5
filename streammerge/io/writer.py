"""The output checkpoint: every shard at its full size and with its header first, then each tensor put at its offset.

All shapes are known from the input headers, so no shard is ever buffered: memory is the one tensor in hand, and a full
disk shows before the work begins. Nothing has its final name until all of it is on the disk; the index (or the only
shard) is renamed last. What a killed writer leaves, the next one clears (claim.py).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, ResourceError, listed
from .checkpoint import INDEX, Checkpoint
from .claim import STATE, Claim
from .disk import pieces, reserve, sync_folder
from .header import encode_header, tensor_bytes
from .partial import Partials
from .shards import OutTensor, plan_shards

if TYPE_CHECKING:
    import torch


class CheckpointWriter:
    """Writes one checkpoint into `out`. A context manager: leaving it without `finish` removes all that it created,
    or leaves it for a later run to go on with where `keep()` was called. What a checkpoint's own check finds after
    `finish`, before the manager is left, still undoes it.

    `go_on(folder)` is asked once OUT, where an earlier writer left unfinished files, is locked; `folder` is
    OUT/.streammerge. It returns the names of the tensors that are in place, or None to begin anew.

    `files` are the final names. What writes tensors may be called from several threads, which must have ended before
    `finish` or `abort`. Raises InputError where `out` cannot be used, ResourceError where the disk cannot.
    """

    def __init__(
        self,
        out: Path,
        tensors: Sequence[OutTensor],
        shard_bytes: int,
        go_on: Callable[[Path], set[str] | None] = lambda folder: None,
    ) -> None:
        self.out = Path(out)
        self._tensors = {t.name: t for t in tensors}
        self._sizes = {t.name: tensor_bytes(t.dtype, t.shape) for t in tensors}
        if len(self._tensors) < len(tensors) or "__metadata__" in self._tensors or shard_bytes <= 0:
            raise ValueError("tensor names must be unique and none '__metadata__', shard_bytes must be positive")
        self._place: dict[str, tuple[str, int]] = {}  # tensor -> file name, offset
        self._headers: dict[str, bytes] = {}  # file name -> first bytes
        sizes: dict[str, int] = {}
        for name, members in plan_shards(tensors, shard_bytes).items():
            raw, offsets = encode_header([(t.name, t.dtype, tuple(t.shape)) for t in members])
            self._headers[name], sizes[name] = raw, len(raw) + sum(self._sizes[t.name] for t in members)
            self._place |= {tensor: (name, offset) for tensor, offset in offsets.items()}
        self._shards, self._side = list(sizes), []
        self._files = Partials(self.out, sum(sizes.values()))
        self._left: dict[str, int] = {}  # tensor that is filled by pieces -> bytes still to come
        self._done: dict[str, bool] = {}  # tensor -> False while it is being written, then True
        self._mutex, self._claim, self._open = threading.Lock(), Claim(self.out), True
        self._kept, placed = False, None

        def ask() -> bool:
            nonlocal placed
            placed = go_on(self.out / STATE)
            return placed is not None

        try:
            with self._files.guard(self.out):
                self._kept = self._claim.acquire(ask)
            self._allocate(sizes)
            self._done = dict.fromkeys(placed or (), True)
        except BaseException:
            self.abort()
            raise

    @property
    def files(self) -> list[str]:
        """Final names in the order in which they appear; the last one makes the checkpoint loadable."""
        return self._side + self._shards + ([INDEX] if len(self._shards) > 1 else [])

    @property
    def bytes_written(self) -> int:
        """Bytes handed to the kernel so far."""
        return self._files.bytes_written

    @property
    def layout(self) -> dict[str, tuple[bytes, dict[str, int]]]:
        """{shard: its first bytes, {tensor: its size in bytes} in the file's order}."""
        found = {file: (raw, {}) for file, raw in self._headers.items()}
        for name, (file, _) in self._place.items():
            found[file][1][name] = self._sizes[name]
        return found

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a CPU tensor of any contiguity in place, in any order; a non-contiguous one is copied once."""
        import torch

        from .header import TORCH_DTYPES

        code = next((c for c, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
        file, offset = self._start(name, code, tensor.shape, tensor.device.type)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._files.put(file, memoryview(raw.numpy()), offset)
        self._done[name] = True

    def copy(self, name: str, source: Checkpoint) -> None:
        """Copy a tensor's bytes from a checkpoint, inside the kernel where it can, else through one small buffer."""
        info = source.tensors[name]
        file, offset = self._start(name, info.dtype, info.shape, "cpu")
        if name in source.encoded or not self._files.copy(file, offset, source.descriptor(name), info):
            for piece in source.chunks(name):
                self._files.put(file, piece, offset)
                offset += len(piece)
        self._done[name] = True

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Announce a tensor that `put` fills piece by piece: every byte once, in any order."""
        self._start(name, dtype, shape, "cpu")
        self._left[name] = self._sizes[name]
        self._filled(name, 0)

    def put(self, name: str, data: memoryview, offset: int) -> None:
        """Put bytes of a tensor that was begun at a byte offset inside it. ValueError outside of the tensor: a bug."""
        size = self._sizes[name] if name in self._left else 0
        if not self._open or name not in self._left or offset < 0 or offset + len(data) > size:
            raise ValueError(f"{name}: not begun, or bytes {offset} to {offset + len(data)} are outside of its {size}")
        file, start = self._place[name]
        self._files.put(file, data, start + offset)
        self._filled(name, len(data))

    def read_back(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view` with bytes of a tensor that is in place, from a byte offset inside it."""
        file, start = self._place[name]
        self._files.read(file, view, start + offset)

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
            self._files.put(name, memoryview(content), 0)
        else:
            for offset, piece in pieces(content):
                self._files.put(name, memoryview(piece), offset)
        self._files.sync(name)

    def finish(self) -> None:
        """Make the checkpoint appear: fsync, then final names, the index last. ValueError lists unwritten tensors."""
        missing = [n for n in self._tensors if not self._done.get(n)]
        if missing:
            raise ValueError(listed(f"{self.out}: {len(missing)} planned tensors were never written:", missing))
        for name in self._shards:
            self._files.sync(name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": sum(self._sizes.values())},
                     "weight_map": {t: self._place[t][0] for t in sorted(self._place)}}
            self._create(INDEX)
            self._files.put(INDEX, memoryview((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()), 0)
            self._files.sync(INDEX)
        with self._files.guard(self.out):
            *others, last = self.files
            for name in self.files:
                self._claim.record(name)
            for name in others:
                os.rename(self._files.path(name), self.out / name)
            sync_folder(self.out)  # even a power cut must not keep the last name and lose another
            os.rename(self._files.path(last), self.out / last)
            sync_folder(self.out)
            sync_folder(self.out.absolute().parent)
        self._open = False

    def placed(self) -> list[str]:
        """Names of the tensors whose every byte was written."""
        with self._mutex:
            return [name for name, done in self._done.items() if done]

    def keep(self, kept: bool = True) -> None:
        """From now on an error leaves what was written, for a later run to go on with; or does not, where nothing was
        saved to go on from."""
        self._kept = kept

    def flush(self) -> None:
        """What was written so far is on the disk."""
        self._files.flush()

    def note(self, name: str) -> Path:
        """The path of a file that somebody else is about to create in OUT: it goes with the rest on an error."""
        with self._files.guard(self.out / name):
            self._claim.record(name)
        return self.out / name

    def abort(self) -> None:
        """Remove every file and directory that this writer created. Does nothing after `finish` or a second time."""
        if self._open:
            self._discard()

    def _discard(self) -> None:
        self._open = False
        self._files.close()
        self._claim.release(discard=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and not self._open:
            self._claim.release(discard=False)
        elif kind is not None and self._kept and not getattr(kind, "final", False):
            self._open = False
            self._files.close()
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

    def _allocate(self, sizes: dict[str, int]) -> None:
        """Create all shards at their full size, headers included: a disk that is too small shows here."""
        files = self._files
        if self._kept:
            self._claim.retain({f"{name}{end}" for name in sizes for end in ("", ".partial")})
        files.free = shutil.disk_usage(self.out).free
        if files.needed > files.free and not self._kept:
            raise ResourceError(files.disk_full(self.out))
        for name, size in sizes.items():
            raw = self._headers[name]
            if self._kept:
                if not files.adopt(name, raw, size):
                    raise InputError(f"{files.path(name)}: is not what the unfinished merge in {self.out} had written: "
                                     "something else has changed it. Add --restart to begin anew")
                continue
            fd = self._create(name)
            with files.guard(files.path(name)):
                reserve(fd, size)
            files.put(name, memoryview(raw), 0)

    def _create(self, name: str) -> int:
        with self._files.guard(self._files.path(name)):
            self._claim.record(f"{name}.partial")
        return self._files.create(name)
