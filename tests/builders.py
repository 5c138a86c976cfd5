"""Builders of small real checkpoints and calibration sets: random weights, a real tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SHARED = Path(__file__).parents[1].parent / "shared" / "calibration"
SETS = {"reasoning": SHARED / "reasoning_calibration_set.json"}
SETS["instruction"] = SHARED / "instruction_calibration_set.jsonl"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

# what differs between the four families: GQA, explicit head_dim, q/k norm, biases, ties, sliding window
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 24, "head_dim": 12, "tie_word_embeddings": False},
}


def save_tokenizer(directory: Path, template: str = TEMPLATE) -> None:
    """A byte-level BPE of 400 tokens with `<think>` and `</think>` as single tokens, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=398, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the sum of two and three is five. write it in upper case, please! " * 4], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = template
    fast.save_pretrained(directory)


def make_model(family: str, *, layers: int = 3, hidden: int = 48, seed: int = 0, dtype=torch.float32, **extra):
    """A random model of a family with grouped-query attention (4 query heads on 2)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(family, **{**sizes, **heads, **ids, **FAMILIES[family], **extra})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.15) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def save_trio(root: Path, family: str, *, dtype=torch.float32, scale: float = 0.02, **kwargs) -> dict[str, Path]:
    """base, itm and lrm of one family: the LRM and two copies with perturbed weights."""
    paths = {role: root / role for role in ("base", "itm", "lrm")}
    for n, path in enumerate(paths.values()):
        model = make_model(family, dtype=torch.float32, **kwargs)
        torch.manual_seed(100 + n)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * scale)
        model.to(dtype).save_pretrained(path, max_shard_size=kwargs.get("shard", "60KB"))
        save_tokenizer(path)
    return paths


def write_sets(root: Path, reasoning: int = 12, instruction: int = 10) -> dict[str, Path]:
    """Small calibration sets in the authors' schemas."""
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    thoughts = [
        {
            "prompt": f"the sum of {numbers[i % 12]} and {numbers[(5 * i + 3) % 12]}?",
            "reasoning": f"first {numbers[i % 12]}, " + "then more, " * (i % 5) + f"and {numbers[(5 * i + 3) % 12]}.",
            "response": f"it is {numbers[(i + 5) % 12]}.",
            "sample_id": f"r{i}",
        }
        for i in range(reasoning)
    ]
    orders = []
    for i in range(instruction):
        rule, obeyed = [("write it in upper case", "IT IS"), ("end with done", "done")][i % 2]
        response = f"{obeyed} {numbers[i % 12]}, as you said" if i % 2 == 0 else f"it is {numbers[i % 12]} {obeyed}"
        plain = "as you said" if i % 2 == 0 else "it is"
        spans = {"prompt_spans": [rule], "response_spans": [obeyed], "unrelated_response_spans": []}
        orders.append({
            "id": i, "prompt": f"the sum of {numbers[i % 12]} and one? {rule}, please!", "reason": f"sum and {rule}.",
            "response": response, "related_prompt_list": [{"instruction_id": f"rule{i % 2}", **spans}],
            "unrelated_response_spans": [plain],
        })  # fmt: skip
    paths = {"reasoning": root / "reasoning.json", "instruction": root / "instruction.jsonl"}
    paths["reasoning"].write_text(json.dumps(thoughts))
    paths["instruction"].write_text("".join(json.dumps(o) + "\n" for o in orders))
    return paths


def recipe_text(paths: dict[str, Path], sets: dict[str, Path] | None, **extra) -> str:
    """A rain recipe over a trio; `extra` are further top-level keys."""
    import yaml

    data = {"merge_method": "rain", "base_model": str(paths["base"]), "instruct_model": str(paths["itm"])}
    data["reasoning_model"] = str(paths["lrm"])
    if sets:
        data["calibration"] = {k: str(v) for k, v in sets.items()} | extra.pop("calibration", {})
    return yaml.safe_dump({**data, **extra}, allow_unicode=True)
