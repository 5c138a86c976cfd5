"""Model Stock (Jang et al., arXiv:2403.19522)."""

from itertools import combinations

from ..stream import Chunk, Merge
from .angles import products
from .spec import method

_LEAST = 1e-6  # of a product of norms, and of |1 + (N − 1) cos θ|: below it the base is kept


@method(base=True, count=(2, None))
def model_stock(merge: Merge, *, filter_wise: bool = False) -> None:
    """W* = t mean_i W_i + (1 − t) W_B, t = N cos θ / (1 + (N − 1) cos θ), θ the mean angle between the W_i − W_B.

    `filter_wise`: a θ and a t for each row (the last dimension). Sums are taken in fp64, where mergekit takes them in
    fp32 and in an order that depends on the tensor's size and its threads: in fp32 t can differ in its last bits.
    """
    import torch

    rows = merge.shape[-1] if filter_wise and merge.shape else 0
    pairs = [*[(i, i) for i in range(merge.models)], *combinations(range(merge.models), 2)]

    def sums(chunk: Chunk) -> torch.Tensor:
        deltas = [chunk.delta(i).to(merge.wide) for i in range(merge.models)]
        return products(merge, deltas, pairs, rows)

    def blend(chunk: Chunk, t: torch.Tensor) -> torch.Tensor:
        mean = chunk.sources[0].to(merge.wide) + 0.0  # a sum starts from +0
        for source in chunk.sources[1:]:
            mean = merge.round(mean + source.to(merge.wide))
        mean, base = merge.round(mean / merge.models), chunk.base.to(merge.wide)
        if rows:
            mean, base = mean.reshape(-1, rows), base.reshape(-1, rows)
        return merge.round(t * mean.to(merge.dtype)) + merge.round((1 - t) * base.to(merge.dtype))

    if rows:
        merge.map(lambda chunk: blend(chunk, _share(merge, sums(chunk))), merge.spans(unit=rows))
    else:
        t = _share(merge, merge.reduce(sums))
        merge.map(lambda chunk: blend(chunk, t))


def _share(merge: Merge, sums):
    """t in D, [1] or [rows, 1], from the squares of the offsets and their products."""
    import torch

    norms = sums[: merge.models].sqrt().to(merge.dtype)
    cosines = []
    for (i, j), product in zip(combinations(range(merge.models), 2), sums[merge.models :], strict=True):
        scale = (norms[i] * norms[j]).clamp(min=_LEAST)
        cosines.append((product.to(merge.dtype) / scale).clamp(-1, 1))
    cos = torch.stack(cosines).mean(dim=0).unsqueeze(-1)
    divisor = 1 + (merge.models - 1) * cos
    singular = divisor.abs() < _LEAST
    return torch.where(singular, 0, merge.models * cos / torch.where(singular, 1, divisor))
