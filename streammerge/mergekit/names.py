"""What the names of a checkpoint's tensors say: which layer of which stack, what comes before the layers and after.

There is no list of architectures: `….layers.N.`, `.h.N.`, `.blocks.N.` and the like are layers in every one of them.
The rest is an input embedding (before), or a norm or a head (after), which matters where layers of several models are
stacked: the first lends what comes before, the last what comes after.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..io.checkpoint import Checkpoint, TensorInfo

_LAYER = re.compile(r"((?:.*?\.)?(?:layers|layer|blocks|block|h)\.)(\d{1,5})\.(.+)")
_BEFORE = re.compile(r"emb|(^|\.)wte\.|(^|\.)wpe\.|relative_pe|(^|\.)shared\.")
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|embed_in|embed_out|wte|tok_embeddings|word_embeddings|embeddings|shared|"
                         r"lm_head|lm_head\.linear|output|output_layer)\.(weight|bias)")  # fmt: skip
_HEAD = re.compile(r"(^|\.)(lm_head|output)\.weight")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings)\.weight")
# buffers of older checkpoints that every model computes from its config when it is loaded
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias|position_ids)")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def is_computed(info: TensorInfo) -> bool:
    """A buffer that no model reads from its checkpoint: rotary frequencies, causal masks, position numbers."""
    mask = _MASK.search(info.name) and len(info.shape) == 4
    return bool(mask) or bool(found := _COMPUTED.search(info.name)) and found.end() == len(info.name)


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before the first of them."""
    return bool(_BEFORE.search(name)) and "embed_out" not in name


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's rows are tokens: an input embedding, or a head that gives logits."""
    found = _VOCABULARY.search(name)
    return bool(found) and found.end() == len(name)


@dataclass(frozen=True)
class Names:
    """The tensors of one checkpoint, sorted out: `stacks` maps a prefix ('model.layers.') to its layers, each the
    set of what follows the number; `loose` are the others, `computed` those that are left out."""

    checkpoint: Checkpoint
    stacks: dict[str, dict[int, frozenset[str]]]
    loose: tuple[str, ...]
    computed: tuple[str, ...]

    @cached_property
    def embedding(self) -> str | None:
        """The key of the input embedding, if there is exactly one."""
        found = [name for name in self.loose if (m := _EMBEDDING.search(name)) and m.end() == len(name)]
        return found[0] if len(found) == 1 else None

    def stored(self, name: str) -> str | None:
        """The key that holds a tensor: its own, or the input embedding's where a head is not stored, since that is how
        tied models are saved. None if there is none."""
        if name in self.checkpoint.tensors:
            return name
        found = _HEAD.search(name)
        return self.embedding if found and found.end() == len(name) else None

    @property
    def heads(self) -> list[str]:
        """Keys of the stored output heads."""
        return [name for name in self.loose if (m := _HEAD.search(name)) and m.end() == len(name)]


def sort_out(checkpoint: Checkpoint) -> Names:
    """Every tensor of a checkpoint in its place."""
    stacks: dict[str, dict[int, set[str]]] = {}
    loose, computed = [], []
    for name, info in checkpoint.tensors.items():
        found = _LAYER.fullmatch(name)
        if is_computed(info):
            computed.append(name)
        elif found:
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
        else:
            loose.append(name)
    frozen = {p: {n: frozenset(s) for n, s in sorted(layers.items())} for p, layers in sorted(stacks.items())}
    return Names(checkpoint, frozen, tuple(loose), tuple(computed))


def count_key(config: dict) -> tuple[str, ...] | None:
    """Where a config.json says how many decoder layers there are: ('num_hidden_layers',), ('text_config', …); None if
    it does not."""
    for path in ((), ("text_config",)):
        inner = config.get(path[0]) if path else config
        for key in _COUNTS:
            if isinstance(inner, dict) and type(inner.get(key)) is int:
                return (*path, key)
    return None


def at(config: dict, path: tuple[str, ...]) -> object:
    """The value at a path of keys."""
    for key in path:
        config = config[key]
    return config


def bad_layers(names: Names) -> Iterator[str]:
    """Layers that are not 0 to n-1, or not as many as config.json says."""
    checkpoint = names.checkpoint
    if not names.stacks:
        yield (f"{checkpoint.role}: {checkpoint.path}: no layers found: wanted tensors with names such as "
               "model.layers.0.self_attn.q_proj.weight")
    for prefix, layers in names.stacks.items():
        gaps = sorted(set(range(len(layers))) - layers.keys())
        if gaps:
            yield f"{checkpoint.role}: {checkpoint.path}: {prefix}{gaps[0]} is missing, there is {prefix}{max(layers)}"
    key = count_key(checkpoint.config)
    if key and len(names.stacks) == 1:
        (prefix, layers), stated = next(iter(names.stacks.items())), at(checkpoint.config, key)
        if stated != len(layers):
            yield (f"{checkpoint.role}: {checkpoint.path}: config.json says {'.'.join(key)}: {stated}, the tensors "
                   f"{prefix}… have {len(layers)} layers; layers beyond the config's (such as those for the prediction "
                   "of several tokens) cannot be merged: remove them, or correct the config")
