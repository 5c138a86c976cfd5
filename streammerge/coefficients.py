"""Attention statistics -> α (Eqs. 11-15, and the rules that findings.md measured).

With g = E[a − ρ u] and H = 1 + E[u] per query head, the rules are

    standardized   clip(1 + κ z), z the standardised g over the scope (one layer, or the whole model)
    literal        clip(g / H), Eq. 15 as printed: ~0 everywhere, since g is O(1/T) (method.md, section 3)
    prior          clip(1 + g / H)
    uniform        a constant

Under grouped-query attention a key/value head takes the mean of the query heads that it serves, query head h reading
kv head h // group; the FFN takes the mean of its layer's heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arch import HeadLayout
from .attention import LayerMass
from .compose import LayerAlpha
from .recipe import Coefficients


def alphas(masses: Sequence[LayerMass], coefficients: Coefficients, layout: HeadLayout) -> list[LayerAlpha]:
    """α of each layer in `masses`. The layers given are the scope over which g is standardised."""
    g = torch.stack([m.alignment - coefficients.rho * m.leakage for m in masses])
    curvature = torch.stack([1 + m.leakage for m in masses])
    raw = {"standardized": _standardized, "literal": lambda g, h, _: g / h, "prior": lambda g, h, _: 1 + g / h}
    heads = raw[coefficients.rule](g, curvature, coefficients.kappa).clamp(*coefficients.bounds).float()
    return [spread(row, layout) for row in heads]


def _standardized(g: Tensor, curvature: Tensor, kappa: float) -> Tensor:
    deviation = g.std(unbiased=False)
    told = deviation > 1e-6 * g.abs().max()  # masses are fp32: a smaller deviation is rounding, not a preference
    z = (g - g.mean()) / deviation if told else torch.zeros_like(g)
    return 1 + kappa * z


def spread(heads: Tensor, layout: HeadLayout) -> LayerAlpha:
    """α of the query heads [H] -> α of every module of the layer."""
    return LayerAlpha(heads, heads.view(layout.kv_heads, layout.group).mean(1), float(heads.mean()))
