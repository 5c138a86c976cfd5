"""The safetensors header, read strictly and written in one fixed form.

A file is 8 bytes of length (little endian), a JSON header of that length, then the tensors' bytes without gaps. The
reader trusts nothing: a header that lies about one offset would hand the wrong weights to a merge, which no later
check could see. It collects everything that is wrong instead of stopping at the first problem. The writer is our own
because safetensors orders several metadata keys at random and takes the tensors, not their shapes.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory import format_size

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own bound
JSON_LIMIT = 100_000_000  # bytes of an index or a config.json
_INT64 = 2**63  # sizes and offsets are below it in every reader
_DIMENSIONS = 64  # torch's own bound
_ENOUGH = 100  # problems of one file: the message shows twenty, and a hostile header could name millions

_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
ITEM_BYTES = dict.fromkeys(_CODES, 1) | dict.fromkeys(("F64", "C64", "I64", "U64"), 8)
ITEM_BYTES |= dict.fromkeys(("F32", "I32", "U32"), 4) | dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
_short = reprlib.Repr().repr  # of what a hostile file may make as long as it likes
TORCH_DTYPES: dict[str, torch.dtype]  # safetensors code -> dtype


def __getattr__(name: str) -> Any:
    """TORCH_DTYPES, at its first use: checking headers and copying bytes need no torch, which takes a second."""
    if name != "TORCH_DTYPES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    return globals().setdefault(name, {code: getattr(torch, dtype) for code, dtype in _CODES.items()})


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
    return math.prod(shape) * ITEM_BYTES[dtype]


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. ValueError for a key that is given twice: readers disagree on which
    of the two counts."""
    seen = dict(pairs)
    if len(seen) < len(pairs):
        left = dict(seen)
        twice = next(key for key, _ in pairs if left.pop(key, pairs) is pairs)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return seen


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def strict_json(raw: bytes) -> dict[str, Any]:
    """Bytes -> JSON object. ValueError (with the reason) for a duplicate key, bad UTF-8, NaN or anything but an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """`strict_json` of a file. OSError where it cannot be read, ValueError also where it is over JSON_LIMIT."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > JSON_LIMIT:
            raise ValueError(f"it holds {format_size(size)}, the limit is {format_size(JSON_LIMIT)}")
        return strict_json(stream.read(JSON_LIMIT))


def read_header(file: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """One safetensors file -> {tensor name: where it lies}, in the header's order.

    Appends one line to `problems` for everything that is wrong; what it returns is to be used only if it added none.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > HEADER_LIMIT or 8 + length > size:
                problems.append(_bad_length(file.name, size, prefix, length))
                return {}
            raw = stream.read(length)
            header = strict_json(raw)
            if not raw.startswith(b"{"):  # the safetensors library allows padding behind the object only
                raise ValueError(f"it begins with {raw[:8]!r}, wanted '{{'")
    except OSError as error:
        problems.append(f"{file.name}: cannot be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(f"{file.name}: its header is not valid JSON: {error}: download it again")
        return {}
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{file.name}: __metadata__ must map strings to strings, found {_short(metadata)}")
    before = len(problems)
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _entry(file, name, entry, 8 + length, problems)
        if len(problems) - before >= _ENOUGH:
            break
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
        problems.append(f"{file.name}: tensor {name[:200]!r}: {what}")

    def naturals(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < _INT64 for v in value)

    odd = _odd_name(name)
    if odd:
        return wrong(odd)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = sorted(entry) if isinstance(entry, dict) else entry
        return wrong(f"wants the keys dtype, shape and data_offsets, found {_short(found)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return wrong(f"unknown dtype {_short(dtype)}, known are {', '.join(ITEM_BYTES)}")
    if not naturals(shape):
        return wrong(f"the shape must be a list of integers >= 0, found {_short(shape)}")
    if len(shape) > _DIMENSIONS:
        return wrong(f"the shape has {len(shape)} dimensions, torch knows at most {_DIMENSIONS}")
    if not naturals(offsets) or len(offsets) != 2:
        return wrong(f"data_offsets must be two integers >= 0, found {_short(offsets)}")
    begin, end = offsets
    if begin > end:
        return wrong(f"data_offsets begin at {begin}, after their end {end}")
    if tensor_bytes(dtype, [n for n in shape if n]) >= _INT64:  # an empty tensor's strides must not overflow either
        return wrong(f"{dtype} {_short(shape)} is larger than any file can be")
    wanted = tensor_bytes(dtype, shape)
    if end - begin != wanted:
        return wrong(f"{dtype} {_short(shape)} takes {wanted} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), file, base + begin, wanted)


def _odd_name(name: str) -> str | None:
    """Why this is no name of a tensor, or None: it ends up in paths of modules, in messages and on terminals."""
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "its name is not valid Unicode"
    if not name or len(name) > 1000:
        return f"its name is {len(name)} characters long, wanted 1 to 1000"
    if not name.isprintable():
        return "its name holds characters that cannot be printed"
    return None


def _check_layout(name: str, tensors: list[TensorInfo], base: int, size: int, problems: list[str]) -> None:
    """No overlap, no hole, and the last tensor ends exactly where the file does. `base`, `size`: file offsets."""
    position, previous, before = base, "the header", len(problems)
    for info in sorted(tensors, key=lambda t: (t.start, t.nbytes)):
        if len(problems) - before >= _ENOUGH:
            return
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
