"""NuSLERP: spherical interpolation of two models or of their task vectors, by weights (mergekit; no paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..stream import Chunk, Merge
from .spec import PerModel, method

if TYPE_CHECKING:
    import torch

_LEAST_NORM = 1e-7
_COLINEAR = 1e-8  # sin θ at or below it: a line


@method(base=None, count=(2, 2))
def nuslerp(merge: Merge, *, weight: PerModel, nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True) -> None:
    """W* = (sin((1 − t) θ) V_0 + sin(t θ) V_1) / sin θ, t = w_1 / (w_0 + w_1); with a base W* = W_B + that of V_i =
    W_i − W_B.

    θ is the angle of the whole tensors, or with `nuslerp_flatten: false` of each last dimension, with
    `nuslerp_row_wise` too of each slice along the first. Each step is rounded to D. Sums are taken in fp64, where
    mergekit takes them in fp32 and in an order that depends on its threads: in fp32 θ can differ in its last bits.
    """
    import torch

    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    flat = nuslerp_flatten or len(merge.shape) < 2
    last = not flat and not nuslerp_row_wise
    width = 1 if flat else merge.shape[-1] if last else merge.count // merge.shape[0]
    spans, dim = merge.spans(unit=width), -1 if last else 0

    def vectors(chunk: Chunk) -> list[torch.Tensor]:
        found = [chunk.delta(i) if merge.base else chunk.sources[i] for i in (0, 1)]
        return found if flat else [v.reshape(-1, width) for v in found]

    def squares(vs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([v.double().square().sum(dim, keepdim=True) for v in vs])

    def product(vs: list[torch.Tensor], norms: torch.Tensor) -> torch.Tensor:
        units = [merge.round(v.to(merge.wide) / n) for v, n in zip(vs, norms, strict=True)]
        return merge.round(units[0] * units[1]).sum(dim, keepdim=True, dtype=torch.float64)

    def norms_of(sums: torch.Tensor) -> torch.Tensor:
        return sums.sqrt().to(merge.dtype).clamp(min=_LEAST_NORM).to(merge.wide)

    def write(chunk: Chunk, arc: _Arc) -> torch.Tensor:
        result = arc(*vectors(chunk)).reshape(-1)
        return chunk.base + result if merge.base else result

    if last:
        def by_row(chunk: Chunk) -> torch.Tensor:
            vs = vectors(chunk)
            return write(chunk, _Arc(product(vs, norms_of(squares(vs))).to(merge.dtype), t))

        merge.map(by_row, spans)
        return
    norms = norms_of(merge.reduce(lambda chunk: squares(vectors(chunk)), spans))
    cos = merge.reduce(lambda chunk: product(vectors(chunk), norms), spans)
    arc = _Arc(cos.to(merge.dtype), t)
    merge.map(lambda chunk: write(chunk, arc), spans)


class _Arc:
    """The interpolation at t of two vectors whose angles have these cosines, which broadcast over them; all in D."""

    def __init__(self, cos: torch.Tensor, t: float):
        import torch

        cos = cos.clamp(-1, 1)
        self.line, self.t = (1 - cos.square()) <= _COLINEAR**2, t
        theta = torch.acos(torch.where(self.line, 0, cos))
        self.first, self.second, self.sin = torch.sin((1 - t) * theta), torch.sin(t * theta), torch.sin(theta)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        import torch

        arc = (self.first * a + self.second * b) / self.sin
        return torch.where(self.line, (1 - self.t) * a + self.t * b, arc) if self.line.any() else arc
