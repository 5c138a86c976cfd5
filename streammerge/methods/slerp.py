"""Spherical linear interpolation of two models (Shoemake, Animating Rotation with Quaternion Curves, 1985)."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING

from ..stream import Chunk, Merge
from .spec import method

if TYPE_CHECKING:
    import torch

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
    scratch: dict[int, torch.Tensor] = {}  # of each thread: made anew for every piece, its pages would cost more

    def widened(chunk: Chunk) -> torch.Tensor:
        if get_ident() not in scratch:
            size = min(_PIECE, merge.count)
            scratch[get_ident()] = torch.empty(2, size, dtype=merge.wide, device=merge.device)
        pair = scratch[get_ident()][:, : chunk.span.count]
        pair[0].copy_(chunk.base)
        pair[1].copy_(chunk.sources[0])
        return pair

    def norms(chunk: Chunk) -> torch.Tensor:
        return torch.stack([torch.linalg.vector_norm(x) for x in widened(chunk)])

    norm = torch.linalg.vector_norm(torch.stack(merge.each(norms, spans)), dim=0)
    norm = torch.where(norm > _LEAST_NORM, norm, 1)

    def dot(chunk: Chunk) -> torch.Tensor:
        a, b = widened(chunk)
        return a.div_(norm[0]).mul_(b.div_(norm[1])).sum()

    cos = torch.stack(merge.each(dot, spans)).sum().clamp(-1, 1)
    at = torch.tensor(t, dtype=merge.wide, device=merge.device)
    first, second = 1 - at, at
    if abs(cos) <= _PARALLEL:
        theta = torch.acos(cos)
        first, second = (torch.sin(x * theta) / torch.sin(theta) for x in (1 - at, at))
    merge.map(
        lambda chunk: (first * chunk.base.to(merge.wide)).add_(second * chunk.sources[0].to(merge.wide))
    )
