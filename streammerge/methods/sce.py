"""SCE: select, calculate, erase (FuseChat, Wan et al., arXiv:2408.07990)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..stream import Chunk, Merge
from .select import Rank, magnitude_bits, thresholds
from .spec import method
from .task_vectors import agreement, total

if TYPE_CHECKING:
    import torch

_LEAST = 1e-6


@method(base=True, count=(0, None))
def sce(merge: Merge, *, int8_mask: bool = False, select_topk: float = 1.0) -> None:
    """W* = W_B + Σ_i m_i w_i δ_i / Σ_i m_i w_i; δ_i = the entries of W_i − W_B whose variance over the models is among
    the `select_topk` largest of those that are not 0; w_i = mean(δ_i²) / Σ_j mean(δ_j²).

    m_i = 1 where δ_i has the sign of Σ_j δ_j. Each step is rounded to D. Equal variances go by their positions, which
    mergekit leaves to torch.topk; means are taken in fp64, where mergekit takes them in fp32. `int8_mask` is accepted
    and changes nothing.
    """
    if not merge.models:
        merge.map(lambda chunk: chunk.base)
        return
    import torch

    selected = _selection(merge, select_topk)

    def deltas(chunk: Chunk) -> list[torch.Tensor]:
        found = [chunk.delta(i) for i in range(merge.models)]
        if selected is not None:
            mask = selected.holds(magnitude_bits(_variance(found)), chunk.span.index)
            found = [(d.view(mask.dtype) & mask).view(d.dtype) for d in found]
        return [d.to(merge.wide) for d in found]

    def squares(chunk: Chunk) -> torch.Tensor:
        return torch.stack([merge.round(d.square()).sum(dtype=torch.float64) for d in deltas(chunk)])

    energy = (merge.reduce(squares) / merge.count).to(merge.dtype)
    energies = torch.sum(energy).item()
    shares = torch.ones_like(energy) / merge.models if abs(energies) < _LEAST else energy / energies
    weights = shares.to(merge.wide)

    def mix(chunk: Chunk) -> torch.Tensor:
        agreeing, elected = agreement(merge, deltas(chunk))
        mixed = merge.round(total([merge.round(a * elected * w) for a, w in zip(agreeing, weights, strict=True)]))
        divisor = total([a.sign() * w for a, w in zip(agreeing, weights, strict=True)])
        divisor = divisor.to(merge.dtype).clamp(min=_LEAST).to(merge.wide)
        return chunk.base.to(merge.wide) + merge.round(mixed / divisor)

    merge.map(mix)


def _variance(deltas: list[torch.Tensor]) -> torch.Tensor:
    """The population variance over the models in fp64, rounded to D, by Welford's recurrence: torch.var takes a hundred
    times as long over so short a dimension."""
    mean = squares = deltas[0].double() * 0
    for i, delta in enumerate(deltas):
        off = delta.double() - mean
        mean = mean + off / (i + 1)
        squares = squares + off * (delta.double() - mean)
    return (squares / len(deltas)).to(deltas[0].dtype)


def _selection(merge: Merge, share: float):
    """The Threshold of the entries of largest variance; None: all of them."""
    import torch

    if share >= 1:
        return None

    def variance(chunk: Chunk) -> torch.Tensor:
        return _variance([chunk.delta(i) for i in range(merge.models)])

    k = 0
    if share > 0:
        k = int(merge.reduce(lambda chunk: torch.count_nonzero(variance(chunk))) * share)
    (found,) = thresholds(merge, lambda chunk: {0: variance(chunk)}, [Rank(0, k, largest=True)])
    return found
