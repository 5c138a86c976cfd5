"""A merge without data from a mergekit configuration to a finished checkpoint, and its plan: as merging.py does for our
own recipes, with the same writer, journal, verification and release files."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import memory, report
from .errors import RecipeError, ResourceError
from .fingerprint import fingerprint
from .finish import conclude, peaks
from .io.claim import STATE, refuse_inside
from .io.header import ITEM_BYTES, tensor_bytes
from .io.writer import CheckpointWriter
from .jobs import Source, TensorJob, TensorPlan
from .journal import EVERY, Journal, resumed
from .mergekit import Config, is_mergekit, load_config, make_tensor_plan
from .progress import Progress
from .tensorwise import arguments, check_jobs, fit_threads, merge_tensors, methods_of, thread_bytes
from .threads import usable_cores
from .verified import verify_output


@dataclass(frozen=True)
class Request:
    """A mergekit configuration, and what it does not say. `seed`: of the methods that drop at random; `hash_inputs`:
    the recipe key's."""

    config: Config
    host_memory: str = "auto"
    shard_size: str = "5GB"
    hash_inputs: bool = False
    seed: int = 0


def request(recipe: Request | str | Path, **budget: Any) -> Request | None:
    """The Request of a mergekit configuration file; None where the file is no such. `budget`: api.with_budget's.

    Raises RecipeError for a mistake in the file, and for a budget that means nothing without calibration."""
    if not isinstance(recipe, Request) and not is_mergekit(recipe):
        return None
    given = {key: value for key, value in budget.items() if value is not None}
    idle = sorted("lambda" if key == "lam" else key for key in given
                  if key not in ("host_memory", "shard_size", "hash_inputs"))  # fmt: skip
    if idle:
        raise RecipeError(f"{recipe}: {', '.join(idle)}: not for a mergekit configuration, which runs no layers and "
                          "says everything else itself: leave it out")
    asked = recipe if isinstance(recipe, Request) else Request(load_config(recipe))
    return replace(asked, **given)


def merge_config(
    asked: Request,
    out: str | Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    threads: int | None = None,
    restart: bool = False,
    save_every: float = EVERY,
) -> dict[str, Any]:
    """Merge as a mergekit configuration says; the arguments are merging.merge's. `device`: 'auto' is the CPU here; with
    cuda formulas are computed there.

    Returns the report. Raises StreamMergeError; `out` then holds nothing, or what was saved for a resume.
    """
    began, out, progress = time.perf_counter(), Path(out), progress or Progress("quiet")
    device = _device(device)
    fresh_meter = memory.reset_host_peak()
    import torch  # noqa: F401 (its memory is not the merge's)

    floor = memory.host_now()
    with progress:
        plan = make_tensor_plan(asked.config)
        output = replace(plan.output, hash_inputs=asked.hash_inputs)
        refuse_inside(out, plan.inputs)
        count = fit_threads(plan, threads or usable_cores(), _limit(asked.host_memory))
        choices = {"path": "tensors", "device": device, "seed": asked.seed, "jobs": _hash(plan)}
        journal = Journal(out / STATE, fingerprint(output, choices), every=save_every,
                          tell=progress.event)  # fmt: skip
        go_on = partial(resumed, journal, restart=restart)
        with CheckpointWriter(out, plan.tensors, memory.parse_size(asked.shard_size), go_on) as writer:
            started = time.perf_counter()
            shards = merge_tensors(plan, writer, progress, count, journal, device=device, seed=asked.seed)
            merged = time.perf_counter() - started
            for name, content in plan.sides.items():
                writer.add_file(name, content)
            writer.finish()
            result = {
                **report.inputs(output),
                **_describe(plan, device, asked.seed, merged),
                "verified": verify_output(output, out, count, shards),
                "plan": _predicted(plan, count),
                "memory": peaks(device, floor, fresh_meter),
                "seconds": {"total": round(time.perf_counter() - began, 3), "merge": round(merged, 3)},
                "resumed_at": journal.resumed_at,
            }
            result["warnings"] += journal.warnings
            conclude(writer, output, result)
    return result


def plan_config(asked: Request, out: Path | None = None, *, threads: int | None = None) -> dict[str, Any]:
    """What `merge_config` would do: every tensor with its method and resolved parameters, disk and memory. Writes
    nothing; raises what the merge would raise before it computes."""
    plan = make_tensor_plan(asked.config)
    check_jobs(plan)
    count = fit_threads(plan, threads or usable_cores(), _limit(asked.host_memory))
    copies = plan.output.copies
    tensors = dict(_resolved(job, job.out.name in copies) for job in plan.jobs)
    predicted = _predicted(plan, count)
    if out is not None:
        refuse_inside(out, plan.inputs)
        _refuse_full_disk(out, predicted["disk"])
    return {**report.inputs(plan.output), "per_tensor": tensors, "plan": predicted,
            "disk": predicted["disk"], "threads": count, "warnings": list(plan.warnings)}  # fmt: skip


