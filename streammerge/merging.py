"""A merge by the shortest path: tensors alone where the recipe needs no data, else the sweep (pipeline.py).

plan -> chunks (merging, copying, writing) -> side files -> verification -> report. Without calibration nothing here
imports torch. Whatever raises, nothing is left under a final name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import memory, report
from .errors import RecipeError
from .fingerprint import fingerprint
from .finish import conclude, peaks, refuse_certainly_unchanged, refuse_unchanged
from .io.claim import STATE, refuse_inside
from .io.writer import CheckpointWriter
from .journal import EVERY, Journal, resumed
from .outcome import Composed
from .plain import Threads, fit_threads, is_plain, merge_plain
from .planned import Plan, distinct, make_plan
from .progress import Progress
from .recipe import Recipe
from .tensor_merging import Request, merge_config
from .threads import usable_cores
from .verified import verify_output


def merge(
    recipe: Recipe | Request,
    out: str | Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    threads: int | None = None,
    restart: bool = False,
    save_every: float = EVERY,
    artifacts: str | Path | None = None,
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge as the recipe says and write a checkpoint to `out`, a directory that is new, empty, or holds this very
    merge unfinished: then it goes on there, unless `restart` says to drop it.

    `threads`: CPU threads (None: all usable cores, or torch's choice where layers run); `save_every`: seconds between
    two saves of how far it has come; `artifacts`: where bases and attention masses are kept for later merges of the
    same LRM (a merge without calibration has none); `also`: 'nf4', 'int8' for a quantised copy beside `out`. Returns
    the report (also written to `out`/streammerge_report.json). Raises a StreamMergeError that says what to do; `out`
    then holds nothing, or what was saved for a resume, or is complete and only a copy is missing.
    """
    settings = {"progress": progress or Progress("quiet"), "threads": threads}
    if also:
        from .also import check, write_also

        check(Path(out), also)
    report = _merge(recipe, Path(out), device=device, restart=restart, save_every=save_every, artifacts=artifacts,
                    **settings)  # fmt: skip
    if also:  # not in OUT's own report, which was whole before
        report["also"] = write_also(Path(out), also, shard_size=recipe.shard_size, **settings)
    return report


def _merge(
    recipe: Recipe | Request, out: Path, *, device: str, progress: Progress, threads: int | None, restart: bool,
    save_every: float, artifacts: str | Path | None,
) -> dict[str, Any]:  # fmt: skip
    """By the path that the recipe asks for."""
    if isinstance(recipe, Request):
        if artifacts is not None:
            raise RecipeError("--artifacts: a mergekit configuration has no calibration whose artifacts could be kept")
        more = {"restart": restart, "save_every": save_every}
        return merge_config(recipe, out, device=device, progress=progress, threads=threads, **more)
    if not is_plain(recipe) or device not in ("auto", "cpu"):
        from . import pipeline

        if not is_plain(recipe):
            if threads:
                pipeline.torch.set_num_threads(threads)
            more = {"restart": restart, "save_every": save_every, "artifacts": artifacts}
            return pipeline.merge(recipe, out, device=device, progress=progress, **more)
        pipeline.pick_device(device)  # a device that is not there is an error, though a plain merge asks for none
    return _merge_plain(recipe, out, progress, threads or usable_cores(), restart, save_every)


def _merge_plain(
    recipe: Recipe, out: Path, progress: Progress, threads: int, restart: bool, save_every: float
) -> dict[str, Any]:
    """The whole of a merge without calibration; returns the report."""
    began = time.perf_counter()
    fresh_meter, floor = memory.reset_host_peak(), memory.host_now()
    with progress:
        plan = make_plan(recipe)
        refuse_inside(out, distinct(plan.lrm, plan.itm, plan.base))
        budget = recipe.budget.host_memory
        limit = 0.9 * memory.total("host") if budget == "auto" else memory.parse_size(budget)
        fitted = fit_threads(plan, threads, limit or float("inf"))
        journal = Journal(out / STATE, fingerprint(plan.output, {"path": "without calibration"}), every=save_every,
                          tell=progress.event)  # fmt: skip
        go_on = partial(resumed, journal, restart=restart)
        with CheckpointWriter(out, plan.tensors, memory.parse_size(recipe.shard_size), go_on) as writer:
            refuse_certainly_unchanged(plan)
            started = time.perf_counter()
            composed, shards = merge_plain(plan, writer, progress, fitted.count, journal)
            merged = time.perf_counter() - started
            told = _describe(plan, composed, merged)
            refuse_unchanged(plan, told["totals"])
            for name, content in plan.output.sides.items():
                writer.add_file(name, content)
            writer.finish()
            result = {
                **report.inputs(plan.output),
                **told,
                "verified": verify_output(plan.output, out, fitted.count, shards),
                "plan": _predicted(plan, fitted),
                "memory": peaks("cpu", floor, fresh_meter),
                "seconds": {"total": round(time.perf_counter() - began, 3), "merge": round(merged, 3)},
                "resumed_at": journal.resumed_at,
            }
            result["warnings"] += journal.warnings
            conclude(writer, plan.output, result)
    return result


def _describe(plan: Plan, composed: dict[str, Composed], seconds: float) -> dict[str, Any]:
    """The parts of the report that come from the merge; the same keys as of one with calibration."""
    coefficients = plan.recipe.coefficients
    heads = [[coefficients.value] * plan.layout.heads] * plan.layers
    read = sum(c.tensors[name].nbytes for c in (plan.lrm, plan.itm, plan.base) for name in plan.merged)
    read += sum(plan.lrm.tensors[name].nbytes for name in plan.copied)
    unmeasured = "L_think was not measured: it needs held-out samples (calibration.reasoning, calibration.holdout)"
    return {
        "alpha": report.alpha_of_heads(heads, coefficients.bounds),
        "totals": report.totals(composed),
        "modules": report.by_module(plan, composed),
        "per_tensor": report.per_tensor(plan, composed),
        "l_think": {},
        "attention": {},
        "throughput": {"calibration_tokens": 0, "bytes_read": read, "bytes_per_second": read / seconds},
        "warnings": [*plan.warnings, unmeasured],
        "calibration": {"heldout": 0},
        "device": "cpu",
        "compute_dtype": "float32",
        "kernels": "numpy",
    }


def _predicted(plan: Plan, fitted: Threads) -> dict[str, Any]:
    """What the merge was to take, in bytes, in the form of the sweep's estimate."""
    host = {f"buffers of {fitted.count} threads": fitted.nbytes}
    disk = sum(t.nbytes for t in plan.lrm.tensors.values())
    return {"tokens_per_batch": 0, "device": {}, "host": host, "device_total": 0, "host_total": fitted.nbytes,
            "disk": disk}  # fmt: skip
