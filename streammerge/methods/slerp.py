"""Spherical linear interpolation of two models (Shoemake, Animating Rotation with Quaternion Curves, 1985)."""

from ..stream import Chunk, Merge
from .spec import method

_PIECE = 1 << 20  # elements of a partial norm or dot product, as in mergekit: fp32 sums depend on it
_PARALLEL = 0.9995  # |cos θ| above which the arc is a line
_LEAST_NORM = 1e-8


@method(base=True, count=(1, 1))
def slerp(merge: Merge, *, t: float) -> None:
    """W* = (sin((1 − t) θ) W_B + sin(t θ) W_1) / sin θ, θ the angle between the two as vectors; t = 0 is the base.

    In fp32 (fp64 for fp64 inputs), rounded to D at the end. Where |cos θ| > 0.9995 a line: (1 − t) W_B + t W_1. Norms
    and cos θ have the bits of mergekit on one thread; on several its sums are taken in other pieces.
    """
    import torch

    spans = merge.spans(size=_PIECE)

    def norms(chunk: Chunk) -> torch.Tensor:
        return torch.stack([torch.linalg.vector_norm(x.to(merge.wide)) for x in (chunk.base, chunk.sources[0])])

    norm = torch.linalg.vector_norm(torch.stack(merge.each(norms, spans)), dim=0)
    norm = torch.where(norm > _LEAST_NORM, norm, 1)

    def dot(chunk: Chunk) -> torch.Tensor:
        a, b = chunk.base.to(merge.wide) / norm[0], chunk.sources[0].to(merge.wide) / norm[1]
        return (a * b).sum()

    cos = torch.stack(merge.each(dot, spans)).sum().clamp(-1, 1)
    at = torch.tensor(t, dtype=merge.wide, device=merge.device)
    first, second = 1 - at, at
    if abs(cos) <= _PARALLEL:
        theta = torch.acos(cos)
        first, second = (torch.sin(x * theta) / torch.sin(theta) for x in (1 - at, at))
    merge.map(lambda chunk: first * chunk.base.to(merge.wide) + second * chunk.sources[0].to(merge.wide))
