"""The safetensors header, read strictly and written in one fixed form.

A file is 8 bytes of length (little endian), a JSON header of that length, then the tensors' bytes without gaps. The
reader trusts nothing: a header that lies about one offset would hand the wrong weights to a merge, which no later
check could see. It collects everything that is wrong instead of stopping at the first problem. The writer is our own
because safetensors orders several metadata keys at random and takes the tensors, not their shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..memory import format_size

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own bound

_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
# older torch lacks some of the small floats: a checkpoint that holds them is then refused by name, not misread
TORCH_DTYPES: dict[str, torch.dtype] = {c: getattr(torch, t) for c, t in _CODES.items() if hasattr(torch, t)}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is the absolute byte offset in `file`, `dtype` the safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor with this safetensors dtype code and shape."""
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def strict_json(raw: bytes) -> dict[str, Any]:
    """Bytes -> JSON object. ValueError (with the reason) for a duplicate key, bad UTF-8 or anything but an object."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} appears twice")
            seen[key] = value
        return seen

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_header(file: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """One safetensors file -> {tensor name: where it lies}, in the header's order.

    Appends one line to `problems` for everything that is wrong; what it returns is to be used only if it added none.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > HEADER_LIMIT or 8 + length > size:
                problems.append(_bad_length(file.name, size, prefix, length))
                return {}
            header = strict_json(stream.read(length))
    except OSError as error:
        problems.append(f"{file.name}: cannot be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(f"{file.name}: its header is not valid JSON: {error}: download it again")
        return {}
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{file.name}: __metadata__ must map strings to strings, found {str(metadata)[:80]}")
    before = len(problems)
    tensors = {name: _entry(file, name, entry, 8 + length, problems) for name, entry in header.items()}
    if len(problems) > before:  # the layout of entries that do not parse says nothing
        return {}
    _check_layout(file.name, list(tensors.values()), 8 + length, size, problems)
    return tensors


def _bad_length(name: str, size: int, prefix: bytes, length: int) -> str:
    if len(prefix) < 8:
        return f"{name}: is {size} bytes long, too short for a safetensors file: download it again"
    if length > HEADER_LIMIT:
        return (f"{name}: its first 8 bytes promise a header of {format_size(length)}, more than the limit of "
                f"{format_size(HEADER_LIMIT)}: this is not a safetensors file (an HTML page or a Git LFS pointer?)")
    return f"{name}: ends after {size} bytes, within its header of {length} bytes: download it again"


def _entry(file: Path, name: str, entry: Any, base: int, problems: list[str]) -> TensorInfo | None:
    """One header entry, checked on its own; `base` is the file offset of the first tensor byte."""

    def wrong(what: str) -> None:
        problems.append(f"{file.name}: tensor {name!r}: {what}")

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    if any("\ud800" <= c <= "\udfff" for c in name):
        return wrong("its name is not valid Unicode")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = sorted(entry) if isinstance(entry, dict) else entry
        return wrong(f"wants the keys dtype, shape and data_offsets, found {str(found)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        return wrong(f"unknown dtype {str(dtype)[:40]!r}, known are {', '.join(TORCH_DTYPES)}")
    if not naturals(shape):
        return wrong(f"the shape must be a list of integers >= 0, found {str(shape)[:80]}")
    if not naturals(offsets) or len(offsets) != 2:
        return wrong(f"data_offsets must be two integers >= 0, found {str(offsets)[:80]}")
    begin, end = offsets
    if begin > end:
        return wrong(f"data_offsets begin at {begin}, after their end {end}")
    wanted = tensor_bytes(dtype, shape)
    if end - begin != wanted:
        return wrong(f"{dtype} {shape} takes {wanted} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), file, base + begin, wanted)


def _check_layout(name: str, tensors: list[TensorInfo], base: int, size: int, problems: list[str]) -> None:
    """No overlap, no hole, and the last tensor ends exactly where the file does. `base`, `size`: file offsets."""
    position, previous = base, "the header"
    for info in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if info.start < position:
            problems.append(f"{name}: tensor {info.name!r} overlaps {previous} by {position - info.start} bytes")
        elif info.start > position:
            problems.append(f"{name}: a hole of {info.start - position} bytes before tensor {info.name!r}")
        if info.start + info.nbytes >= position:
            position, previous = info.start + info.nbytes, f"tensor {info.name!r}"
    if size < position:
        problems.append(f"{name}: shard ends after {size} bytes, its header promises {position}: download it again")
    elif size > position:
        problems.append(f"{name}: holds {size} bytes, its header accounts for {position} only: download it again")


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """(name, dtype code, shape) in file order -> (the file's first bytes, {name: absolute offset of its data}).

    The only metadata is {"format": "pt"}, which transformers insists on. The header is padded with spaces to a
    multiple of 8 bytes, so that tensors ordered from wide to narrow dtypes are all aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name], position = position, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"a header of {len(text)} bytes: no reader takes more than {HEADER_LIMIT}, use smaller shards")
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: len(raw) + offset for name, offset in offsets.items()}
