"""The plan of a merge as one JSON-able report: the merge's own checks on headers and samples, then estimates.

The checks run in the merge's order and raise its errors. Without calibration nothing here imports torch. Nothing is
written, but for a nameless file that tells how fast OUT's disk is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import memory, report
from ..finish import refuse_certainly_unchanged
from ..io.checkpoint import side_files
from ..io.claim import refuse_inside
from ..plain import Threads, fit_threads, is_plain
from ..planned import Plan, distinct, make_plan
from ..progress import Progress
from ..recipe import Recipe
from ..threads import usable_cores
from . import room, tensors
from .disk import DiskSpeed, read_speed, write_speed

if TYPE_CHECKING:
    from ..calibration import CalibrationSet


def plan_merge(
    recipe: Recipe,
    out: Path | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    restart: bool = False,
    progress: Progress | None = None,
    imports: float = 0.0,
) -> dict[str, Any]:
    """What `merging.merge` would do with the same arguments. `imports`: seconds that they took, a part of the time.

    Raises what the merge would raise on the same inputs before it computes, and UnchangedError where it is certain to
    change nothing. Damaged weights, and a disk that fills up meanwhile, cannot be seen from here.
    """
    progress, spent = progress or Progress("quiet"), {"imports": imports}
    plain = is_plain(recipe)
    where = _device(recipe, device, threads, plain)
    with progress:
        plan = _timed(spent, "headers", lambda: make_plan(recipe))
        if out is not None:
            refuse_inside(out, distinct(plan.lrm, plan.itm, plan.base))
        fitted = _fitted(plan, threads or usable_cores()) if plain else None
        side_files(plan.lrm.path)
        disk = room.look(plan, out, _circumstances(plan, where), restart=restart)
        settle = partial(_plain, fitted) if plain else partial(_sweep, where)
        facts, parts, rows = settle(plan, disk, spent, progress)
    treated = tensors.treatments(plan, rows)
    every = tensors.per_tensor(plan, treated)
    fixed = {k: v for k, v in spent.items() if k != "probes"}
    return {
        **report.inputs(plan.output),
        "out": None if out is None else str(out),
        "groups": tensors.groups(plan, every),
        "per_tensor": every,
        "warnings": [*plan.warnings, *_warnings(disk)],
        "disk": disk,
        **facts,
        "time": {"estimate": True, "total": sum(parts.values()) + sum(fixed.values()), "parts": fixed | parts},
        "seconds": spent,
    }


def _device(recipe: Recipe, name: str, threads: int | None, plain: bool) -> Any:
    """The merge's own choice and checks of a device; None for a plain merge, which has none."""
    if plain and name in ("auto", "cpu"):
        return None
    from .. import pipeline, quantized

    where = pipeline.pick_device(name)
    if plain:
        return None
    if threads:
        pipeline.torch.set_num_threads(threads)
    quantized.check(recipe, where)
    return where


def _circumstances(plan: Plan, where: Any) -> dict[str, Any]:
    """What a resume depends on besides the inputs, as the merge tells it."""
    if where is None:
        return {"path": "without calibration"}
    from ..device import circumstances, compute_dtype

    return circumstances(plan.recipe, where, compute_dtype(plan, where))


def _timed(spent: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = work()
    spent[name] = time.perf_counter() - began
    return found


def _fitted(plan: Plan, threads: int) -> Threads:
    """Threads of a plain merge, as merging.py fits them into the budget."""
    budget = plan.recipe.budget.host_memory
    limit = 0.9 * memory.total("host") if budget == "auto" else memory.parse_size(budget)
    return fit_threads(plan, threads, limit or float("inf"))


def _plain(
    fitted: Threads, plan: Plan, disk: dict, spent: dict, progress: Progress
) -> tuple[dict[str, Any], dict[str, float], int]:
    """Facts, seconds by part, and rows of Ω_think of a merge that needs no data."""
    from .plain_time import block_speed, plain_parts

    refuse_certainly_unchanged(plan)
    host = {f"buffers of {fitted.count} threads": fitted.nbytes}
    settings = {"tokens_per_batch": 0, "device": {}, "host": host, "device_total": 0, "host_total": fitted.nbytes,
                "disk": sum(t.nbytes for t in plan.lrm.tensors.values())}  # fmt: skip
    progress.event("probing the disk and the cores")
    read, write, probe = _timed(spent, "probes", lambda: (*_disks(plan, disk), block_speed(plan)))
    told = _speeds(read, write) | {"elements": probe}
    parts = plain_parts(plan, min(fitted.count, usable_cores()), read, told["write_rate"], probe)
    calibration = {"tokens": {}, "heldout": 0}
    facts = {"calibration": calibration, "device": "cpu", "compute_dtype": "float32", "plan": settings, "probe": told}
    return facts, parts, 0


def _sweep(
    where: Any, plan: Plan, disk: dict, spent: dict, progress: Progress
) -> tuple[dict[str, Any], dict[str, float], int]:
    """Facts, seconds by part, and rows of Ω_think of a merge with calibration."""
    from .. import pipeline
    from ..estimate import predict
    from ..forward import StreamedModel
    from .sweep_time import measure_speeds, sweep_parts

    data = _timed(spent, "calibration", lambda: pipeline.calibrate(plan, progress))
    dtype = pipeline.compute_dtype(plan, where)
    settings = predict(plan, data, where, dtype)
    _timed(spent, "model", lambda: StreamedModel(plan.lrm, plan.family, where, dtype))  # its names and shapes fit
    refuse_certainly_unchanged(plan)
    progress.event("probing the disk and the device")
    read, write, speeds = _timed(spent, "probes", lambda: (*_disks(plan, disk), measure_speeds(
        plan, settings.tokens_per_batch, where, dtype)))  # fmt: skip
    told = _speeds(read, write)
    parts = sweep_parts(plan, data, settings, speeds, read.rate, told["write_rate"])
    facts = {
        "calibration": data.notes | {"tokens": _tokens(data), "heldout": len(data.heldout)},
        "device": str(where),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "plan": settings.as_dict(),
        "probe": told | vars(speeds),
    }
    return facts, parts, sum(len(s.omega) for s in data.reasoning)


def _tokens(data: CalibrationSet) -> dict[str, int]:
    """Tokens by set; the held-out one passes twice."""
    return {name: sum(len(s.ids) for s in getattr(data, name)) for name in ("reasoning", "heldout", "instruction")}


def _disks(plan: Plan, disk: dict[str, Any]) -> tuple[DiskSpeed, DiskSpeed | None]:
    read = read_speed((plan.lrm, plan.itm, plan.base))
    return read, disk["where"] and write_speed(Path(disk["where"]), disk["free"])


def _speeds(read: DiskSpeed, write: DiskSpeed | None) -> dict[str, Any]:
    """Rates in bytes a second, and how they were found."""
    rate = write.rate if write else read.rate
    return {"read_rate": read.rate, "read_bytes": read.sample, "read_cached": read.cached, "write_rate": rate,
            "write_bytes": write.sample if write else 0, "write_assumed": write is None}  # fmt: skip


def _warnings(disk: dict[str, Any]) -> list[str]:
    out = []
    if disk["unfinished"]:
        out.append(f"OUT holds an unfinished merge, which {disk['unfinished']}")
    return out
