"""W_B + λ Σ w_i δ_i with sparsified task vectors δ_i: what the methods that descend from task arithmetic share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..stream import Chunk, Merge

if TYPE_CHECKING:
    import torch

    from .sparsify import Sparsifier


def merge_task_vectors(
    merge: Merge,
    sparsifier: Sparsifier | None,
    weight: Sequence[float],
    *,
    consensus: bool,
    normalize: bool,
    lam: float,
) -> None:
    """Write W_B + λ Σ_i w_i δ_i, rounded to D after each step as mergekit's stacked tensors are.

    `sparsifier`: δ_i of a chunk (None: W_i − W_B). `consensus`: entries w_i δ_i count only where their sign is that of
    Σ_j w_j δ_j, which is + for 0. `normalize`: divided by the sum of the weights that count, by 1 where that is 0.
    Σ adds one by one in fp32: from five models on torch adds stacked fp32 in another order, which differs by an ulp.
    """
    weights = merge.values(weight)
    share = merge.round(total(weights)) if weights else None
    if share is not None and abs(share) < 1e-8:
        share = share.new_ones(())
    if sparsifier is not None:
        sparsifier.prepare()

    def mix(chunk: Chunk) -> torch.Tensor:
        if not weights:
            return chunk.base
        deltas = [chunk.delta(i) if sparsifier is None else sparsifier(chunk, i) for i in range(merge.models)]
        scaled = [merge.round(d.to(merge.wide) * w) for d, w in zip(deltas, weights, strict=True)]
        mixed, divisor = _elect(merge, scaled, weights) if consensus else (merge.round(total(scaled)), share)
        if normalize:
            mixed = merge.round(mixed / divisor)
        if lam != 1:
            mixed = merge.round(mixed * lam)
        return chunk.base.to(merge.wide) + mixed

    merge.map(mix, sparsifier.spans if sparsifier else None)


def total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ of the terms one by one, from +0 on: never −0."""
    found = terms[0] + 0.0
    for term in terms[1:]:
        found = found + term
    return found


def agreement(merge: Merge, terms: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> (|term| where a term has the sign of Σ terms, else 0; that sign: ±1, + for 0)."""
    import torch

    # copysign and relu are fast where comparisons of floats are not; total never gives −0
    elected = torch.copysign(torch.ones((), dtype=merge.wide, device=terms[0].device), merge.round(total(terms)))
    return [(term * elected).relu() for term in terms], elected


def _elect(
    merge: Merge, scaled: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (Σ of the terms with the elected sign, Σ of their weights, 1 where that is 0)."""
    agreeing, elected = agreement(merge, scaled)
    mixed = merge.round(total([a * elected for a in agreeing]))
    divisor = merge.round(total([a.sign() * w for a, w in zip(agreeing, weights, strict=True)]))
    return mixed, divisor.masked_fill_(divisor == 0, 1)
