"""What mergekit has and this reader has not: named, with the reason and what to do instead."""

from __future__ import annotations

import re

from ..errors import RecipeError

_KEYS = {
    "modules": "is not supported: modules of a model cannot be merged in different ways; use models (every stack of "
               "layers is then merged, each over its own layers)",
    "lora": "is not supported here: an adapter is no checkpoint; merge it into its model first (peft: "
            "merge_and_unload) and name the result, or, in a rain recipe, give the adapter as instruct_model",
    "override_architecture": "is not supported: layers are found by the names of the tensors, whatever config.json "
                             "says; drop it",
    "tokens": "is not supported: embeddings of single tokens cannot be set; drop it, or edit the embedding afterwards",
    "union": "is not supported: it would make a new tokenizer; name one whose vocabulary the output shall have (base, "
             "or a model): tokens that a model lacks are filled in from the others",
    "residual_weight": "has no effect in mergekit either; drop it",
}  # fmt: skip

METHOD_REASONS = {
    "nearswap": "is not supported: it keeps the base where two models lie far apart; try slerp or ties",
    "multislerp": "is not supported; karcher is another mean of several models on the sphere",
    "ram": "is not supported; ties and sce also weigh models by where their changes agree",
    "ramplus_tl": "is not supported; ties and sce also weigh models by where their changes agree",
    "arcee_fusion": "is not supported: it picks weights by a sample that differs from run to run; try sce",
    "rain": "is no method of mergekit; in a rain recipe the models are base_model, instruct_model and reasoning_model",
}

_KINDS = {  # top-level keys of other commands' files
    ("experts", "gate_mode", "shared_experts", "experts_per_token"): (
        "a mixture of experts, for mergekit-moe: it builds a new architecture and does not merge; run mergekit-moe"
    ),
    ("genome", "tasks"): (
        "an evolutionary search, for mergekit-evolve: it runs benchmarks to find parameters; take the merge "
        "configuration that it ends with"
    ),
}


def reason(key: str) -> str:
    """The words behind a key of mergekit's that is refused."""
    return _KEYS[key]


def other_kind(text: str, source: str) -> None:
    """RecipeError for a file of another mergekit command, or of several merges."""
    if len(re.findall(r"^---(?:\s|$)", text.lstrip().removeprefix("---"), re.MULTILINE)):
        raise RecipeError(f"{source}: holds several configurations, for mergekit-multi: put each into a file of its "
                          "own, merge them in order, and let the later ones name the outputs of the earlier")
    for keys, what in _KINDS.items():
        found = [key for key in keys if re.search(rf"^{key}\s*:", text, re.MULTILINE)]
        if found:
            raise RecipeError(f"{source}: the key {found[0]!r} says that this is {what}")
