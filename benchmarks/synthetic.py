"""Synthetic checkpoints in the shapes of real models, for benchmarks: made in the time that writing their bytes takes.

    python benchmarks/synthetic.py OUT [--shape 1.5b] [--layers N] [--dtype bfloat16]

Makes OUT/base, OUT/itm and OUT/lrm: config.json and bf16 shards of 5 GB with an index, as the Hub has them, no
tokenizer. Values: one block of Gaussian weights (σ = 0.02) repeated through every tensor of the base; itm and lrm are
the base plus small Gaussian noise (σ = 0.001), each from a block of its own. A block ends inside a row, so that rows
differ; norms are ones. --layers keeps the first N decoder layers only, and config.json says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streammerge.codec import WORDS, encode
from streammerge.io.header import encode_header, tensor_bytes
from streammerge.io.writer import OutTensor, plan_shards

# Qwen2.5 (0.5B to 32B) and Llama 3 (70B): hidden, intermediate, layers, heads, key/value heads, vocabulary, tied
SHAPES = {
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "32b": ("qwen2", 5120, 27648, 64, 40, 8, 152064, False),
    "70b": ("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ROLES = ("base", "itm", "lrm")
SHARD = 5 * 10**9
_BLOCK = (1 << 22) - 3  # elements of the block that is repeated: odd, so that it never lines up with rows
_WEIGHT, _NOISE = 0.02, 0.001


def config(shape: str, layers: int | None = None, dtype: str = "bfloat16") -> dict:
    """config.json of a shape, with all its layers or the first few."""
    family, hidden, wide, depth, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    name = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    return {
        "architectures": [name], "model_type": family, "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers or depth, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "torch_dtype": dtype,
    }  # fmt: skip


def tensors(about: dict, code: str = "BF16") -> list[OutTensor]:
    """Every tensor of such a model."""
    hidden, wide = about["hidden_size"], about["intermediate_size"]
    kv = hidden // about["num_attention_heads"] * about["num_key_value_heads"]
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
              "mlp.down_proj": (hidden, wide)}  # fmt: skip
    found = {"model.embed_tokens.weight": (about["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not about["tie_word_embeddings"]:
        found["lm_head.weight"] = (about["vocab_size"], hidden)
    for layer in range(about["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for module, size in linear.items():
            found[f"{prefix}{module}.weight"] = size
            if about["model_type"] == "qwen2" and module[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{prefix}{module}.bias"] = size[:1]
        found |= {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return [OutTensor(name, code, size) for name, size in found.items()]


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


def write(folder: Path, about: dict, block: memoryview, dtype: str) -> int:
    """One checkpoint; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    code = CODES[dtype]
    ones = stored(np.ones(about["hidden_size"], np.float32), code)
    shards, weight_map, total = plan_shards(tensors(about, code), SHARD), {}, 0
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
    root: Path, shape: str, layers: int | None = None, dtype: str = "bfloat16", roles: Sequence[str] = ROLES
) -> dict[str, Path]:
    """base, itm and lrm (or some of them) under `root` -> their folders."""
    about = config(shape, layers, dtype)
    for role, block in blocks(CODES[dtype]).items():
        if role in roles:
            write(root / role, about, block, dtype)
    return {role: root / role for role in roles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--dtype", choices=CODES, default="bfloat16")
    args = parser.parse_args()
    if any((args.out / role).exists() for role in ROLES):
        sys.exit(f"{args.out} holds a trio already")
    for role, path in make_trio(args.out, args.shape, args.layers, args.dtype).items():
        print(f"{role}: {path}, {sum(f.stat().st_size for f in os.scandir(path)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
