"""The shapes of real models: their sizes, their config.json, their tensors. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..io.shards import OutTensor

CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class Shape:
    """A dense decoder of the Llama or Qwen2 family."""

    name: str
    family: str
    hidden: int
    wide: int  # of the FFN
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool  # one matrix is both input and output embedding

    def config(self, layers: int | None = None, vocabulary: int | None = None, dtype: str = "bfloat16") -> dict:
        """config.json, with all layers and the whole vocabulary or with fewer."""
        return {
            "architectures": [_CLASSES[self.family]], "model_type": self.family, "hidden_size": self.hidden,
            "intermediate_size": self.wide, "num_hidden_layers": layers or self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": vocabulary or self.vocabulary, "tie_word_embeddings": self.tied, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6, "torch_dtype": dtype,
        }  # fmt: skip


# Qwen2.5 (0.5B to 32B) and Llama 3 (70B)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.5b", "qwen2", 896, 4864, 24, 14, 2, 151936, True),
        Shape("1.5b", "qwen2", 1536, 8960, 28, 12, 2, 151936, True),
        Shape("7b", "qwen2", 3584, 18944, 28, 28, 4, 152064, False),
        Shape("32b", "qwen2", 5120, 27648, 64, 40, 8, 152064, False),
        Shape("70b", "llama", 8192, 28672, 80, 64, 8, 128256, False),
    )
}


def tensors(config: dict[str, Any], code: str = "BF16") -> list[OutTensor]:
    """Every tensor of a model of this config, in the order of the layers."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
              "mlp.down_proj": (hidden, wide)}  # fmt: skip
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for module, size in linear.items():
            found[f"{prefix}{module}.weight"] = size
            if config["model_type"] == "qwen2" and module[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{prefix}{module}.bias"] = size[:1]
        found |= {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return [OutTensor(name, code, size) for name, size in found.items()]
