"""The task vector of one tensor, from what was read for it: θ_I − θ_B, or an adapter's s·B·A, and S of it.

The projection takes W_I and W_B, and forms their difference in fp32 itself. A Δ that is no difference of two stored
weights (an adapter's, a sparsified one) takes the place of W_I, with zeros for W_B: Δ − 0 is Δ, bit for bit, while
W_B + Δ would be rounded.

Memory: where Δ is formed here, its fp32 form beside what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .planned import Plan
from .sparsify import sparsify


class TaskVector(NamedTuple):
    """W_I and W_B of one tensor [out, in], whose difference is S(Δ); ‖Δ‖ [] in fp64 where S left something out."""

    name: str
    itm: Tensor
    base: Tensor
    dense: Tensor | None = None


def task_vector(plan: Plan, name: str, read: Sequence[Tensor]) -> TaskVector:
    """Of a merged tensor, from the tensors that `plan.sources(name)` names, in its order, on one device."""
    job, recipe = plan.merged[name], plan.recipe
    if not plan.adapter and (recipe.sparsify.method == "none" or job.density >= 1):
        return TaskVector(name, *read)
    wide = torch.float64 if torch.float64 in {t.dtype for t in read} else torch.float32
    if plan.adapter:
        a, b = (t.to(wide) for t in read)
        delta = (b @ a).mul_(plan.adapter.factors[name.removesuffix(".weight")].scale)
    else:
        delta = read[0].to(wide, copy=True).sub_(read[1])  # a narrower dtype is widened inside, exactly
    dense = None
    if job.density < 1:
        dense = torch.linalg.vector_norm(delta, dim=-1).double().norm()
        rule = recipe.sparsify
        sparsify(delta, rule.method, job.density, rescale=rule.rescale, seed=recipe.seed, name=name)
    return TaskVector(name, delta, delta.new_zeros(1, 1).expand_as(delta), dense)
