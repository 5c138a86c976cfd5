"""From a name in a recipe to a directory: a local one, or a snapshot in the Hub's cache. Never a network call."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (*PICKLES, ".pkl", ".pickle", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".npy")
CODE = (".py", ".pyc", ".so", ".sh", ".ipynb")


def resolve_model(name: str, key: str) -> Path:
    """A local directory, else a model of the Hub cache ('id' or 'id@revision'); never a network call.

    Raises InputError that names the recipe key, what was tried, and the next step.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    tried = f"{key}: {name!r}: "
    if local.exists():
        raise InputError(tried + "is a file, wanted the directory with config.json and the .safetensors files")
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", repo):
        raise InputError(tried + f"no such directory ({local.absolute()}), and not a Hub id either: correct the path")
    command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise InputError(tried + f"no such directory ({local.absolute()}), and without huggingface_hub the Hub cache "
                         f"cannot be searched: correct the path, or pip install it and run: {command}") from None
    # only what a merge reads has to be there: a snapshot without its pickles or its card is complete for us
    skipped = ["*/*", ".*", "*.md", "consolidated*", "*.onnx_data", *("*" + s for s in OTHER_WEIGHTS + CODE)]
    try:
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True, ignore_patterns=skipped))
    except (OSError, ValueError) as error:
        partly = getattr(error, "snapshot_path", None)
        state = f"its download is incomplete ({partly})" if partly else "it is not in the Hub cache"
        raise InputError(tried + f"no such directory ({local.absolute()}), and as a Hub id, {state} "
                         f"({constants.HF_HUB_CACHE}). Correct the path, or run: {command}") from error
