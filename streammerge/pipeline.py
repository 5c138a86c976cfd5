"""A merge from recipe to verified checkpoint: the stages in order, and the cleaning up when one of them fails.

plan -> calibration -> sweep (merging and writing) -> side files -> verification -> report. Whatever raises, nothing
is left under a final name: the writer's partial files go, and so does an output directory that this run made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import kernels, memory, quantized, report
from .artifacts import Artifacts
from .calibration import CalibrationSet, load_calibration
from .device import circumstances, compute_dtype, pick_device, spill_folder
from .errors import InputError, OutOfMemory, Overflow
from .estimate import Estimate, predict
from .fingerprint import fingerprint
from .finish import conclude, peaks, refuse_certainly_unchanged, refuse_unchanged
from .forward import StreamedModel
from .io.claim import STATE, refuse_inside
from .io.writer import CheckpointWriter
from .journal import EVERY, Journal, resumed
from .l_think import think_loss
from .markers import find_markers, load_tokenizer
from .memory import parse_size
from .planned import Plan, distinct, make_plan
from .progress import Progress
from .recipe import Recipe
from .run import Run, Streams
from .sweep import surveyed, sweep
from .verified import verify_output
from .workers import Workers

_LEAST_TOKENS = 256  # of a batch: below it smaller ones save little
_EMPTY = CalibrationSet((), (), (), {})


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    restart: bool = False,
    save_every: float = EVERY,
    artifacts: str | Path | None = None,
) -> dict[str, Any]:
    """Merge as the recipe says and write a checkpoint to `out`, a directory that is new, empty, or holds this very
    merge unfinished: then it goes on there, unless `restart` says to drop it.

    Every `save_every` seconds it saves how far it has come. `artifacts`: a directory in which bases and attention
    masses are kept for later merges of the same LRM, and looked for. Returns the report (also written to `out`/
    streammerge_report.json). Raises a StreamMergeError that says what to do; `out` then holds nothing, or what was
    saved for a resume.
    """
    progress = progress or Progress("quiet")
    try:
        return _merge(recipe, Path(out), device, progress, restart, save_every, artifacts)
    except OutOfMemory as error:
        if error.tokens <= _LEAST_TOKENS:
            raise
        half = max(_LEAST_TOKENS, error.tokens // 2)
        told = f"out of memory with batches of {error.tokens} tokens: done again with {half}"
    progress.event(told)
    smaller = replace(recipe, budget=replace(recipe.budget, tokens_per_batch=half))
    return _merge(smaller, Path(out), device, progress, True, save_every, artifacts, (told,))


def _merge(
    recipe: Recipe,
    out: Path,
    device: str,
    progress: Progress,
    restart: bool,
    save_every: float,
    artifacts: str | Path | None,
    warnings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """One attempt. Raises OutOfMemory where the layers found less memory than the plan."""
    began = time.perf_counter()
    where = pick_device(device)
    kernels.forget()
    quantized.check(recipe, where)
    fresh_meter, floor = memory.reset_host_peak(), memory.host_now()
    memory.reset_device_peak(where)
    with progress:
        plan = make_plan(recipe)
        refuse_inside(out, distinct(plan.lrm, plan.itm, plan.base))
        dtype = compute_dtype(plan, where)
        found = fingerprint(plan.output, circumstances(recipe, where, dtype))
        journal = Journal(out / STATE, found, every=save_every, tell=progress.event)
        kept = Artifacts(Path(artifacts), plan, found, progress.event) if artifacts else None
        go_on = partial(resumed, journal, restart=restart)
        with CheckpointWriter(out, plan.tensors, parse_size(recipe.shard_size), go_on) as writer:  # a bad OUT first
            data = _still_needed(calibrate(plan, progress), kept, journal)
            estimate = predict(plan, data, where, dtype)
            memory.fit_allocator(estimate.hidden)
            refuse_certainly_unchanged(plan)
            with Workers(estimate.workers) as workers:
                model = StreamedModel(plan.lrm, plan.family, where, dtype, workers)
                run = _laid_out(plan, model, data, estimate, writer, progress)
                run.journal, run.artifacts = journal, kept
                with _telling_memory(estimate.tokens_per_batch), _naming_model(plan, dtype):
                    _sweep(run)
                    told = _describe(run)
            if kept:
                kept.finish(run.masses)
            refuse_unchanged(plan, told["totals"])
            _copy_rest(plan, writer)
            writer.finish()
            result = {
                **report.inputs(plan.output),
                **told,
                "warnings": [*warnings, *plan.warnings, *report.rank_warnings(told["modules"]), *_heard(run)],
                "calibration": data.notes | {"heldout": len(data.heldout)},
                "verified": verify_output(plan.output, out),
                "device": str(where),
                "threads": torch.get_num_threads(),
                "compute_dtype": str(dtype).removeprefix("torch."),
                "kernels": kernels.ran(),
                "plan": estimate.as_dict(),
                "memory": peaks(str(where), floor, fresh_meter),
                "seconds": {"total": round(time.perf_counter() - began, 3), "sweep": round(run.meter.seconds, 3)},
                "resumed_at": journal.resumed_at,
                "artifacts": {"reused": kept.reused, "wanted": kept.wanted} if kept else None,
            }
            conclude(writer, plan.output, result)
    return result


def _laid_out(
    plan: Plan, model: StreamedModel, data: CalibrationSet, estimate: Estimate, writer: CheckpointWriter,
    progress: Progress,
) -> Run:  # fmt: skip
    """The sweep before its first layer, as the estimate says. ResourceError where the scratch disk has no room."""
    spill = spill_folder(plan.recipe, writer.out, estimate)
    streams = Streams.open(data, estimate.tokens_per_batch, model.device, offload=estimate.offload, spill=spill)
    return Run(plan, model, data, streams, writer, progress, estimate.ahead, estimate.keep, spill)


def _still_needed(data: CalibrationSet, kept: Artifacts | None, journal: Journal) -> CalibrationSet:
    """Without the sets whose findings an earlier merge has left."""
    memory.give_back()  # the tokenizer's
    if kept and journal.state is None:
        kept.forget_partial()
    if kept and "bases" in kept.reused:
        data = replace(data, reasoning=())
    return replace(data, instruction=()) if kept and "masses" in kept.reused else data


@contextmanager
def _telling_memory(tokens: int) -> Iterator[None]:
    """Every way in which torch and Python say that memory has run out, as one error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(tokens, str(error).splitlines()[0] if str(error) else "host") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(tokens, "host") from error


