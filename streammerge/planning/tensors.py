"""What becomes of every tensor: alike ones in one row for a terminal, each by its name for a program."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..arch import SITE_OF
from ..io.header import tensor_bytes
from ..planned import Plan
from ..recipe import Recipe

_VARIED = ("lambda", "density")  # they may differ between the layers of a group


def treatments(plan: Plan, rows: int) -> dict[str, dict[str, Any]]:
    """Role of a module -> what its merged weights go through: the rule of α, the basis. `rows`: positions of Ω_think in
    all reasoning samples."""
    return {module: {"alpha": _alpha(plan.recipe, module), "basis": basis_of(plan, module, rows)}
            for module in plan.recipe.modules}  # fmt: skip


def _alpha(recipe: Recipe, module: str) -> str:
    rule = recipe.coefficients
    if not recipe.needs_instruction:
        return f"{rule.value:g}, the same everywhere"
    whose = "its layer's mean"
    if module in "qo":
        whose = "of each head"
    elif module in "kv":
        whose = "the mean of the heads that read each key/value head"
    over = {"model": "over all layers", "layer": "inside each layer"}[rule.scope]
    return f"{rule.rule} {over}, in [{rule.bounds[0]:g}, {rule.bounds[1]:g}]: {whose}"


def basis_of(plan: Plan, module: str, rows: int) -> dict[str, Any] | None:
    """The basis that a module's delta is projected away from: its feature site, how many bases there are, the feature
    rows behind each, their width, and the highest rank that they can have. None: no projection."""
    recipe, layout = plan.recipe, plan.layout
    if not recipe.needs_reasoning:
        return None
    site, count = SITE_OF[module], 1
    width = plan.lrm.tensors[plan.family.weight(next(iter(plan.merged.values())).layer, module)].shape[-1]
    if module == "v" and recipe.thinking.attended_values:
        site, count, rows = "attn_in and attended", layout.kv_heads, rows * (1 + layout.group)
    rule = recipe.basis.rank + {"energy": f" {recipe.basis.energy:g}", "fixed": f" {recipe.basis.size}"}.get(
        recipe.basis.rank, "")  # fmt: skip
    most = min(rows, width, recipe.basis.size or width)
    return {"site": site, "rule": rule, "count": count, "rows": rows, "width": width, "rank_at_most": most}


def per_tensor(plan: Plan, treated: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every tensor of the output, in its order."""
    found = {}
    for tensor in plan.tensors:
        job, info = plan.merged.get(tensor.name), plan.lrm.tensors[tensor.name]
        alone = "decoded" if tensor.name in plan.lrm.encoded else "copied"
        facts = {"action": "merged" if job else alone, "shape": list(tensor.shape), "dtype": info.dtype,
                 "written_as": tensor.dtype, "bytes": tensor_bytes(tensor.dtype, tensor.shape)}  # fmt: skip
        if job:
            facts |= {"layer": job.layer, "module": job.module, "lambda": job.lam, **treated[job.module]}
            if plan.recipe.sparsify.method != "none":
                facts["density"] = job.density
        found[tensor.name] = facts
    return found


def groups(plan: Plan, tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors that differ in their layer alone, as one row each: merged ones first, in the order of the recipe's
    modules. λ and density are lists, by layer, where they are not the same for all."""
    prefix = re.compile(re.escape(plan.family.layers) + r"\.(\d+)\.")
    found: dict[tuple, dict[str, Any]] = {}
    for name, facts in tensors.items():
        at = prefix.match(name)
        key = (prefix.sub(f"{plan.family.layers}.*.", name), str(facts["shape"]), facts["dtype"], facts["action"])
        same = ("action", "module", "shape", "dtype", "written_as", "alpha", "basis")
        group = found.setdefault(key, {"tensors": key[0], **{k: facts[k] for k in same if k in facts}, "count": 0,
                                       "bytes": 0, "layers": []})  # fmt: skip
        group["count"] += 1
        group["bytes"] += facts["bytes"]
        group["layers"] += [int(at[1])] if at else []
        for varied in _VARIED:
            group.setdefault(varied, []).extend([facts[varied]] if varied in facts else [])
    order = {module: n for n, module in enumerate(plan.recipe.modules)}
    rows = sorted(found.values(), key=lambda g: order.get(g.get("module"), len(order)))
    return [{k: v for k, v in row.items() if k not in _VARIED} | _by_layer(row) for row in rows]


def _by_layer(row: dict[str, Any]) -> dict[str, Any]:
    """The layers as text, and what may differ among them in their order: one value where it does not."""
    order = sorted(range(len(row["layers"])), key=row["layers"].__getitem__)
    told: dict[str, Any] = {"layers": spans(row["layers"])}
    for key in (k for k in _VARIED if row[k]):
        values = [row[key][at] for at in order]
        told[key] = values[0] if len(set(values)) == 1 else values
    return told


def spans(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in parts)
