"""Linear merging, model soups (Wortsman et al., arXiv:2203.05482)."""

from ..stream import Chunk, Merge
from .spec import PerModel, method


@method(base=False, count=(1, None))
def linear(merge: Merge, *, weight: PerModel, normalize: bool = True) -> None:
    """W* = Σ_i w_i W_i, divided by Σ_i w_i where `normalize`.

    In fp32 (fp64 for fp64 inputs) from W = 0 on, each product added without rounding it first, rounded to D once.
    """
    import torch

    weights = [torch.tensor(w, dtype=merge.wide, device=merge.device) for w in weight]
    total = torch.stack(weights).sum()

    def mix(chunk: Chunk) -> torch.Tensor:
        result = torch.zeros(chunk.span.count, dtype=merge.wide, device=merge.device)
        for source, w in zip(chunk.sources, weights, strict=True):
            result.addcmul_(source, w)
        return result.div_(total) if normalize else result

    merge.map(mix)
