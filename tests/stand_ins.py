"""Stand-ins for models that a mergekit configuration names: a few random tensors under a Llama's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, VOCABULARY = 8, 32


def llama_tensors(layers: int, vocabulary: int = VOCABULARY, head: bool = True, hidden: int = HIDDEN, seed: int = 0):
    """{name: fp32 tensor} of a small Llama with two heads."""
    torch.manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (vocabulary, hidden)} if head else {}
    for i in range(layers):
        layer = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        layer |= {"mlp.gate_proj.weight": (2 * hidden, hidden), "mlp.up_proj.weight": (2 * hidden, hidden)}
        layer |= {"mlp.down_proj.weight": (hidden, 2 * hidden)}
        layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def save(path: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    """A checkpoint of these tensors; `config` goes over a small Llama's."""
    path.mkdir(parents=True, exist_ok=True)
    layers = 1 + max((int(n.split(".")[2]) for n in tensors if n.startswith("model.layers.")), default=-1)
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "tie_word_embeddings": "lm_head.weight" not in tensors,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps({**told, **config}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def stand_in(
    path: Path, layers: int = 5, *, head: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY, **config,
) -> Path:  # fmt: skip
    """A small random Llama at `path`."""
    tensors = llama_tensors(layers, vocabulary, head, seed=seed)
    return save(path, {name: t.to(dtype) for name, t in tensors.items()}, **config)


def save_words(path: Path, words: Sequence[str], template: str | None = None) -> None:
    """A tokenizer of whole words, numbered in order, that transformers loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])
    fast.chat_template = template
    fast.save_pretrained(path)
