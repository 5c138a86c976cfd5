"""One merged tensor from its inputs, its basis and its coefficients: the only place that does it (Eq. 16).

W* = W_R + λ (D_row (W_I − W_B) D_col)(I − U Uᵀ). α of a head scales row blocks in q, k and v and *column* blocks in
o; scaling comes before projecting, so that the null space is kept exactly for every module (method.md, section 2).

Memory on the device: one tensor of each input model, W* in fp32, and the rounded result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import HeadLayout
from .bases import SiteBasis
from .kernels import project


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


@dataclass(frozen=True)
class Composed:
    """What became of one tensor. Norms are Frobenius; `leak` compares ‖·U‖ with ‖D Δ D U‖ before and after rounding."""

    delta: float  # ‖Δ‖
    kept: float  # ‖Δ⊥‖ at α = 1
    applied: float  # ‖λ Δ⊥_α‖
    weight: float  # ‖W_R‖
    inside: float  # ‖D Δ D U‖: what an unprojected delta would do inside the protected space
    leak: float  # ‖Δ⊥_α U‖ / ‖D Δ D U‖ in fp32
    written_leak: float  # ‖(W* as written − W_R) U‖ / ‖λ D Δ D U‖; rounding to a narrower dtype than W_R's counts too
    changed: int  # elements that differ from the LRM's, after rounding
    rank: int  # of the widest block
    width: int
    energy: float  # the lowest share of ‖H‖² that a block's basis holds
    rows: int  # feature rows behind the basis
    finite: bool


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
    blocks = [b.u for b in bases]
    wide, norms = project(lrm, itm, base, blocks, rows, cols, lam)
    merged = wide.to(dtype)
    delta, lost, applied, inside, left = norms.sqrt().tolist()
    return merged, Composed(
        delta=delta,
        kept=max(0.0, delta**2 - lost**2) ** 0.5,
        applied=abs(lam) * applied,
        weight=float(torch.linalg.vector_norm(lrm.float())),
        inside=inside,
        leak=left / inside if inside else 0.0,
        written_leak=_written_leak(merged, lrm, blocks) / (abs(lam) * inside) if inside and lam else 0.0,
        changed=int((merged != lrm.to(dtype)).sum()),
        rank=max((b.u.shape[1] for b in bases), default=0),
        width=lrm.shape[1],
        energy=min((b.energy for b in bases), default=0.0),
        rows=max((b.count for b in bases), default=0),
        finite=bool(torch.isfinite(merged).all()),
    )


def _written_leak(merged: Tensor, lrm: Tensor, blocks: list[Tensor]) -> float:
    """‖(W* − W_R) U‖ of the tensors as written: rounding leaks by itself (findings.md, 8)."""
    if not blocks:
        return 0.0
    total = torch.zeros((), dtype=torch.float64, device=merged.device)
    for new, old, basis in zip(merged.chunk(len(blocks)), lrm.chunk(len(blocks)), blocks, strict=True):
        total += ((new.float() - old.float()) @ basis).square().sum(dtype=torch.float64)
    return float(total.sqrt())
