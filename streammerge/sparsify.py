"""A task vector with most of its elements set to zero, before it is projected and scaled: S(Δ).

- magnitude (TIES's trim, Yadav et al., 2023, arXiv 2306.01708): of the n elements of a tensor the
  max(1, ⌊density · n⌋) of the largest |Δ| stay as they are. The threshold is exact: it is found by counting, sixteen
  bits of |Δ| at a time, in two passes over the tensor that is in memory anyway. Of elements that equal it the first
  ones stay (row by row).
- dare (Yu et al., 2024, arXiv 2311.03099): every element stays with probability `density`, and what stays is divided
  by the density, so that S(Δ) is Δ on average. (mergekit scales to the sum of |Δ| instead.) The random numbers are
  counted, not drawn in turn: element i of a tensor has the i-th word of Philox4x64 under a key made of the seed and the
  tensor's name. So the mask knows neither devices, threads and batches nor what was merged before.

Memory: beyond Δ, which is changed in place, a chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements: on a CPU 1 MiB of fp32, which stays in the cache
_FAR_CHUNK = 1 << 24  # on a GPU, where every chunk is waited for
_WORDS = 4 * 2  # of 32 bits in a block of Philox4x64: a chunk begins with a block


def sparsify(delta: Tensor, method: str, density: float, *, rescale: bool, seed: int, name: str) -> Tensor:
    """S(Δ) for a Δ of fp32 or fp64, contiguous, of any shape; changed in place and returned.

    density in (0, 1]; 1 changes nothing. `rescale`: dare divides by the density. What is not finite stays so, in dare
    even where it is dropped: it must not go unnoticed.
    """
    if method == "none" or density >= 1:
        return delta
    flat = delta.view(-1)
    if method == "magnitude":
        _trim(flat, max(1, int(density * flat.numel())))
    else:
        _drop(flat, density, rescale, np.random.Philox(key=_key(seed, name)))
    return delta


def _drop(flat: Tensor, density: float, rescale: bool, generator: np.random.Philox) -> None:
    """Bernoulli(density) by the next words of the generator."""
    least = np.uint32(min(round(density * 2**32), 2**32 - 1))
    for part in _parts(flat):
        raw = generator.random_raw(-(-len(part) // _WORDS) * _WORDS // 2)
        words = raw.astype("<u8", copy=False).view("<u4")[: len(part)]
        mask = torch.from_numpy(words < least)
        part.mul_(mask.to(part.device))
        if rescale:
            part.div_(density)


def _key(seed: int, name: str) -> np.ndarray:
    """Two words of 64 bits."""
    return np.frombuffer(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "<u8").astype(np.uint64)


def _trim(flat: Tensor, keep: int) -> None:
    """Set all but the `keep` largest magnitudes to zero; of equal ones the first stay."""
    threshold, left = _threshold(flat, keep)
    for bits, part in _magnitudes(flat):
        equal = bits == threshold
        found = int(equal.count_nonzero())
        if found > left:
            equal &= equal.cumsum(0) <= left
        left -= min(found, left)
        part.mul_(equal.logical_or_(bits > threshold))


def _threshold(flat: Tensor, keep: int) -> tuple[int, int]:
    """The `keep`-th largest magnitude as an integer, and how many of those that equal it are among the `keep`.

    The bits of a positive float, read as an integer, have its order; NaN comes last, above infinity.
    """
    width = flat.element_size() * 8
    prefix, left = 0, keep  # of the magnitudes that begin with the bits of `prefix`, `left` are among the `keep`
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=flat.device)
        for bits, _ in _magnitudes(flat):
            if shift < width - 16:
                bits = bits[bits >> (shift + 16) == prefix]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        above = counts.flip(0).cumsum(0)  # those of the largest digit, of the two largest…
        digit = int((above < left).count_nonzero())
        left -= int(above[digit - 1]) if digit else 0
        prefix = prefix << 16 | (0xFFFF - digit)
    return prefix, left


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    """Chunk by chunk, in place."""
    return flat.split(_CHUNK if flat.device.type == "cpu" else _FAR_CHUNK)


def _magnitudes(flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(|x| as integers of the same order, x) chunk by chunk."""
    words, sign = (torch.int32, 0x7FFFFFFF) if flat.element_size() == 4 else (torch.int64, 0x7FFFFFFFFFFFFFFF)
    for part in _parts(flat):
        yield part.view(words) & sign, part
