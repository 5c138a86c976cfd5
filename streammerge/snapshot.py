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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .attention import LayerMass
from .errors import InputError, ResourceError
from .io.drain import Drain
from .journal import Journal
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
    file = _save_activations(journal, run, moved, f"{stage}-{layer:05d}") if moved else None
    names = [n for i in range(layer) for n in run.plan.layer_tensors(i)] if stage == "merge" else []
    run.writer.keep()
    journal.save({
        "stage": stage, "layer": layer, "placed": names,
        "label": f"{stage}: {layer} of {run.plan.layers} layers done",
        "masses": {str(i): [m.alignment.tolist(), m.leakage.tolist()] for i, m in run.masses.items()},
        "composed": {name: dataclasses.asdict(told) for name, told in run.composed.items()},
        "activations": file and file.name, "sha256": file and _digest(file),
    }, began)  # fmt: skip
    for old in journal.folder.glob("activations-*.safetensors"):
        if old != file:
            old.unlink()


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
                if f"{name}/{n}" in held:
                    stream.stash.put(n, held[f"{name}/{n}"].to(run.model.device))
    return state["stage"], state["layer"]


def _save_activations(journal: Journal, run: Run, names: list[str], label: str) -> Path:
    streams = run.streams.named()
    tensors = {f"{name}/{n}": t.contiguous() for name in names for n, t in streams[name].stash.on_host().items()}
    file = journal.folder / f"activations-{label}.safetensors"
    with _telling(file):
        save_file(tensors, file)
        _sync(file)
    return file


@contextmanager
def _telling(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{file}: the snapshot for a resume cannot be written ({error}); free some disk and run "
                            "the same command again") from error


def read_back(file: Path, sha256: str) -> dict[str, Tensor]:
    """Tensors that the merge which is gone on with had saved. InputError where they are not what they were."""
    try:
        if _digest(file) != sha256:
            raise OSError("its hash has changed")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: is not what the unfinished merge had written ({error}). Add --restart to begin "
                         "anew") from error


def _digest(file: Path) -> str:
    """SHA256 by plain reads: a disk that fails says so, where a mapped page would kill the process."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def _sync(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
