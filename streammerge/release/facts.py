"""What card and SBOM tell of a merge: inputs by the names that others know, and nothing of this machine's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.checkpoint import Checkpoint
from ..output import Output
from .licence import Licence, Stated, of_merge, stated


@dataclass(frozen=True)
class Facts:
    """`manifest`: its content (versions, inputs with revisions and hashes, calibration files); `result`: the report."""

    output: Output
    manifest: Mapping[str, Any]
    result: Mapping[str, Any]
    licence: Licence
    stated: Mapping[str, Stated]  # by role

    def shown(self, role: str) -> str:
        """An input's Hub id, or the last part of its path."""
        told = self.manifest["inputs"][role]
        return told.get("repo") or told["name"]


def gather(output: Output, manifest: Mapping[str, Any], result: Mapping[str, Any]) -> Facts:
    """The facts of a finished merge."""
    each = {role: stated(checkpoint) for role, checkpoint in output.inputs.items()}
    names = {role: told.get("repo") or told["name"] for role, told in manifest["inputs"].items()}
    unique = {names[role] if list(names.values()).count(names[role]) == 1 else f"{names[role]} ({role})": role
              for role in names}  # fmt: skip
    licence = of_merge({shown: each[role] for shown, role in unique.items()},
                       next(shown for shown, role in unique.items() if role == output.donor.role))  # fmt: skip
    return Facts(output, manifest, result, licence, each)


def origin(path: Path) -> dict[str, str]:
    """A model of the Hub's cache by its id and revision, any other by the last part of its path."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repo = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"repo": repo, "revision": path.name}
    return {"name": Path(os.path.abspath(path)).name or "model"}


def stored_hash(file: Path) -> str:
    """The SHA256 that the Hub's cache knows a file by (a link to a blob of that name), '' where it does not."""
    name = Path(os.path.realpath(file)).name
    return name if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else ""


def published(output: Output) -> dict[str, Any]:
    """The recipe as others may see it: local paths by their last part, snapshots of the Hub's cache by their id."""
    folder = os.path.dirname(os.path.abspath(output.source))
    places = {os.path.abspath(c.path): c for c in output.inputs.values()}

    def show(text: str) -> str:
        if not text:
            return text
        path = os.path.normpath(os.path.join(folder, os.path.expanduser(text)))
        if path in places:
            return _by_id(places[path]) or os.path.basename(path)
        if text in output.names or os.path.isabs(text) or text.startswith(("./", "../", "~/")):
            return os.path.basename(path)
        return text

    return _over_texts(output.recipe, show)


def as_written(output: Output) -> dict[str, Any]:
    """The recipe with its paths as its user wrote them."""
    return _over_texts(output.recipe, lambda text: output.names.get(text, text))


def _by_id(checkpoint: Checkpoint) -> str:
    told = origin(checkpoint.path)
    return f"{told['repo']}@{told['revision']}" if "repo" in told else ""


def _over_texts(value: Any, change: Any) -> Any:
    """`value` with every text in it changed; keys stay."""
    if isinstance(value, Mapping):
        return {key: _over_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_over_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value
