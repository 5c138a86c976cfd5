"""streammerge: a memory-lean streaming merger for large reasoning models.

    import streammerge
    report = streammerge.merge("recipe.yml", "merged-model")

Names resolve on first use: importing this package does not import torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "merge": "api",
    "plan": "api",
    "verify": "api",
    "MergeReport": "api",
    "Step": "progress",
    "Findings": "findings",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "Recipe": "recipe",
    "StreamMergeError": "errors",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("." + _HOME[name], __name__), name)
