"""The end of every merge, whatever its path: was anything changed, and the report."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from . import manifest, memory, report
from .errors import ResourceError, UnchangedError
from .io.writer import CheckpointWriter
from .output import Output
from .planned import Plan
from .release.files import release_files

_LEAST_EFFECT = 1e-2  # a merge that applies less than this share of ‖Δ‖ is the LRM with extra steps


def refuse_unchanged(plan: Plan, totals: dict[str, float]) -> None:
    """A merge that did nothing is an error unless asked for (method.md, section 3)."""
    if plan.recipe.allow_unchanged:
        return
    if totals["changed_elements"] and totals["applied_over_delta"] >= _LEAST_EFFECT:
        return
    why = f"‖λαΔ⊥‖ is {totals['applied_over_delta']:.2e} of ‖Δ‖ and {totals['changed_elements']} elements changed"
    if not totals["delta_norm"]:
        why = f"instruct_model {plan.itm.path} and base_model {plan.base.path} hold the same weights"
        if plan.adapter:
            why = f"B·A is zero in all of the adapter {plan.itm.path}: it was not trained"
    raise UnchangedError(
        f"The merge changed nothing: {why}.\nLook at lambda, coefficients.rule (the literal rule gives α ~ 0) and "
        "basis.rank (a basis of full rank protects everything), or set allow_unchanged: true if you want this."
    )


def refuse_certainly_unchanged(plan: Plan) -> None:
    """Raises UnchangedError for λ = 0 and for an ITM that is its own base: no weight is needed to see that."""
    same = not plan.adapter and plan.itm.path.resolve() == plan.base.path.resolve()
    if same or not any(job.lam for job in plan.merged.values()):
        norm = 0.0 if same else 1.0
        refuse_unchanged(plan, {"applied_over_delta": 0.0, "changed_elements": 0, "delta_norm": norm})


def peaks(device: str, floor: int, fresh: bool) -> dict[str, Any]:
    """Measured peaks in bytes. `floor` is the resident set at the start: interpreter, torch, transformers. What loads
    later (a tokenizer, the family's modules) counts as the merge's, and the plan has a term for it."""
    peak = memory.host_peak()
    return {
        "host_peak": peak,
        "host_beyond_imports": peak - floor,
        "imports": floor,
        "device": memory.device_peak(device),
        "peak_since": "merge began" if fresh else "process began",
    }


def conclude(writer: CheckpointWriter, output: Output, result: dict[str, Any]) -> None:
    """What describes a verified checkpoint, beside it: card, recipe, SBOM, manifest, checksums, report.

    `result` is the report, with report.inputs, `verified`, device, compute_dtype and calibration.
    """
    content = manifest.describe(output, result)
    for name, raw in release_files(output, content, result).items():
        manifest.place(writer.note, name, raw)
        hashed = {"sha256": hashlib.sha256(raw).hexdigest()} if output.hashed else {}
        content["files"][name] = hashed | {"size": len(raw)}
    if output.hashed:
        manifest.write(writer.note, content)
    _write_report(writer, result)


def _write_report(writer: CheckpointWriter, result: dict[str, Any]) -> None:
    """The report beside the finished weights; with a kill in between both are the next run's to see to."""
    partial, final = writer.note(report.FILE_NAME + ".partial"), writer.note(report.FILE_NAME)
    try:
        partial.write_text(json.dumps(result, indent=1, default=str) + "\n")
        os.replace(partial, final)
    except OSError as error:
        raise ResourceError(f"{partial}: the report cannot be written: {error.strerror}; free some space and merge "
                            "again") from None
