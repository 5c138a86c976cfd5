"""Where a merge with calibration runs: its device, the dtype of its forwards, the disk for what memory has no room for,
and what of all that its last bits follow from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from . import memory, quantized
from .errors import RecipeError, ResourceError
from .estimate import Estimate
from .io.checkpoint import TORCH_DTYPES
from .io.claim import STATE
from .memory import parse_size
from .planned import Plan
from .recipe import Recipe


def pick_device(name: str) -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> a device that is there. Raises RecipeError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: streammerge runs on cpu and cuda; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu, or install "
                          "a CUDA build of torch")
    return device


def compute_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """The dtype of the calibration forwards: fp32 on a CPU (faster there, and exacter), the LRM's own on a GPU."""
    if plan.recipe.compute_dtype != "auto":
        return getattr(torch, plan.recipe.compute_dtype)
    weight = plan.lrm.tensors[plan.family.weight(0, "q")]  # norms may be stored wider than what they scale
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[weight.dtype]


def circumstances(recipe: Recipe, where: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the batches and the last bits follow from, besides the recipe: a resume on other terms would show."""
    budget = recipe.budget
    return {
        "device": where.type,
        "compute dtype": str(dtype).removeprefix("torch."),
        "CPU threads": torch.get_num_threads(),
        "device memory": memory.total(str(where)) if budget.device_memory == "auto" else budget.device_memory,
        "host memory": memory.total("host") if budget.host_memory == "auto" else budget.host_memory,
        "tokens per batch": budget.tokens_per_batch,
        "bitsandbytes": None if recipe.capture_weights == "native" else quantized.version(),
    }


def spill_folder(recipe: Recipe, out: Path, estimate: Estimate) -> Path | None:
    """Where activations are spilled, None where they need not be. ResourceError where they have no room there."""
    if not estimate.spill:
        return None
    folder, limit = Path(recipe.budget.scratch_dir or out / STATE), recipe.budget.scratch_space
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ResourceError(f"--scratch-dir {folder}: {error.strerror}; give a directory that can be written") from None
    room = free if limit == "auto" else min(free, parse_size(limit))
    if estimate.scratch > room:
        raise ResourceError(f"{folder}: the activations that the host has no room for take "
                            f"{memory.format_size(estimate.scratch)} of disk, {memory.format_size(room)} "
                            f"{'are free' if room == free else 'are given (--scratch-space)'}; give --scratch-dir a "
                            "larger disk, raise --host-memory, or use fewer calibration samples")
    return folder
