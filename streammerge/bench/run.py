"""`streammerge bench`: how long would a RAIN merge of this shape take here, and how much memory?

Memory is the plan's own prediction for the whole model, from a hollow checkpoint of its real size. Time is measured on
the real sweep over a synthetic trio with a few layers of that shape, on this machine and this disk, with the settings
that the whole merge would run with, and extrapolated (extrapolate.py says how). Disk: the trio and the output of these
layers, in a scratch folder that is removed afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration import CalibrationSet
from ..device import compute_dtype, pick_device
from ..errors import RecipeError, ResourceError
from ..estimate import Estimate, predict
from ..io.header import tensor_bytes
from ..memory import format_size
from ..planned import Plan, make_plan
from ..progress import Progress
from ..recipe import Budget, parse_recipe
from ..sweep import surveyed
from . import samples
from .extrapolate import Whole, extrapolate
from .measure import forget, measure
from .shapes import Shape, tensors
from .synthetic import ROLES, hollow, make_trio

_VOCABULARY = 4096  # of the synthetic trio: what grows with the vocabulary is extrapolated


@dataclass(frozen=True)
class Question:
    """What is asked. None: a default that depends on the device."""

    shape: Shape
    layers: int | None = None  # to measure; 2 on a CPU, 4 on a GPU
    tokens: int | None = None  # of calibration to measure with; 4096 on a CPU, all on a GPU
    calibration_tokens: int = samples.AUTHORS  # of the merge that is asked about
    scope: str = "model"  # coefficients.scope
    budget: Budget = Budget()
    device: str = "auto"
    scratch: Path = Path(".")


def bench(asked: Question, progress: Progress | None = None, imports: float = 0.0) -> dict[str, Any]:
    """Measure, extrapolate, and return everything as one JSON-able report. `imports`: seconds that they took.

    Raises RecipeError for a question that makes no sense, ResourceError where a budget or the disk is too small.
    """
    device, progress = pick_device(asked.device), progress or Progress("quiet")
    asked = _settled(asked, device)
    with progress, _scratch(asked.scratch) as root:
        began = time.perf_counter()
        plan = _plan(asked, dict.fromkeys(ROLES, hollow(root / "whole", asked.shape.config())), root)
        once = {"imports": imports, "plan": time.perf_counter() - began}
        holdout, dtype = plan.recipe.calibration.holdout, compute_dtype(plan, device)
        whole = samples.calibration(asked.calibration_tokens, _VOCABULARY, holdout)
        settings = predict(plan, whole, device, dtype)
        on_gpu = _on_a_gpu(plan, whole) if device.type == "cpu" and asked.budget.device_memory != "auto" else None
        config = asked.shape.config(asked.layers, min(_VOCABULARY, asked.shape.vocabulary))
        _room(root, config)
        progress.event("bench", shape=asked.shape.name, layers=asked.layers, scratch=root)
        paths, write_rate = _make(root, config)
        target = _whole(plan, whole, settings, asked.shape.vocabulary / config["vocab_size"])
        small, where = _plan(asked, paths, root), (device, dtype)
        keep = round(target.kept * asked.layers) * target.lrm
        if device.type == "cuda" and asked.layers < plan.layers:  # what a GPU does once must not count a layer
            measure(small, samples.calibration(1, config["vocab_size"], holdout), settings, keep, where, root / "warm",
                    progress)  # fmt: skip
            shutil.rmtree(root / "warm")
        data = samples.calibration(asked.tokens, config["vocab_size"], holdout, samples.rows(whole))
        found = measure(small, data, settings, keep, where, root / "out", progress)
    answer = extrapolate(found, target, write_rate, once)
    return {
        "shape": dataclasses.asdict(asked.shape),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "scope": asked.scope,
        "thinking_positions": {"measured": samples.rows(data), "whole": samples.rows(whole)},
        "plan": settings.as_dict(),
        "plan_on_gpu": on_gpu,
        "whole": dataclasses.asdict(target),
        "measured": dataclasses.asdict(found) | {"write_rate": write_rate},
        "extrapolated": dataclasses.asdict(answer),
        "left_out": ["tokenisation"],
    }


def _settled(asked: Question, device: torch.device) -> Question:
    """With its defaults filled in. Raises RecipeError for too many layers, or a scratch that is no directory."""
    gpu, depth = device.type == "cuda", asked.shape.layers
    layers = asked.layers or min(depth, 4 if gpu else 2)
    if layers > depth:
        raise RecipeError(f"--layers {layers}: the {asked.shape.name} shape has {depth} layers; measure fewer")
    if not asked.scratch.is_dir():
        raise RecipeError(f"--scratch-dir {asked.scratch}: no such directory; give one on the disk of your models")
    tokens = min(asked.calibration_tokens, asked.tokens or (asked.calibration_tokens if gpu else 4096))
    return dataclasses.replace(asked, layers=layers, tokens=tokens)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A new folder, gone afterwards whatever happens."""
    try:
        root = Path(tempfile.mkdtemp(prefix="streammerge-bench-", dir=parent.absolute()))
    except OSError as error:
        raise ResourceError(f"--scratch-dir {parent}: {error.strerror}; give a directory that can be written") from None
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _plan(asked: Question, paths: dict[str, Path], root: Path) -> Plan:
    """A RAIN merge at the defaults. The calibration sets come as ids: the files that it names are empty."""
    (root / "none").touch()
    recipe = {
        "merge_method": "rain", "base_model": str(paths["base"]), "instruct_model": str(paths["itm"]),
        "reasoning_model": str(paths["lrm"]), "coefficients": {"scope": asked.scope},
        "calibration": {"reasoning": str(root / "none"), "instruction": str(root / "none")},
    }  # fmt: skip
    return make_plan(parse_recipe(json.dumps(recipe), "bench", budget=asked.budget))


