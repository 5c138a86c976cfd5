"""Snapshots of a sweep between two layers, and the way back into one (journal.py says when and how they are kept).

A snapshot is what the layers to come need of those before: attention masses and what became of each tensor in the
journal, activations of the streams that have moved in one safetensors file. Layers whose tensors a snapshot speaks of
lie in the partial shards, on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from .attention import LayerMass
from .errors import Refused
from .io.checkpoint import TORCH_DTYPES, Checkpoint
from .io.drain import Drain
from .io.header import encode_header, read_header
from .journal import save_kept
from .outcome import Composed
from .run import Run

STAGES = ("survey", "merge")


def take(run: Run, drain: Drain, stage: str, layer: int) -> None:
    """Save a snapshot if it is time: `layer` is the next to be done in `stage`. Waits for the drain and the disk."""
    journal = run.journal
    if journal is None or not journal.due():
        return
    began = time.monotonic()
    drain.flush()
    run.writer.flush()
    moved = run.streams.moving(stage, run.plan.recipe.surveys) if layer else []
    file = journal.folder / f"activations-{stage}-{layer:05d}.safetensors" if moved else None
    try:
        digest = _save_activations(file, run, moved) if file else None
    except OSError as error:
        _forget(file)
        journal.skip(f"{file}: the snapshot for a resume cannot be written: {error.strerror}", began)
        return
    names = [n for i in range(layer) for n in run.plan.layer_tensors(i)] if stage == "merge" else []
    saved = save_kept(run.writer, journal, {
        "stage": stage, "layer": layer, "placed": names,
        "label": f"{stage}: {layer} of {run.plan.layers} layers done",
        "masses": {str(i): [m.alignment.tolist(), m.leakage.tolist()] for i, m in run.masses.items()},
        "composed": {name: dataclasses.asdict(told) for name, told in run.composed.items()},
        "activations": file and file.name, "sha256": digest,
    }, began)  # fmt: skip
    if not saved:
        return _forget(file) if file else None
    for old in journal.folder.glob("activations-*.safetensors"):
        if old != file:
            old.unlink()


def _forget(file: Path) -> None:
    """What was written in vain leaves its room to the output."""
    with suppress(OSError):
        file.unlink()


def restore(run: Run) -> tuple[str, int]:
    """Take up what an earlier run saved; returns the stage and the layer to go on with, ("survey", 0) for none."""
    state = run.journal.state if run.journal else None
    if state is None:
        return STAGES[0], 0
    for layer, (alignment, leakage) in state["masses"].items():
        run.masses[int(layer)] = LayerMass(*(torch.tensor(v, dtype=torch.float64) for v in (alignment, leakage)))
    run.composed |= {name: Composed(**told) for name, told in state["composed"].items()}
    if state["activations"]:
        held = read_back(run.journal.folder / state["activations"], state["sha256"])
        for name, stream in run.streams.named().items():
            for n in range(len(stream.batches)):
                if f"{name}/{n}" in held.tensors:
                    stream.stash.put(n, held.read(f"{name}/{n}").to(run.model.device))
    return state["stage"], state["layer"]


def _save_activations(file: Path, run: Run, names: list[str]) -> str:
    """These streams' hidden states as one safetensors file, a batch in memory at a time -> its SHA256. OSError."""
    stashes = {name: run.streams.named()[name].stash for name in names}
    order = [(name, n, shape, dtype) for name, stash in stashes.items() for n, (shape, dtype) in stash.kept().items()]
    codes = {dtype: code for code, dtype in TORCH_DTYPES.items()}
    found = hashlib.sha256()
    with open(file, "wb", buffering=0) as out:
        pieces = [encode_header([(f"{name}/{n}", codes[dtype], tuple(shape)) for name, n, shape, dtype in order])[0]]
        for piece in chain(pieces, (_raw(stashes[name].on_host(n)) for name, n, *_ in order)):
            found.update(piece)
            left = memoryview(piece)
            while left:
                left = left[out.write(left) :]
        os.fsync(out.fileno())
    return found.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_back(file: Path, sha256: str) -> Checkpoint:
    """Tensors that the merge which is gone on with had saved. Refused where they are not what they were."""
    problems: list[str] = []
    try:
        if _digest(file) != sha256:
            raise OSError("its hash has changed")
        found = read_header(file, problems)
        if problems:
            raise OSError(problems[0])
    except OSError as error:
        raise Refused(f"{file}: is not what the unfinished merge had written ({error}). Add --restart to begin "
                         "anew") from error
    return Checkpoint(file.parent, "snapshot", found, {})


def _digest(file: Path) -> str:
    """SHA256 by plain reads: a disk that fails says so, where a mapped page would kill the process."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            found.update(piece)
    return found.hexdigest()
