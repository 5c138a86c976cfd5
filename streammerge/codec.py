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
    bits, rounded = wide.view(np.uint32), scratch.view(np.uint32)
    np.right_shift(bits, 16, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)  # half an ulp less a bit, and the bit where the kept part is odd
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