@contextmanager
def _naming_model(plan: Plan, dtype: torch.dtype) -> Iterator[None]:
    """Activations that overflow are told with their model; in fp32 or bf16, which hardly can, its config is doubted."""
    try:
        yield
    except Overflow as error:
        advice = str(error)
        if dtype != torch.float16:
            advice = (f"{error.where} are not finite, though all weights are and {dtype} has the room: is config.json "
                      "that of these weights (rms_norm_eps, rope_parameters)? Download both again")
        raise InputError(f"reasoning_model: {plan.lrm.path}: {advice}") from error


def calibrate(plan: Plan, progress: Progress) -> CalibrationSet:
    """The recipe's calibration sets as the LRM's tokenizer reads them; empty where the recipe needs none.

    Without Stage 1 only the held-out part of the reasoning set is kept, for L_think.
    """
    recipe = plan.recipe
    if not (recipe.calibration.reasoning or recipe.needs_instruction):
        return _EMPTY
    progress.event("calibration")
    tokenizer = load_tokenizer(plan.lrm.path)
    markers = find_markers(tokenizer, recipe.thinking, plan.lrm.path)
    limit = plan.lrm.config.get("max_position_embeddings") or 1 << 30
    data = load_calibration(recipe, tokenizer, markers, limit, plan.lrm.path)
    reasoning = data.reasoning if recipe.needs_reasoning else ()
    return replace(data, reasoning=reasoning, instruction=data.instruction if recipe.needs_instruction else ())


def _sweep(run: Run) -> None:
    """Run the sweep under a progress bar."""
    passes = 2 if surveyed(run.plan) else 1  # the work: token-layers, and one for each layer of a pass
    work = (passes + sum(s.tokens for s in run.streams.all())) * run.plan.layers
    run.progress.start("survey of the LRM, then merge" if passes == 2 else "sweep", work)
    sweep(run)
    run.progress.stop()


def _copy_rest(plan: Plan, writer: CheckpointWriter) -> None:
    """The LRM's tensors outside the decoder layers, and its config, tokenizer, template and licence: byte copies."""
    for name in plan.copied:
        if not name.startswith(plan.family.layers + "."):
            writer.copy(name, plan.lrm)
    for name, content in plan.output.sides.items():
        writer.add_file(name, content)


def _describe(run: Run) -> dict[str, Any]:
    """The parts of the report that come from the sweep; computes L_think from its last hidden states."""
    plan, streams = run.plan, run.streams
    loss = {}
    if streams.reference and streams.verification:
        loss = think_loss(run.model, plan.head, run.data.heldout, streams.reference, streams.verification)
    return {
        "alpha": report.alpha_summary(run.alphas, plan.recipe.coefficients.bounds),
        "totals": report.totals(run.composed),
        "modules": report.by_module(plan, run.composed),
        "per_tensor": report.per_tensor(plan, run.composed),
        "l_think": loss,
        "attention": {str(i): {"alignment": m.alignment.tolist(), "leakage": m.leakage.tolist()}
                      for i, m in sorted(run.masses.items())},
        "throughput": _throughput(run),
        "capture": run.quantized.as_dict() if run.quantized else {"weights": "native"},
    }  # fmt: skip


def _throughput(run: Run) -> dict[str, Any]:
    """Rates of the sweep, and its waits: `busy_share` is the device's (None on a CPU), `waiting_share` for weights."""
    meter, tokens = run.meter, sum(s.tokens for s in run.streams.all())
    busy = meter.busy
    return {
        "calibration_tokens": tokens,
        "token_layers_per_second": tokens * run.plan.layers / meter.seconds,
        "bytes_read": meter.nbytes,
        "bytes_per_second": meter.nbytes / meter.seconds,
        "waiting_share": meter.waited / meter.seconds,
        "busy_share": None if busy is None else busy / meter.seconds,
    }


def _heard(run: Run) -> list[str]:
    """What a user might look for and not find: L_think, cached layers, saves, artifacts."""
    told = []
    if not run.data.heldout:
        told = ["L_think was not measured: it needs held-out samples (calibration.reasoning, calibration.holdout)"]
    told += run.quantized.warnings() if run.quantized else []
    return [*told, *run.journal.warnings, *(run.artifacts.warnings if run.artifacts else [])]
