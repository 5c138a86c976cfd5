"""A checkpoint on disk: found, validated on its headers alone, then read tensor by tensor.

Opening costs the headers (kilobytes); nothing of a weight is read before all of the checkpoint's problems have been
collected into one error. Reading uses pread into a buffer that this process owns: mapped pages would count as resident
memory and the bound that the plan promised would not hold. It never touches the network and never runs code that a
checkpoint brings along.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError, listed
from . import header
from .disk import byte_buffer
from .header import ITEM_BYTES, TensorInfo, read_header, read_json
from .hub import CODE, OTHER_WEIGHTS, PICKLES, resolve_model
from .refusals import GGUF

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .header import TORCH_DTYPES

__all__ = ["TORCH_DTYPES", "TensorInfo", "Checkpoint", "open_checkpoint", "resolve_model", "side_files"]

INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".index.json", ".onnx_data", *OTHER_WEIGHTS)
_CARDS = ("readme", "modelcard", "model_card")
_STALE = ("streammerge_", "mergekit_config", "sha256sums")  # they describe another checkpoint's files


def __getattr__(name: str) -> Any:
    """TORCH_DTYPES, which imports torch at its first use (header.py)."""
    if name != "TORCH_DTYPES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return header.TORCH_DTYPES


class _Files:
    """Read-only descriptors, one a file, opened at first use and kept: reopening by name could find another file."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._open[file]

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    __del__ = close


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `role` is its recipe key, `tensors` is sorted by name, `config` is config.json."""

    path: Path
    role: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    _files: _Files = field(default_factory=_Files, repr=False, compare=False)
    config_name: ClassVar[str] = "config.json"
    encoded: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # tensors whose bytes on disk are others (encoded.py)
    rewritten: ClassVar[Mapping[str, bytes]] = MappingProxyType({})  # side files that the output has otherwise

    @cached_property
    def sides(self) -> list[Path]:
        """`side_files`, as they were at the first look: one that vanishes later is missed."""
        return side_files(self.path)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU in its stored dtype; holds that one tensor. InputError if the file changed."""
        info = self.tensors[name]
        raw = byte_buffer(info.nbytes)
        self._fill(memoryview(raw), info, 0)
        return _tensor(raw, info.dtype, info.shape)

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view`, a writable buffer of bytes, with the tensor's bytes from `offset` on. InputError if the file
        changed. May be called from several threads."""
        info = self.tensors[name]
        if offset < 0 or offset + len(view) > info.nbytes:
            raise ValueError(f"{name}: bytes {offset} to {offset + len(view)} of {info.nbytes}")
        self._fill(view, info, offset)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a 2-D tensor: [rows, cols] on disk, `rows` int64 [n] in any order, repeats allowed -> [n, cols].

        Each row that is asked for is read once, neighbours in one call. InputError for a row that does not exist.
        """
        import torch

        info = self.tensors[name]
        if len(info.shape) != 2 or rows.dim() != 1:
            raise ValueError(f"{name}: read_rows wants a 2-D tensor and 1-D rows, got {info.shape}, {rows.dim()}-D")
        unique, inverse = torch.unique(rows, return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= info.shape[0]):
            raise InputError(f"{self.role}: {info.file}: row {int(unique[-1] if unique[0] >= 0 else unique[0])} of "
                             f"{name!r} is asked for, it has {info.shape[0]} rows: use the tokenizer of this model")
        width = info.shape[1] * ITEM_BYTES[info.dtype]
        raw = byte_buffer(len(unique) * width)
        view, wanted, begin = memoryview(raw), unique.tolist(), 0
        for i in range(1, len(wanted) + 1):
            if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
                self._fill(view[begin * width : i * width], info, wanted[begin] * width)
                begin = i
        found = _tensor(raw, info.dtype, (len(unique), info.shape[1]))
        return found if torch.equal(unique, rows) else found[inverse]

    def chunks(self, name: str, nbytes: int = 8 << 20) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most `nbytes` at a time; every piece is a view of one reused buffer."""
        info = self.tensors[name]
        buffer = memoryview(byte_buffer(min(nbytes, info.nbytes)))
        for offset in range(0, info.nbytes, nbytes):
            piece = buffer[: min(nbytes, info.nbytes - offset)]
            self._fill(piece, info, offset)
            yield piece

    def descriptor(self, name: str) -> int:
        """The open file descriptor that holds the tensor (do not close it, do not seek). InputError if it is gone."""
        info = self.tensors[name]
        try:
            return self._files.descriptor(info.file)
        except OSError as error:
            raise self._changed(info, f"cannot be opened: {error.strerror}") from error

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        """Fill `view` with the tensor's bytes from `offset` on. One call may return less: 2 GiB is a kernel limit."""
        done, fd = 0, self.descriptor(info.name)
        while done < len(view):
            try:
                count = os.preadv(fd, [view[done:]], info.start + offset + done)
            except OSError as error:
                raise self._changed(info, f"cannot be read: {error.strerror}") from error
            if count == 0:
                raise self._changed(info, f"ends at byte {info.start + offset + done}, "
                                          f"the tensor reaches to byte {info.start + info.nbytes}")
            done += count

    def _changed(self, info: TensorInfo, what: str) -> InputError:
        return InputError(f"{self.role}: {info.file}: tensor {info.name!r}: the file {what}. Its header was fine when "
                          "the merge began: is something else changing the checkpoint? Download it again")

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tensor(raw: np.ndarray, code: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes as a tensor that keeps them."""
    import torch

    dtype = header.TORCH_DTYPES[code]
    return torch.from_numpy(raw).view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def open_checkpoint(path: Path, role: str) -> Checkpoint:
    """Read the headers of a checkpoint's directory; holds no weight. InputError lists all that is wrong with it."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{role}: {path}: no such directory, wanted one with config.json and .safetensors files")
    problems: list[str] = []
    found = examine(path, role, problems)
    if problems:
        raise InputError(listed(f"{role}: the checkpoint {path} cannot be used:", problems,
                                "Nothing was read beyond the headers, nothing was written."))
    return found


def examine(path: Path, role: str, problems: list[str]) -> Checkpoint:
    """`open_checkpoint` that adds a line to `problems` for all that is wrong, beginning with the file's name; what it
    returns is whole only if there is none."""
    config = _read_config(path, problems)
    weight_map, files = _find_shards(path, problems)
    tensors: dict[str, TensorInfo] = {}
    listed_in: dict[str, list[str]] = {}
    for tensor, shard in (weight_map or {}).items():
        listed_in.setdefault(shard, []).append(tensor)
    for name in files:
        missing = bad_file(path, name)
        if missing:
            problems.append(missing)
            continue
        before = len(problems)
        found = read_header(path / name, problems)
        if len(problems) > before:
            continue  # a broken header would make every one of its names a second problem
        for tensor, info in found.items():
            if tensor in tensors:
                problems.append(f"{name}: tensor {tensor!r} is also in {tensors[tensor].file.name}")
            elif weight_map is not None and tensor not in weight_map:
                problems.append(f"{name}: tensor {tensor!r} is missing from {INDEX}")
            tensors[tensor] = info
        for tensor in listed_in.get(name, ()):
            if tensor not in found:
                problems.append(f"{INDEX}: tensor {tensor[:200]!r} is not in {name}, where the index puts it")
    if not tensors and files and not problems:
        problems.append(f"{files[0]}: holds no tensor at all")
    return Checkpoint(path, role, dict(sorted(tensors.items())), config)


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    bad = bad_file(path, "config.json")
    if bad:
        problems.append(bad)
        return {}
    try:
        return read_json(path / "config.json")
    except (OSError, ValueError) as error:
        problems.append(f"config.json: is not valid JSON: {error}")
        return {}


def _find_shards(path: Path, problems: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """-> (the index's {tensor: shard} or None without an index, the files to read). transformers' order of search."""
    if os.path.lexists(path / "model.safetensors"):
        return None, ["model.safetensors"]
    if os.path.lexists(path / INDEX):
        return _read_index(path, problems)
    names = sorted(p.name for p in path.iterdir())
    found = [n for n in names if n.endswith(".safetensors")]
    pickles = [n for n in names if n.endswith(PICKLES)]
    part = re.search(r"-of-0*(\d+)\.safetensors$", found[0]) if found else None
    if len(found) == 1 and not (part and int(part[1]) > 1):
        return None, found
    if found:
        problems.append(f"{INDEX}: is missing, and there is no model.safetensors, only {', '.join(found[:4])}: "
                        "download the index")
    elif any(n.endswith(".gguf") for n in names):
        problems.append(f"{next(n for n in names if n.endswith('.gguf'))}: {GGUF}")
    elif pickles:
        problems.append(f"only pickled weights ({', '.join(pickles[:3])}), which can run code when loaded: load the "
                        "model in transformers and save it with save_pretrained(DIR, safe_serialization=True)")
    else:
        problems.append("no .safetensors file in it: is this the directory of a model?")
    return None, []


def _read_index(path: Path, problems: list[str]) -> tuple[dict[str, str], list[str]]:
    bad = bad_file(path, INDEX)
    if bad:
        problems.append(bad)
        return {}, []
    try:
        weight_map = read_json(path / INDEX).get("weight_map")
    except (OSError, ValueError) as error:
        problems.append(f"{INDEX}: is not valid JSON: {error}")
        return {}, []
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        problems.append(f"{INDEX}: weight_map must map tensor names to file names")
        return {}, []
    return weight_map, sorted(set(weight_map.values()))


def bad_file(path: Path, name: str) -> str | None:
    """Why `name` is no file of this directory (a line for the user), or None if it is.

    A link may lead only where the Hub cache leads its own: to the blobs of the same model, or to the store that all
    models of one cache share. Anything else could pull a private file into a published merge.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable() or len(name) > 255:
        return f"{name[:255]!r}: the name leaves the directory, or is none: this checkpoint is broken or hostile"
    file, home = path / name, path.resolve()
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):
        return f"{name}: is missing: download the checkpoint again"
    if not target.is_file():
        return f"{name}: is not a regular file"
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed += [home.parent.parent / "blobs", home.parent.parent.parent / "blobs"]
    if not any(target.is_relative_to(a) for a in allowed):
        return f"{name}: is a link that leaves the directory (to {target}): put a copy of the file in its place"
    return None


def side_files(path: Path) -> list[Path]:
    """What belongs into the output besides weights: config, generation config, tokenizer, template, licence; sorted.

    All top-level files but weights, model cards, code, hidden files and what describes other weights (checksums, our
    own report). InputError for a link that leaves the directory or leads nowhere.
    """
    kept, problems = [], []
    for file in sorted(Path(path).iterdir()):
        name = file.name.lower()
        if file.is_dir() or name.endswith((*_WEIGHTS, *CODE, ".partial")) or name.startswith((".", *_CARDS, *_STALE)):
            continue
        bad = bad_file(Path(path), file.name)
        problems += [bad] if bad else []
        kept.append(file)
    if problems:
        raise InputError(listed(f"{path}: cannot copy its files:", problems))
    return kept