def _whole(plan: Plan, data: CalibrationSet, settings: Estimate, vocabulary: float) -> Whole:
    """The sizes of the merge that is asked about."""
    first = plan.layer_tensors(0)
    lrm = sum(plan.lrm.tensors[n].nbytes for n in first)
    outside = sum(t.nbytes for t in plan.lrm.tensors.values()) - plan.layers * lrm
    held = sum(len(s.ids) for s in data.heldout)
    tokens = {"reasoning": sum(len(s.ids) for s in data.reasoning), "reference": held, "verification": held}
    tokens["instruction"] = sum(len(s.ids) for s in data.instruction)
    twice = surveyed(plan)
    return Whole(
        layers=plan.layers, tokens=tokens, lrm=lrm, outside=outside, vocabulary=vocabulary, passes=2 if twice else 1,
        others=sum(c.tensors[n].nbytes for n in first if n in plan.merged for c in (plan.itm, plan.base)),
        kept=min(1.0, settings.keep // lrm / plan.layers) if twice else 0.0,
    )  # fmt: skip


def _on_a_gpu(plan: Plan, data: CalibrationSet) -> dict[str, Any]:
    """What a GPU with this device budget would need, asked where there is none; its time cannot be measured here."""
    gpu = torch.device("cuda")
    return predict(plan, data, gpu, compute_dtype(plan, gpu)).as_dict()


def _room(root: Path, config: dict[str, Any]) -> None:
    """Raises ResourceError unless the disk takes the trio and the output."""
    needed = 4 * sum(tensor_bytes(t.dtype, t.shape) for t in tensors(config))
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ResourceError(f"--scratch-dir {root.parent}: {format_size(needed)} needed for a synthetic trio of "
                            f"{config['num_hidden_layers']} layers and its merge, {format_size(free)} free; "
                            "give a directory on a larger disk, or fewer --layers")


def _make(root: Path, config: dict[str, Any]) -> tuple[dict[str, Path], float]:
    """The trio, and the bytes a second at which it reached the disk."""
    began = time.perf_counter()
    paths = make_trio(root / "trio", config)
    forget(paths.values())
    size = sum(f.stat().st_size for path in paths.values() for f in path.iterdir())
    return paths, size / (time.perf_counter() - began)
