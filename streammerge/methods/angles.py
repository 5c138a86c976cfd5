"""Squares and products of task vectors, summed chunk by chunk: what the methods that look at angles share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..stream import Merge

if TYPE_CHECKING:
    import torch


def products(
    merge: Merge, vectors: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]], rows: int = 0
) -> torch.Tensor:
    """Σ v_i v_j of a chunk for each pair, in fp64: [pairs], or [pairs, chunk's rows] for rows of `rows` elements.

    A product of two vectors is rounded to D before it is added, a square is not: so do torch's own sum and norm.
    """
    import torch

    found = []
    for i, j in pairs:
        if i == j:
            terms = vectors[i].double().square()
        else:
            terms = merge.round(vectors[i] * vectors[j])
        found.append(terms.reshape(-1, rows).sum(1, dtype=torch.float64) if rows else terms.sum(dtype=torch.float64))
    return torch.stack(found)
