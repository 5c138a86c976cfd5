"""One merged tensor from its inputs, its basis and its coefficients: the only place that does it (Eq. 16).

W* = W_R + λ (D_row (W_I − W_B) D_col)(I − U Uᵀ). α of a head scales row blocks in q, k and v and *column* blocks in
o; scaling comes before projecting, so that the null space is kept exactly for every module (method.md, section 2).

Memory on the device: one tensor of each input model, W* in the dtype it is written in, and a few chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import HeadLayout
from .bases import SiteBasis
from .kernels import project
from .kernels.reference import ProjectNorms
from .outcome import Composed

__all__ = ["Composed", "LayerAlpha", "compose", "scales"]


@dataclass(frozen=True)
class LayerAlpha:
    """α of one layer: q and o by query head [H], k and v by key/value head [K], one for the FFN. All fp32, CPU."""

    heads: Tensor
    kv_heads: Tensor
    ffn: float

    @staticmethod
    def uniform(value: float, layout: HeadLayout) -> LayerAlpha:
        """The same α everywhere."""
        return LayerAlpha(torch.full((layout.heads,), value), torch.full((layout.kv_heads,), value), value)


def scales(module: str, alpha: LayerAlpha, layout: HeadLayout, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The diagonals (D_row [out], D_col [in]) that α means for a module."""
    rows, cols = torch.ones(shape[0]), torch.ones(shape[1])
    if module == "q":
        rows = alpha.heads.repeat_interleave(layout.head_dim)
    elif module in ("k", "v"):
        rows = alpha.kv_heads.repeat_interleave(layout.head_dim)
    elif module == "o":
        cols = alpha.heads.repeat_interleave(layout.head_dim)
    else:
        rows = rows * alpha.ffn
    return rows, cols


def compose(
    module: str,
    lrm: Tensor,
    itm: Tensor,
    base: Tensor,
    bases: tuple[SiteBasis, ...],
    alpha: LayerAlpha,
    layout: HeadLayout,
    lam: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Composed]:
    """Merge one weight [out, in]; returns it rounded to `dtype`, on the device of `lrm`, and what happened."""
    rows, cols = (s.to(lrm.device) for s in scales(module, alpha, layout, lrm.shape))
    merged, measured = project(lrm, itm, base, [b.u.to(lrm.device) for b in bases], rows, cols, lam, dtype)
    norms = ProjectNorms(*measured.tolist())  # read once, and no chunk by itself: reading waits for the device
    leak, written = ((x / norms.sampled) ** 0.5 if norms.sampled else 0.0 for x in (norms.leak, norms.written))
    return merged, Composed(
        delta=norms.delta**0.5,
        kept=max(0.0, norms.delta - norms.lost) ** 0.5,
        applied=abs(lam) * norms.applied**0.5,
        weight=norms.weight**0.5,
        inside=norms.inside**0.5,
        leak=leak,
        written_leak=written / abs(lam) if lam else 0.0,
        changed=int(norms.changed),
        rank=max((b.u.shape[1] for b in bases), default=0),
        width=lrm.shape[1],
        energy=min((b.energy for b in bases), default=0.0),
        rows=max((b.count for b in bases), default=0),
        finite=not norms.bad,
    )
