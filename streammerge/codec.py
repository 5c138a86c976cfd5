"""Stored numbers as numpy arrays: what is finite, bf16 and fp16 to fp32 and back, without torch.

Rounding is to nearest, ties to even, and from fp64 to 16 bits by way of fp32: bit for bit what torch does. Every
function works on a block that its caller keeps in the cache.
"""

from __future__ import annotations

import numpy as np

# safetensors code -> how numpy holds its elements. numpy knows no bf16: its words are the upper halves of fp32 words.
WORDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# code -> bits of an element, first magnitude that is infinite or NaN
_SPECIAL = {
    "F64": (64, 0x7FF0000000000000), "F32": (32, 0x7F800000), "F16": (16, 0x7C00), "BF16": (16, 0x7F80),
    "F8_E5M2": (8, 0x7C), "F8_E4M3": (8, 0x7F),
}  # fmt: skip
_LARGEST = {"F64": 1.79e308, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.38e38}  # what rounds to a finite number
_HALF, _UPPER = np.uint32(16), np.uint32(0xFFFF0000)
# the only NaN of the formats that have no infinity and no negative zero, or no sign at all
_ONLY_NAN = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}


def all_finite(raw: np.ndarray, code: str) -> bool:
    """No NaN and no infinity in stored elements, contiguous, of any dtype; integers have none.

    As signed integers positive special values are the largest, as unsigned ones the negative: two maxima, no copy.
    """
    if not raw.size:
        return True
    if code in _ONLY_NAN:
        return not (raw.view(np.uint8) == _ONLY_NAN[code]).any()
    if code not in _SPECIAL:
        return True
    bits, least = _SPECIAL[code]
    signed, unsigned = raw.view(f"i{bits // 8}"), raw.view(f"u{bits // 8}")
    return int(signed.max()) < least and int(unsigned.max()) < least + (1 << (bits - 1))


def holds(code: str, bound: float) -> bool:
    """No number of at most this magnitude overflows in the dtype."""
    return bound <= _LARGEST[code]


def decode(words: np.ndarray, code: str, out: np.ndarray) -> None:
    """Elements as stored (WORDS[code]) -> fp32 or fp64 `out` of the same length. Exact."""
    if code != "BF16":
        np.copyto(out, words, casting="same_kind")
        return
    single = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    bits = single.view(np.uint32)
    np.copyto(bits, words)  # widening and shifting in one call takes longer
    np.left_shift(bits, 16, out=bits)
    if single is not out:
        np.copyto(out, single)


def encode(wide: np.ndarray, code: str, out: np.ndarray, scratch: np.ndarray) -> None:
    """fp32 or fp64 -> elements as stored, `out` of WORDS[code]. `scratch`: fp32 of the same length, not `wide`.

    Too large becomes infinite. NaN may become anything in bf16: look for it in `wide`.
    """
    if wide.dtype == np.float64 and code in ("F16", "BF16"):
        wide = wide.astype(np.float32)
    if code != "BF16":
        np.copyto(out, wide, casting="same_kind")
        return
    rounded = scratch.view(np.uint32)
    _round(wide.view(np.uint32), rounded)
    np.right_shift(rounded, _HALF, out=rounded)
    np.copyto(out, rounded, casting="unsafe")


def decode_pairs(words: np.ndarray, out: np.ndarray) -> None:
    """bf16 words [..., 2 n] -> fp32 `out` [..., 2, n]: elements 0, 2, 4, … and then 1, 3, 5, … of each row. Exact.

    A pair of bf16 is one 32-bit word, whose halves are each one pass away from fp32: half the work of `decode`.
    """
    pairs, bits = words.view(np.uint32), out.view(np.uint32)
    np.left_shift(pairs, _HALF, out=bits[..., 0, :])
    np.bitwise_and(pairs, _UPPER, out=bits[..., 1, :])


def encode_pairs(wide: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """`encode` to bf16 of what `decode_pairs` has laid out: fp32 [2, n] -> `out`, words [2 n]. `scratch`: as `wide`."""
    rounded = scratch.view(np.uint32)
    _round(wide.view(np.uint32), rounded)
    even, odd = rounded
    np.right_shift(even, _HALF, out=even)
    np.bitwise_and(odd, _UPPER, out=odd)
    np.bitwise_or(even, odd, out=out.view(np.uint32))


def _round(bits: np.ndarray, rounded: np.ndarray) -> None:
    """fp32 words -> words whose upper halves are the nearest bf16."""
    np.right_shift(bits, _HALF, out=rounded)
    np.bitwise_and(rounded, np.uint32(1), out=rounded)  # half an ulp less a bit, and the bit where the kept part is odd
    np.add(rounded, np.uint32(0x7FFF), out=rounded)
    np.add(rounded, bits, out=rounded)
