"""The output beside its tensors: config.json, tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.checkpoint import Checkpoint, side_files
from ..jobs import TensorJob
from .config import DTYPES, Config, Reference
from .names import Names, at, count_key
from .outline import Slot
from .template import chosen_template, with_template
from .vocabulary import Vocabulary

_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
}  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def out_config(
    config: Config, models: dict[Reference, Names], slots: list[Slot], jobs: tuple[TensorJob, ...],
    vocabulary: Vocabulary | None, warnings: list[str],
) -> dict[str, Any]:  # fmt: skip
    """What config.json says: the donor's, with what the merge has changed. Adds to `warnings`."""
    donor = models[config.references[0]].checkpoint
    out = copy.deepcopy(donor.config)
    _set_dtype(config, out, jobs, warnings)
    if config.slices:
        _set_layers(config, out, models)
    if vocabulary:
        inner = out.get("text_config")
        holder = inner if "vocab_size" not in out and isinstance(inner, dict) else out
        if holder.get("vocab_size") != vocabulary.size:
            warnings.append(f"vocab_size is {vocabulary.size}, the tokens of {vocabulary.path}; {donor.role} has "
                            f"{holder.get('vocab_size')}")
            holder["vocab_size"] = vocabulary.size
        lender = next((n.checkpoint for n in models.values() if n.checkpoint.path == vocabulary.path), donor)
        for key in _IDS:
            if lender.config.get(key) != out.get(key):
                warnings.append(f"{key} is {lender.config.get(key)}, as in the model that lends the tokenizer")
                out[key] = lender.config.get(key)
    _set_tie(out, models, slots, warnings)
    return out


def _set_dtype(config: Config, out: dict[str, Any], jobs: tuple[TensorJob, ...], warnings: list[str]) -> None:
    """The dtype that the recipe asks for; where it asks for none, the donor's own word is left alone."""
    names = {code: name for name, code in DTYPES.items()}
    code = config.out_dtype or config.dtype
    stated = out.get("dtype") or out.get("torch_dtype")
    if not code:
        written = sorted({names[job.out.dtype] for job in jobs if job.out.dtype in names})
        if stated and written != [stated]:
            warnings.append(f"tensors are written as {', '.join(written)}, as they promote; config.json says {stated}: "
                            "set out_dtype to have it said")
        return
    for holder in (out, out.get("text_config")):
        if isinstance(holder, dict):
            for key in ("dtype", "torch_dtype"):
                if key in holder or (holder is out and key == "torch_dtype" and "dtype" not in out):
                    holder[key] = names[code]


def _set_layers(config: Config, out: dict[str, Any], models: dict[Reference, Names]) -> None:
    """The number of layers, and lists with one entry for each, as the first source of each slice has them."""
    path = count_key(out)
    holder = at(out, path[:-1])
    taken = [(part.sources[0].model, *part.sources[0].layer_range) for part in config.slices]
    holder[path[-1]] = sum(end - first for _, first, end in taken)
    for key in _PER_LAYER:
        if isinstance(holder.get(key), list):
            lists = [at(models[model].checkpoint.config, path[:-1]).get(key) for model, _, _ in taken]
            counts = [at(models[model].checkpoint.config, path) for model, _, _ in taken]
            if any(not isinstance(x, list) or len(x) != n for x, n in zip(lists, counts, strict=True)):
                raise InputError(f"slices: {key} in config.json is a list with an entry for each layer, and not all "
                                 "models have one: it cannot be put together")
            holder[key] = [value for x, (_, first, end) in zip(lists, taken, strict=True) for value in x[first:end]]


def _set_tie(out: dict[str, Any], models: dict[Reference, Names], slots: list[Slot], warnings: list[str]) -> None:
    """A head of its own must not be said to be tied: it would be read from the embedding. One that is not there must
    be: it would be random."""
    heads = {head for names in models.values() for head in names.heads}
    for slot in slots:
        if slot.name in heads and out.get("tie_word_embeddings"):
            inputs = [(models[i.model].checkpoint, key) for i, key in zip(slot.part.sources, slot.keys, strict=True)]
            if any(key == slot.name and not c.config.get("tie_word_embeddings") for c, key in inputs):
                warnings.append(f"{slot.name} is written and tie_word_embeddings set to false: not all models tie them")
                out["tie_word_embeddings"] = False
    lenders = [models[item.model].checkpoint for item in slots[-1].part.sources]
    if not any(slot.name in heads for slot in slots) and not out.get("tie_word_embeddings"):
        if any(checkpoint.config.get("tie_word_embeddings") for checkpoint in lenders):
            warnings.append("tie_word_embeddings set to true: no head is written, as in the models that lend layers")
            out["tie_word_embeddings"] = True


def side_sources(
    config: Config, models: dict[Reference, Checkpoint], content: dict[str, Any], vocabulary: Vocabulary | None,
    warnings: list[str],
) -> dict[str, Path | bytes]:  # fmt: skip
    """{file name: the file that is copied, or the bytes that are written}, config.json among them. Adds to `warnings`.

    The donor's files; those of the tokenizer from the model that lends it.
    """
    donor = models[config.references[0]]
    sides: dict[str, Path | bytes] = {file.name: file for file in donor.sides}
    if vocabulary and vocabulary.path != donor.path:
        sides = {name: file for name, file in sides.items() if name not in _TOKENIZER}
        sides |= {file.name: file for file in side_files(vocabulary.path) if file.name in _TOKENIZER}
    if content != donor.config or donor.rewritten:
        sides["config.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    if config.chat_template:
        paths = [checkpoint.path for checkpoint in models.values()]
        text = chosen_template(config.chat_template, paths, config.source)
        if text is None:
            warnings.append("chat_template: auto found no template in any model; the output has none")
        else:
            sides = with_template(sides, text)
    return dict(sorted(sides.items()))
