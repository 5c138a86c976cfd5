"""What a merge did: one JSON file beside the weights, and a short table on the terminal.

The report holds everything that a reader needs to judge or repeat the run: the resolved recipe, inputs, versions,
what was calibrated on, α, norms, ranks and leaks of every tensor, L_think, memory and time.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .gradient import shown
from .memory import format_size
from .outcome import Composed
from .output import Output
from .planned import Plan
from .recipe import MODULES

if TYPE_CHECKING:
    from .compose import LayerAlpha

FILE_NAME = "streammerge_report.json"


def alpha_summary(found: dict[int, LayerAlpha], bounds: tuple[float, float]) -> dict[str, Any]:
    """α over all query heads: min, mean, max, the share at a bound, and every value by layer."""
    return alpha_of_heads([a.heads.tolist() for _, a in sorted(found.items())], bounds)


def alpha_of_heads(heads: Sequence[Sequence[float]], bounds: tuple[float, float]) -> dict[str, Any]:
    """`alpha_summary` of plain numbers, by layer and head."""
    every = [value for row in heads for value in row]
    return {
        "min": min(every),
        "mean": _mean(every),
        "max": max(every),
        "share_at_bounds": _mean(value <= bounds[0] or value >= bounds[1] for value in every),
        "heads": [[round(value, 6) for value in row] for row in heads],
    }


def totals(composed: dict[str, Composed]) -> dict[str, float]:
    """Norms over all merged tensors: ‖λαΔ⊥‖/‖Δ‖, ‖Δ⊥‖/‖Δ‖, the worst leaks, the share of elements that changed."""

    def norm(field: str) -> float:
        return sum(getattr(c, field) ** 2 for c in composed.values()) ** 0.5

    delta = norm("delta")
    return {
        "delta_norm": delta,
        "delta_over_weight": delta / max(norm("weight"), 1e-30),
        "applied_norm": norm("applied"),
        "applied_over_delta": norm("applied") / max(delta, 1e-30),
        "kept_over_delta": norm("kept") / max(delta, 1e-30),
        "leak": max((c.leak for c in composed.values()), default=0.0),
        "written_leak": max((c.written_leak for c in composed.values()), default=0.0),
        "changed_elements": sum(c.changed for c in composed.values()),
    }


def by_module(plan: Plan, composed: dict[str, Composed]) -> list[dict[str, Any]]:
    """One row a module role, over all layers: the means of norm ratios and rank / in, the worst leaks."""
    rows = []
    for module in MODULES:
        mine = [c for name, c in composed.items() if plan.merged[name].module == module]
        if mine:
            rows.append({
                "module": module,
                "kept_over_delta": _mean(c.kept / c.delta if c.delta else 0.0 for c in mine),
                "applied_over_delta": _mean(c.applied / c.delta if c.delta else 0.0 for c in mine),
                "rank": _mean(c.rank for c in mine),
                "rank_over_in": _mean(c.rank / c.width for c in mine),
                "energy": min(c.energy for c in mine),
                "leak": max(c.leak for c in mine),
                "written_leak": max(c.written_leak for c in mine),
            })  # fmt: skip
    return rows


def rank_warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Modules whose bases take more than half of the input space, where little of the task vector is left."""
    return [
        f"{row['module']}: the protected space takes {row['rank_over_in']:.0%} of the input dimensions and leaves "
        f"{row['kept_over_delta']:.0%} of ‖Δ‖; lower basis.energy, or protect fewer positions"
        for row in rows
        if row["rank_over_in"] > 0.5 and row["kept_over_delta"] > 0
    ]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def inputs(output: Output) -> dict[str, Any]:
    """The recipe as it was resolved, the checkpoints, and the versions and machine that ran."""
    return {
        "streammerge": __version__,
        "recipe": dict(output.recipe),
        "models": {role: str(checkpoint.path) for role, checkpoint in output.inputs.items()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "tensors": {
            "merged": len(output.tensors) - len(output.copies),
            "copied": len(output.copies) - len(output.decoded),
        }
        | ({"decoded": len(output.decoded)} if output.decoded else {}),
    }


def per_tensor(plan: Plan, composed: dict[str, Composed]) -> dict[str, dict[str, Any]]:
    """Every merged tensor's λ and numbers; density and ‖Δ‖ before where the task vector was sparsified."""
    found = {}
    for name, told in composed.items():
        job, numbers = plan.merged[name], dataclasses.asdict(told)
        sparse = {"density": job.density} if told.dense is not None else {}
        found[name] = {"lambda": job.lam} | sparse | {k: v for k, v in numbers.items() if v is not None}
    return found


def _kernels(ran: dict[str, int] | str) -> dict[str, list[str]]:
    """What ran each kernel, and the reason where it was not Triton -> the kernels that it ran."""
    if isinstance(ran, str):
        return {ran: ["all"]}
    by: dict[str, list[str]] = {}
    for told in ran:
        name, _, how = told.partition(": ")
        by.setdefault(how, []).append(name)
    return by


def print_summary(report: dict[str, Any], out: Path) -> None:
    """The short table for a terminal, on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False, highlight=False)  # a path or a config value may look like markup
    table = Table(title=f"streammerge: {report['recipe']['merge_method']}, λ = {shown(report['recipe']['lambda'])}")
    for column in ("module", "rank / in", "‖Δ⊥‖/‖Δ‖", "‖λαΔ⊥‖/‖Δ‖", "leak fp32", "leak written"):
        table.add_column(column, justify="right" if column != "module" else "left")
    for row in report["modules"]:
        table.add_row(
            row["module"], f"{row['rank']:.0f} ({row['rank_over_in']:.1%})", f"{row['kept_over_delta']:.3f}",
            f"{row['applied_over_delta']:.3f}", f"{row['leak']:.1e}", f"{row['written_leak']:.1e}",
        )  # fmt: skip
    console.print(table)
    alpha = report["alpha"]
    console.print(f"α  min {alpha['min']:.3f}  mean {alpha['mean']:.3f}  max {alpha['max']:.3f}  "
                  f"at a bound {alpha['share_at_bounds']:.1%}")
    if report["l_think"]:
        told = "  ".join(f"{name} {value:.2e}" for name, value in report["l_think"].items())
        console.print(f"L_think (nats, {report['calibration']['heldout']} held-out samples)  {told}")
    if report.get("artifacts") and report["artifacts"]["reused"]:
        console.print(f"reused from an earlier merge: {', '.join(report['artifacts']['reused'])}")
    for how, names in _kernels(report["kernels"]).items():
        console.print(f"kernels: {', '.join(names)} in {how}")
    for warning in report["warnings"]:
        console.print(f"note: {warning}")
    peak = report["memory"]
    console.print(f"peak memory {format_size(peak['host_beyond_imports'])} beyond imports (host), "
                  f"{format_size(peak['device'])} (device); {report['seconds']['total']:.1f} s")
    console.print(f"written to {out}")
