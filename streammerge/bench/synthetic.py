"""Synthetic checkpoints, made in the time that writing their bytes takes; and hollow ones, that are headers alone.

Values: one block of Gaussian weights (σ = 0.02) repeated through every tensor of the base; itm and lrm are the base
plus small Gaussian noise (σ = 0.001), each from a block of its own. A block ends inside a row, so that rows differ;
norms are ones. Holds three blocks. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import WORDS, encode
from ..io.header import encode_header, tensor_bytes
from ..io.shards import plan_shards
from .shapes import CODES, tensors

ROLES = ("base", "itm", "lrm")
SHARD = 5 * 10**9
_BLOCK = (1 << 22) - 3  # elements of the block that is repeated: odd, so that it never lines up with rows
_WEIGHT, _NOISE = 0.02, 0.001


def blocks(code: str) -> dict[str, memoryview]:
    """The block of each role: bytes of _BLOCK elements."""
    found, base = {}, None
    for seed, role in enumerate(ROLES):
        values = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)
        base = values * np.float32(_WEIGHT) if base is None else base
        found[role] = stored(base if role == "base" else base + values * np.float32(_NOISE), code)
    return found


def stored(values: np.ndarray, code: str) -> memoryview:
    """fp32 values as bytes of a dtype."""
    out = np.empty(len(values), WORDS[code])
    encode(values, code, out, np.empty_like(values))
    return memoryview(out).cast("B")


def write(folder: Path, config: dict[str, Any], block: memoryview, dtype: str) -> int:
    """One checkpoint with its config.json and, where there are several shards, its index; the bytes of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    code = CODES[dtype]
    ones = stored(np.ones(config["hidden_size"], np.float32), code)
    shards, weight_map, total = plan_shards(tensors(config, code), SHARD), {}, 0
    for file, members in shards.items():
        raw, _ = encode_header([(t.name, t.dtype, t.shape) for t in members])
        with open(folder / file, "wb") as stream:
            stream.write(raw)
            at = 0  # goes on from tensor to tensor: no two begin alike
            for tensor in members:
                left = tensor_bytes(tensor.dtype, tensor.shape)
                total += left
                weight_map[tensor.name] = file
                if "norm" in tensor.name:
                    left -= stream.write(ones)
                while left:
                    wrote = stream.write(block[at : at + left])
                    left, at = left - wrote, (at + wrote) % len(block)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make_trio(
    root: Path, config: dict[str, Any], dtype: str = "bfloat16", roles: Sequence[str] = ROLES
) -> dict[str, Path]:
    """base, itm and lrm under `root`, or some of them -> their folders."""
    block = blocks(CODES[dtype])
    for role in roles:
        write(root / role, config, block[role], dtype)
    return {role: root / role for role in roles}


def hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of real headers over a sparse bf16 file: it can be planned with, and takes no disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    members = tensors(config)
    raw, _ = encode_header([(t.name, t.dtype, t.shape) for t in members])
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(raw)
        stream.truncate(len(raw) + sum(tensor_bytes(t.dtype, t.shape) for t in members))
    return folder
