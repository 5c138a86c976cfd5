"""What a merge's bytes depend on, in a form that two runs can compare: inputs, recipe, versions, choices of the plan.

Weights are known by their headers' hash and each file's size and modification time: reading half a terabyte to find
out that nothing has changed would cost as much as the merge. The recipe's `hash_inputs` asks for it all the same. Small
files (configs, tokenizer, calibration sets) are hashed whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from . import __version__
from .errors import InputError
from .io.checkpoint import Checkpoint
from .output import Output
from .scan import dealt, file_pieces, opened, scan
from .threads import usable_cores

_UNBOUND = ("budget", "allow_unchanged")  # recipe keys that leave the bytes alone; a budget's choices are told apart


def fingerprint(output: Output, choices: dict[str, Any]) -> dict[str, Any]:
    """JSON-able and flat: what was looked at -> its value. `choices`: device, dtype, batch and threads of this run.
    InputError for a file that can no longer be read."""
    try:
        return _looked_at(output, choices)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}: is something else changing the "
                         "checkpoint?") from error


def _looked_at(output: Output, choices: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"streammerge": __version__}
    recipe = {key: value for key, value in output.recipe.items() if key not in _UNBOUND}
    found |= {f"recipe: {key}": value for key, value in _flat(recipe)}
    for role, checkpoint in output.inputs.items():
        found |= _of_checkpoint(role, checkpoint)
        if output.hash_inputs:
            found |= {f"{role}: {name}: SHA256": digest for name, digest in whole_hashes(checkpoint).items()}
    for name, content in output.sides.items():
        found[f"{output.donor.role}: {name}"] = _hash(content)
    for kind, path in output.calibration.items():
        found[f"calibration.{kind}: {path}"] = _hash(Path(path))
    found |= {f"version of {name}": importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    found["machine"] = platform.machine()
    return found | {f"run: {key}": value for key, value in choices.items()}


def whole_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA256 of every file of weights by its name, read piece by piece, several files at a time."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    with opened(files) as digests:
        scan(dealt(map(file_pieces, digests.values()), usable_cores()))
        return {name: digest.hexdigest() for name, digest in digests.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for everything that is not the same."""
    return [
        f"{key}: was {_short(before.get(key))}, is {_short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _of_checkpoint(role: str, checkpoint: Checkpoint) -> dict[str, Any]:
    headers: dict[Path, Any] = {}
    for name, info in checkpoint.tensors.items():
        seen = headers.setdefault(info.file, hashlib.sha256())
        seen.update(f"{name} {info.dtype} {info.shape} {info.start} {info.nbytes}\n".encode())
    found = {}
    for file, seen in headers.items():
        stat = file.stat()
        found[f"{role}: {file.name}"] = [seen.hexdigest()[:16], stat.st_size, stat.st_mtime_ns]
    name = checkpoint.config_name
    found[f"{role}: {name}"] = _hash(checkpoint.path / name)
    return found


def _hash(content: Path | bytes) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()[:16]


def _flat(value: dict[str, Any], prefix: str = ""):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
