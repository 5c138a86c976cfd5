"""From a name in a recipe to a directory: a local one, or a snapshot in the Hub's cache. Never a network call."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputError
from .refusals import GGUF

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (*PICKLES, ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".npy")
CODE = (".py", ".pyc", ".so", ".sh", ".ipynb")


def resolve_model(name: str, key: str) -> Path:
    """A local directory, else a model of the Hub cache ('id' or 'id@revision'); never a network call.

    Raises InputError that names the recipe key, what was tried, and the next step.
    """
    local = Path(os.path.expanduser(name))
    if os.path.isdir(local):  # unlike pathlib's, these take any text
        return local
    tried = f"{key}: {name[:200]!r}: "
    if os.path.exists(local) and name.endswith(".gguf"):
        raise InputError(tried + GGUF)
    if os.path.exists(local):
        raise InputError(tried + "is a file, wanted the directory with config.json and the .safetensors files")
    repo, _, revision = name.partition("@")
    if len(name) > 300 or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", repo):
        raise InputError(tried + f"no such directory ({_shown(local)}), and not a Hub id either: correct the path")
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise InputError(tried + f"no such directory ({_shown(local)}), and without huggingface_hub the Hub cache "
                         f"cannot be searched: correct the path, or pip install it and run: {command}") from None
    # only what a merge reads has to be there: a snapshot without its pickles or its card is complete for us
    skipped = ["*/*", ".*", "*.md", "consolidated*", "*.onnx_data", *("*" + s for s in OTHER_WEIGHTS + CODE)]
    try:
        found = snapshot_download(repo, revision=revision or None, local_files_only=True, ignore_patterns=skipped)
        return _inside_cache(Path(found), Path(constants.HF_HUB_CACHE), repo, tried)
    except (OSError, ValueError) as error:
        partly = getattr(error, "snapshot_path", None)
        state = f"its download is incomplete ({partly})" if partly else "it is not in the Hub cache"
        raise InputError(tried + f"no such directory ({_shown(local)}), and as a Hub id, {state} "
                         f"({constants.HF_HUB_CACHE}). Correct the path, or run: {command}") from error


def _inside_cache(snapshot: Path, cache: Path, repo: str, tried: str) -> Path:
    """The snapshot, if it is where the cache keeps this model's: a revision, or a ref on disk, may be any path."""
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    if snapshot.resolve().parent != snapshots.resolve():
        raise InputError(tried + f"its revision leads out of the Hub cache (to {_shown(snapshot)}): name a branch, "
                         "a tag or a commit, or delete the model from the cache and download it again")
    return snapshot


def _shown(path: Path) -> str:
    text = os.path.abspath(path)
    return text if len(text) <= 300 else text[:299] + "…"