def print_tensor_plan(plan: dict[str, Any]) -> None:
    """The plan of a mergekit configuration: one line a tensor; on stderr."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    for name, told in plan["per_tensor"].items():
        console.print(f"{name}  {told['dtype']} {'x'.join(map(str, told['shape']))}  {told['method']}{_told(told)}")
    console.print(f"tensors: {plan['tensors']['merged']} merged, {plan['tensors']['copied']} copied")
    console.print(f"disk: {memory.format_size(plan['disk'])}; memory: {plan['threads']} threads, "
                  f"{memory.format_size(plan['plan']['host_total'])} beyond imports")
    for warning in plan["warnings"]:
        console.print(f"note: {warning}")


def print_tensor_summary(result: dict[str, Any], out: Path) -> None:
    """What a merge did, for a terminal; on stderr."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    told = ", ".join(f"{count} by {method}" for method, count in result["methods"].items())
    console.print(f"tensors: {told}; {result['tensors']['copied']} of them byte copies")
    for warning in result["warnings"]:
        console.print(f"note: {warning}")
    console.print(f"peak memory {memory.format_size(result['memory']['host_beyond_imports'])} beyond imports (host), "
                  f"{memory.format_size(result['memory']['device'])} (device); {result['seconds']['total']:.1f} s")
    console.print(f"written to {out}")


def _device(device: str) -> str:
    if device in ("auto", "cpu"):
        return "cpu"
    from .device import pick_device

    return str(pick_device(device))


def _limit(host_memory: str) -> float:
    limit = 0.9 * memory.total("host") if host_memory == "auto" else memory.parse_size(host_memory)
    return limit or float("inf")


def _describe(plan: TensorPlan, device: str, seed: int, seconds: float) -> dict[str, Any]:
    """The parts of the report that come from the merge."""
    read = sum(s.checkpoint.tensors[s.key].nbytes for job in plan.jobs for s in _inputs(job))
    return {
        "methods": methods_of(plan.jobs),
        "seed": seed,
        "per_tensor": dict(_resolved(job, job.out.name in plan.output.copies) for job in plan.jobs),
        "throughput": {"bytes_read": read, "bytes_per_second": read / seconds},
        "warnings": list(plan.warnings),
        "calibration": {"heldout": 0},
        "device": device,
        "compute_dtype": "as the inputs",
        "kernels": "torch",
    }


def _resolved(job: TensorJob, copied: bool) -> tuple[str, dict[str, Any]]:
    """(name, what becomes of it): the method and the one value that each parameter has for this tensor."""
    told: dict[str, Any] = {"method": "copy" if copied else job.method, "dtype": job.out.dtype, "shape": job.out.shape,
                            "sources": [f"{s.checkpoint.role}: {s.key}" for s in job.sources]}  # fmt: skip
    if job.base:
        told["base"] = f"{job.base.checkpoint.role}: {job.base.key}"
    if not copied:
        told["parameters"] = {key.rstrip("_"): value for key, value in arguments(job).items()}
    return job.out.name, told


def _told(told: dict[str, Any]) -> str:
    values = told.get("parameters", {})
    return "".join(f" {key}={value}" for key, value in values.items())


def _predicted(plan: TensorPlan, count: int) -> dict[str, Any]:
    """What the merge is to take, in bytes, in the form of the other paths' estimates."""
    nbytes = count * thread_bytes(plan)
    disk = sum(tensor_bytes(t.dtype, t.shape) for t in plan.tensors)
    disk += max((count * ITEM_BYTES["F64"] * _size(j) for j in plan.jobs if j.method == "karcher"), default=0)
    return {"tokens_per_batch": 0, "device": {}, "host": {f"buffers of {count} threads": nbytes}, "device_total": 0,
            "host_total": nbytes, "disk": disk}  # fmt: skip


def _size(job: TensorJob) -> int:
    return tensor_bytes("U8", job.out.shape)


def _refuse_full_disk(out: Path, needed: int) -> None:
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise ResourceError(f"{folder}: not enough disk: the merge writes {memory.format_size(needed)}, "
                            f"{memory.format_size(free)} are free. Free some space, or choose another output directory")


def _inputs(job: TensorJob) -> list[Source]:
    return [*job.sources, *([job.base] if job.base else [])]


def _hash(plan: TensorPlan) -> str:
    """Of all that the jobs say beyond the recipe's text: keys, parameters, row maps."""
    seen = hashlib.sha256()
    for job in plan.jobs:
        seen.update(repr((job.out, job.method, dict(job.parameters), job.dtype, job.base is None)).encode())
        for source in _inputs(job):
            seen.update(repr((source.checkpoint.role, source.key, dict(source.parameters))).encode())
            if source.rows is not None:
                seen.update(source.rows.tobytes())
                for fill in source.fills:
                    seen.update(fill.at.tobytes())
                    for checkpoint, key, rows in fill.donors:
                        seen.update(f"{checkpoint.role} {key}".encode() + rows.tobytes())
    return seen.hexdigest()[:16]
