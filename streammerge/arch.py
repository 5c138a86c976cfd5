"""What a model family looks like: where its linear modules are, and how its heads are laid out.

A family is one JSON file in `families/`, found by its `model_types`. Feature sites follow from the roles: q, k and v
share the input after the first norm, gate and up the input after the second, o and down have their own (method.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InputError

# site -> the module whose input is read there; every module of the site shares that input
SITES = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}
SITE_OF = {module: site for site, modules in SITES.items() for module in modules}


@dataclass(frozen=True)
class Family:
    """Tensor names of a family. `modules` maps a role (q, k, …) to its path inside a decoder layer."""

    model_types: tuple[str, ...]
    layers: str
    embedding: str
    norm: str
    head: str
    modules: dict[str, str]

    def layer_prefix(self, layer: int) -> str:
        """'model.layers.3.'"""
        return f"{self.layers}.{layer}."

    def weight(self, layer: int, module: str) -> str:
        """The checkpoint key of one linear module's weight."""
        return f"{self.layer_prefix(layer)}{self.modules[module]}.weight"


@dataclass(frozen=True)
class HeadLayout:
    """Query heads, key/value heads and the dimension of a head. Query head h reads kv head h // group."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@cache
def families() -> dict[str, Family]:
    """model_type -> Family, from every file in families/."""
    found: dict[str, Family] = {}
    for path in sorted((Path(__file__).parent / "families").glob("*.json")):
        data = json.loads(path.read_text())
        family = Family(**{**data, "model_types": tuple(data["model_types"])})
        found.update(dict.fromkeys(family.model_types, family))
    return found


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises InputError for one that has no file."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families():
        raise InputError(
            f"{where}: model_type is {kind!r}; the families known are {', '.join(sorted(families()))}. "
            "A new family is one JSON file in streammerge/families (README, 'Extending')"
        )
    return families()[kind]


def head_layout(config: dict[str, Any]) -> HeadLayout:
    """Heads of a config.json, as the transformers' modules read it."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return HeadLayout(heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads)
