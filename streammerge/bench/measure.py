"""The real sweep over a synthetic trio with a few layers, and where its time went.

The sweep, the reader, the writer and the verification are those of a merge. What is left out is tokenisation: the
calibration sets come as ids. Pages of the trio leave the page cache first, so that reading is the disk's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import memory
from ..calibration import CalibrationSet
from ..estimate import Estimate
from ..finish import peaks
from ..forward import StreamedModel
from ..io.checkpoint import side_files
from ..io.writer import CheckpointWriter
from ..l_think import think_loss
from ..memory import parse_size
from ..planned import Plan
from ..progress import Progress
from ..run import Run, Streams
from ..sweep import read_order, sweep
from ..verified import verify_output
from ..workers import Workers


@dataclass(frozen=True)
class Measured:
    """Seconds, bytes and rates of one sweep. `parts`: the sweep's work by part, as run.Meter tells it."""

    layers: int
    tokens: dict[str, int]  # by stream
    parts: dict[str, float]
    sweep: float  # the whole of it, waits and all
    waited: float  # for weights
    blocked: float  # for the writer
    busy: float | None  # work of the device; None on a CPU
    think: float  # L_think
    verify: float
    nbytes: int  # read by the sweep
    written: int  # bytes of the output
    rank: float  # mean over the merged tensors, a share of their input width
    read_rate: float  # bytes a second
    memory: dict[str, Any]


def measure(
    plan: Plan, data: CalibrationSet, settings: Estimate, keep: int, where: tuple[torch.device, torch.dtype], out: Path,
    progress: Progress,
) -> Measured:  # fmt: skip
    """Merge the synthetic trio of `plan` into `out` with a full-size merge's settings.

    `keep`: bytes of the LRM's layers that stay on the GPU between the passes of scope `model`.
    """
    device, dtype = where
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier run reserved
    fresh, floor = memory.reset_host_peak(), memory.host_now()
    memory.reset_device_peak(device)
    shards = parse_size(plan.recipe.shard_size)
    with CheckpointWriter(out, plan.tensors, shards) as writer, Workers(settings.workers) as workers:
        model = StreamedModel(plan.lrm, plan.family, device, dtype, workers)
        model.ends_early = False  # of the few layers measured none shall be cheaper than those that they stand for
        streams = Streams.open(data, settings.tokens_per_batch, device, offload=settings.offload)
        run = Run(plan, model, data, streams, writer, progress, settings.ahead, keep)
        forget(c.path for c in (plan.lrm, plan.itm, plan.base))
        rate = _read_rate(run)
        forget(c.path for c in (plan.lrm, plan.itm, plan.base))
        progress.start(f"sweep over {plan.layers} layers", plan.layers)
        sweep(run)
        progress.stop()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the sweep's last forwards
        began = time.perf_counter()
        think_loss(model, plan.head, data.heldout, streams.reference, streams.verification)
        think = time.perf_counter() - began
        _copy_rest(plan, writer)
        writer.finish()
    began = time.perf_counter()
    verify_output(plan.output, out)
    verify = time.perf_counter() - began
    meter, told = run.meter, run.composed.values()
    used = peaks(str(device), floor, fresh)
    if device.type == "cuda":
        used["device_reserved"] = torch.cuda.max_memory_reserved(device)
    return Measured(
        layers=plan.layers, tokens={name: s.tokens for name, s in streams.named().items()}, parts=meter.parts,
        sweep=meter.seconds, waited=meter.waited, blocked=meter.blocked, busy=meter.busy, think=think, verify=verify,
        nbytes=meter.nbytes, written=sum(t.nbytes for t in plan.lrm.tensors.values()),
        rank=sum(c.rank / c.width for c in told) / len(told), read_rate=rate, memory=used,
    )  # fmt: skip


def forget(folders: Iterable[Path]) -> None:
    """Write the files of these folders out to the disk, and drop their pages from the page cache where that can be."""
    for file in (f for folder in folders for f in Path(folder).iterdir() if f.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read_rate(run: Run) -> float:
    """Bytes a second of the sweep's own reader with nothing else to do: one layer of the three models."""
    order = read_order(run.plan, 0)
    began = time.perf_counter()
    with run.feed(order) as feed:
        for checkpoint, name in order:
            feed.take(checkpoint, name)
        if run.model.device.type == "cuda":
            torch.cuda.synchronize(run.model.device)
        return feed.nbytes / (time.perf_counter() - began)


def _copy_rest(plan: Plan, writer: CheckpointWriter) -> None:
    """The LRM's tensors outside the layers, and its config."""
    for name in plan.copied:
        if not name.startswith(plan.family.layers + "."):
            writer.copy(name, plan.lrm)
    for source in side_files(plan.lrm.path):
        writer.add_file(source.name, source)
