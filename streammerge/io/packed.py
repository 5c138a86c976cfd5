"""How quantised weights are packed: their parts found by name and checked, and stretches of them decoded to fp32.

nf4 and fp4: two codes a byte, the high half first, and a scale for each block of 64 weights, which is itself in 8 bits
where it is nested. int8: a scale a row. fp8: a scale a tile. The arithmetic is bitsandbytes' own, in its order: product
by product in fp32, so that the results have its bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec import WORDS, decode
from .checkpoint import Checkpoint
from .header import ITEM_BYTES, TensorInfo, strict_json
from .refusals import advice

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_STATE_LIMIT = 1 << 16  # bytes of a quant_state, which are some hundred
_BLOCKS = {32, 64, 128, 256, 512, 1024, 2048, 4096}  # that bitsandbytes knows
_FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_127TH = np.float32(7.874015718698502e-3)  # bitsandbytes' 1/127

Read = Callable[[TensorInfo, int, int], np.ndarray]  # (tensor, first byte, bytes) -> uint8


class Unreadable(ValueError):
    """Why a tensor cannot be decoded: a line for the user."""


@dataclass(frozen=True)
class FourBit:
    """nf4 or fp4: the high half of a byte comes first; scale = quant_map[absmax] · nested_absmax + offset if nested."""

    kind: str  # nf4 or fp4
    weight: TensorInfo
    absmax: TensorInfo
    nested: TensorInfo | None
    pairs: np.ndarray  # fp32 [256, 2]: the two values of a byte
    scales: np.ndarray | None  # fp32 [256]: the nested map
    offset: np.float32
    block: int
    nested_block: int
    count: int  # elements of the weight

    def decode(self, read: Read, start: int, count: int) -> np.ndarray:
        """Elements `start` to `start + count` as fp32."""
        first, last = start // self.block, -(-(start + count) // self.block)
        begin, end = first * self.block, min(last * self.block, self.count)
        packed = np.zeros((last - first) * self.block // 2, np.uint8)
        packed[: (end + 1) // 2 - begin // 2] = read(self.weight, begin // 2, (end + 1) // 2 - begin // 2)
        wide = np.take(self.pairs, packed, axis=0).reshape(last - first, self.block)
        np.multiply(wide, self._absmax(read, first, last)[:, None], out=wide)
        return wide.reshape(-1)[start - begin :][:count]

    def _absmax(self, read: Read, first: int, last: int) -> np.ndarray:
        """Scales of the blocks `first` to `last`, fp32."""
        if self.nested is None or self.scales is None:
            return _floats(read, self.absmax, first, last)
        codes = read(self.absmax, first, last - first)
        low, high = first // self.nested_block, (last - 1) // self.nested_block + 1
        outer = np.repeat(_floats(read, self.nested, low, high), self.nested_block)
        return self.scales[codes] * outer[first - low * self.nested_block :][: last - first] + self.offset


@dataclass(frozen=True)
class Tiled:
    """int8 or fp8 in tiles of `rows` x `cols` that share a scale; int8 has whole rows, and its codes reach to 127."""

    kind: str  # int8 or fp8
    weight: TensorInfo
    scale: TensorInfo
    table: np.ndarray  # fp32 [256]: the value of a byte
    rows: int
    cols: int
    factor: np.float32 | None

    def decode(self, read: Read, start: int, count: int) -> np.ndarray:
        """Elements `start` to `start + count` as fp32."""
        width = self.weight.shape[1]
        wide = self.table[read(self.weight, start, count)]
        first, last = start // width, -(-(start + count) // width)
        tiles, low = -(-width // self.cols), first // self.rows
        scales = _floats(read, self.scale, low * tiles, ((last - 1) // self.rows + 1) * tiles).reshape(-1, tiles)
        at = 0
        for row in range(first, last):
            begin = max(start - row * width, 0)
            end = min(start + count - row * width, width)
            spread = np.repeat(scales[row // self.rows - low], self.cols)[begin:end] if tiles > 1 else scales[
                row // self.rows - low, 0]  # fmt: skip
            np.multiply(wide[at : at + end - begin], spread, out=wide[at : at + end - begin])
            at += end - begin
        return wide if self.factor is None else np.multiply(wide, self.factor, out=wide)


Found = tuple[dict[str, tuple[FourBit | Tiled, tuple[int, ...], str]], set[str], list[str]]


def bitsandbytes(stored: Checkpoint, told: Mapping[str, Any]) -> Found:
    """-> ({weight: how, its shape, its dtype code or ''}, auxiliary names, what is wrong)."""
    encoded, spare, wrong = {}, set(), []
    for name, info in stored.tensors.items():
        state = _STATE.fullmatch(name)
        try:
            if state:
                weight = state[1]
                spare |= {name} | {f"{weight}.{end}" for end in _FOUR_BIT_PARTS if f"{weight}.{end}" in stored.tensors}
                encoded[weight] = _four_bit(stored, weight, info, state[2])
            elif name.endswith(".SCB"):
                stem = name.removesuffix(".SCB")
                spare |= {name} | ({f"{stem}.weight_format"} & stored.tensors.keys())
                encoded[f"{stem}.weight"] = _int8(stored, stem, info), stored.tensors[f"{stem}.weight"].shape, ""
        except Unreadable as error:
            wrong.append(f"{info.file.name}: {error}")
    return encoded, spare, wrong


def _four_bit(stored: Checkpoint, name: str, state: TensorInfo, kind: str) -> tuple[FourBit, tuple[int, ...], str]:
    """A weight of 4 bits from its quant_state. Unreadable names what does not fit."""
    if state.nbytes > _STATE_LIMIT or state.dtype != "U8":
        raise Unreadable(f"{state.name}: {state.dtype} of {state.nbytes} bytes, wanted a short JSON text as U8")
    try:
        said = strict_json(_reader(stored)(state, 0, state.nbytes).tobytes())
    except ValueError as error:
        raise Unreadable(f"{state.name}: is not valid JSON: {error}") from None
    block, shape, dtype = said.get("blocksize"), said.get("shape"), str(said.get("dtype"))
    sizes = isinstance(shape, list) and 0 < len(shape) < 9 and all(type(n) is int and 0 < n < 2**31 for n in shape)
    if not sizes or type(block) is not int or block not in _BLOCKS or dtype not in DTYPES:
        raise Unreadable(f"{state.name}: blocksize {block!r}, shape {str(shape)[:60]} and dtype {dtype[:20]!r} are not "
                         "what bitsandbytes writes")
    count = math.prod(shape)
    blocks = -(-count // block)
    weight = _part(stored, name, None, -(-count // 2), "packed codes")
    codes = _floats(_reader(stored), _part(stored, f"{name}.quant_map", {"F32"}, 64, "16 values"), 0, 16)
    pairs = np.stack([np.repeat(codes, 16), np.tile(codes, 16)], axis=1)
    nested, scales, offset, outer = None, None, np.float32(0), 0
    if "nested_offset" in said:
        outer, shift = said.get("nested_blocksize"), said["nested_offset"]
        if type(outer) is not int or outer not in _BLOCKS or type(shift) not in (int, float) or abs(shift) > 1e30:
            raise Unreadable(f"{state.name}: nested_blocksize {str(outer)[:20]}, nested_offset {str(shift)[:20]} are "
                             "not what bitsandbytes writes")
        absmax = _part(stored, f"{name}.absmax", {"U8"}, blocks, "a byte a block")
        nested = _part(stored, f"{name}.nested_absmax", {"F32"}, 4 * -(-blocks // outer), "a number a nested block")
        values = _part(stored, f"{name}.nested_quant_map", {"F32"}, 1024, "256 values")
        scales, offset = _floats(_reader(stored), values, 0, 256), np.float32(shift)
    else:
        absmax = _part(stored, f"{name}.absmax", {"F32"}, 4 * blocks, "a number a block")
    how = FourBit(kind, weight, absmax, nested, pairs, scales, offset, block, outer, count)
    return how, tuple(shape), DTYPES[dtype]


def _int8(stored: Checkpoint, stem: str, scale: TensorInfo) -> Tiled:
    """A weight of 8 bits from its row scales. Unreadable names what does not fit."""
    weight = stored.tensors.get(f"{stem}.weight")
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
        raise Unreadable(f"{scale.name}: there is no {stem}.weight of I8 [out, in] that it scales")
    if scale.dtype != "F32" or scale.nbytes != 4 * weight.shape[0]:
        raise Unreadable(f"{scale.name}: is {scale.dtype} {list(scale.shape)}; wanted F32 [{weight.shape[0]}]")
    layout = stored.tensors.get(f"{stem}.weight_format")
    if layout is not None and layout.nbytes == 1 and _reader(stored)(layout, 0, 1)[0] != 0:
        raise Unreadable(f"{layout.name}: the codes are laid out for one kind of GPU (col32, col_turing, col_ampere): "
                         "load the model in transformers and save it again, which writes rows")
    values = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    return Tiled("int8", weight, scale, values, 1, max(weight.shape[1], 1), _127TH)


def fp8(stored: Checkpoint, told: Mapping[str, Any]) -> Found:
    """As `bitsandbytes`, for fp8 in tiles."""
    block = told.get("weight_block_size")
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return {}, set(stored.tensors), [f"config.json: {advice('fp8', told)}"]
    encoded, spare, wrong = {}, set(), []
    for name, scale in stored.tensors.items():
        if not name.endswith("_scale_inv"):
            continue
        stem = name.removesuffix(".weight_scale_inv")
        spare |= {name} | ({f"{stem}.activation_scale", f"{stem}.input_scale"} & stored.tensors.keys())
        weight = stored.tensors.get(name.removesuffix("_scale_inv"))
        if weight is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            found = "is missing" if weight is None else f"is {weight.dtype} {list(weight.shape)}"
            wrong.append(f"{scale.file.name}: {name}: the tensor that it scales {found}; wanted F8_E4M3 [out, in]")
            continue
        grid = tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True))
        if scale.shape != grid or scale.dtype not in ("F32", "BF16"):
            wrong.append(f"{scale.file.name}: {name} is {scale.dtype} {list(scale.shape)}; wanted F32 {list(grid)}, a "
                         f"scale for each {block[0]} x {block[1]} of {list(weight.shape)}")
            continue
        encoded[weight.name] = Tiled("fp8", weight, scale, e4m3(), *block, None), weight.shape, ""
    return encoded, spare, wrong


def e4m3() -> np.ndarray:
    """The fp32 value of every byte of F8_E4M3 (no infinity; 0x7F and 0xFF are NaN)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(code & 0x80, -value, value)
    value[[0x7F, 0xFF]] = np.nan
    return value.astype(np.float32)


def _part(stored: Checkpoint, name: str, dtypes: set[str] | None, nbytes: int, what: str) -> TensorInfo:
    """An auxiliary tensor of this size. Unreadable where it is missing, or another."""
    info = stored.tensors.get(name)
    if info is None:
        raise Unreadable(f"{name} is missing, which the quantised weight needs: download the checkpoint again")
    if (dtypes and info.dtype not in dtypes) or info.nbytes != nbytes:
        raise Unreadable(f"{name}: is {info.dtype} of {info.nbytes} bytes; wanted {what}, {nbytes} bytes")
    return info


def _reader(stored: Checkpoint) -> Read:
    def read(info: TensorInfo, begin: int, nbytes: int) -> np.ndarray:
        raw = np.empty(nbytes, np.uint8)
        stored.read_into(info.name, memoryview(raw), begin)
        return raw

    return read


def _floats(read: Read, info: TensorInfo, first: int, last: int) -> np.ndarray:
    """Elements of a stored float tensor as fp32."""
    size = ITEM_BYTES[info.dtype]
    words = read(info, first * size, (last - first) * size).view(WORDS[info.dtype])
    out = np.empty(last - first, np.float32)
    decode(words, info.dtype, out)
    return out
