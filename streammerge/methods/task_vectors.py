"""W_B + λ Σ w_i δ_i with sparsified task vectors δ_i: what the methods that descend from task arithmetic share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..stream import Chunk, Merge
from .select import magnitude_bits

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
    weights = [w.to(merge.dtype) for w in merge.values(weight)]
    share = _sum(merge, [w.clone() for w in weights]) if weights else None
    if share is not None and abs(share) < 1e-8:
        share = share.new_ones(())
    if sparsifier is not None:
        sparsifier.prepare()

    def mix(chunk: Chunk) -> torch.Tensor:
        if not weights:
            return chunk.base
        deltas = [chunk.delta(i) if sparsifier is None else sparsifier(chunk, i) for i in range(merge.models)]
        scaled = [d.mul_(w) for d, w in zip(deltas, weights, strict=True)]
        mixed, divisor = _elect(merge, scaled, weights, normalize) if consensus else (_sum(merge, scaled), share)
        if normalize:
            mixed.div_(divisor)
        if lam != 1:
            mixed.mul_(lam)
        return mixed.add_(chunk.base)

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


def _sum(merge: Merge, terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """`total` rounded to D once, of terms in D; overwrites the first."""
    if len(terms) < 3:  # one addition is rounded once in D, too
        return terms[0].add_(0.0) if len(terms) == 1 else terms[0].add_(terms[1]).add_(0.0)
    return total([term.to(merge.wide) for term in terms]).to(merge.dtype)


def _elect(
    merge: Merge, scaled: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], divided: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> (Σ of the terms with the elected sign, Σ of their weights, 1 where that is 0; None unless `divided`).

    Terms are chosen by masks of bits: comparisons and fills of floats take four to forty times as long.
    """
    bits = magnitude_bits(scaled[0][:0]).dtype
    sign = 8 * scaled[0].element_size() - 1
    elected = _sum(merge, [scaled[0].clone(), *scaled[1:]]).view(bits)  # never −0
    for term in scaled:
        own = term.view(bits)
        own &= ((own ^ elected) >> sign).bitwise_not_()
    divisor = None
    if divided:
        counted = [term.abs().view(bits).neg_() >> sign for term in scaled]  # −1 where not 0
        divisor = _sum(merge, [mask.bitwise_and_(w.view(bits)).view(merge.dtype)
                               for mask, w in zip(counted, weights, strict=True)])  # fmt: skip
        zero = (divisor.abs().view(bits) - 1) >> sign
        divisor.view(bits).bitwise_or_(zero.bitwise_and_(divisor.new_ones(()).view(bits)))
    return _sum(merge, scaled), divisor
