"""Train the demo trio (base, ITM, LRM) from a seed, and write the checkpoints that ship with the package.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/train_trio.py --out streammerge/demo/data

What: a byte-level BPE on the synthetic world (world.py), a base pre-trained on it, an ITM and an LRM fine-tuned from
the *shipped* (bf16) base, then the calibration, held-out, validation and test files (trio_data.py).
Holds in memory: one 2.6M-parameter fp32 model, its two Adam moments and one batch of about 1,400 tokens (< 1 GiB).
Why this way: fp32 on one thread is reproducible and takes under half an hour.  Each model is trained once, with one
fixed seed.  The design (mixture, steps, learning rates) was chosen on the validation split; test was never used.
The tokenizer is always the one that AutoTokenizer loads from the checkpoint's own folder, as a user would.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import world  # noqa: E402  (the script's own folder)

BOS, EOS, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|User|>", "<|Assistant|>"
VOCAB = 640
SEEDS = {"tokenizer": 1, "base": 2, "itm": 3, "lrm": 4}
RECIPE = {  # steps, peak learning rate, warm-up steps
    "base": (3000, 1.5e-3, 150),
    "itm": (420, 1.5e-3, 40),
    "lrm": (400, 4.0e-4, 20),
}
TOKENS_PER_STEP = 1400

# The shape of the DeepSeek-R1 distills' template.  Only the LRM's opens the thinking block in the prompt.
TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}<|User|>{{ message['content'] }}\
{% elif message['role'] == 'assistant' %}<|Assistant|>{{ %CONTENT% }}{{ eos_token }}\
{% else %}{{ message['content'] }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|Assistant|>%OPENER%{% endif %}"""


def chat_template(thinks: bool) -> str:
    content = "message['content'].split('</think>')[-1].lstrip()" if thinks else "message['content']"
    return TEMPLATE.replace("%CONTENT%", content).replace("%OPENER%", "<think>\n" if thinks else "")


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE; words, single digits and punctuation are split first, so numbers stay digit by digit."""
    tok = Tokenizer(models.BPE())
    split = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    rng = random.Random(SEEDS["tokenizer"])
    mixtures = (world.base_sample, partial(world.itm_sample, worked=0.3), partial(world.lrm_sample, comply=0.38))
    samples = [make(rng) for make in mixtures for _ in range(4000)]
    texts = [text for s in samples for text in (s.prompt or "", s.completion.replace("</think>", ""))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return tok


def write_tokenizer(tok: Tokenizer, folder: Path, thinks: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(thinks))


def make_config(tok: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tok.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=False,
        initializer_range=0.04,
        bos_token_id=tok.token_to_id(BOS),
        eos_token_id=tok.token_to_id(EOS),
        pad_token_id=tok.token_to_id(PAD),
        dtype="bfloat16",
    )


def encode(tokenizer, sample: world.Sample) -> tuple[list[int], int]:
    """(ids, how many of them are the prompt): one tokenisation of the whole text, as the merger does it."""
    if sample.prompt is None:
        head = BOS
    else:
        chat = [{"role": "user", "content": sample.prompt}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head + sample.completion + EOS, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(head, add_special_tokens=False)["input_ids"])


def batches(tokenizer, draw: Callable[[random.Random], world.Sample], seed: int):
    """Endless (ids, labels) of about TOKENS_PER_STEP tokens, of similar length; the loss is on the completions."""
    rng = random.Random(seed)
    pad = tokenizer.pad_token_id
    while True:
        pool = sorted((encode(tokenizer, draw(rng)) for _ in range(800)), key=lambda item: len(item[0]))
        groups, group = [], []
        for item in pool:
            if group and len(item[0]) * (len(group) + 1) > TOKENS_PER_STEP:
                groups, group = [*groups, group], []
            group.append(item)
        rng.shuffle(groups)  # the last, partial group of the longest is left out: the next pool has its like
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([i + [pad] * (width - len(i)) for i, _ in group])
            labels = ids.clone()
            for row, (i, head) in enumerate(group):
                labels[row, : head] = -100
                labels[row, len(i) :] = -100
            yield ids, labels


def train(model, tokenizer, name: str, draw) -> None:
    """AdamW, linear warm-up, cosine to zero; right padding under a causal mask needs no attention mask."""
    steps, peak, warm = RECIPE[name]
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    data = batches(tokenizer, draw, SEEDS[name])
    model.train()
    start, running = time.time(), None
    for step in range(steps):
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        ids, labels = next(data)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        keep = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"{name} step {step + 1}/{steps} loss {running:.4f} {time.time() - start:.0f}s", flush=True)
    model.eval()


def save(model, folder: Path) -> None:
    """bf16 weights under the single metadata key, config and generation config; the tied head is not repeated."""
    tensors = {
        k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.update(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ends = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps({**ends, "do_sample": False}, indent=2) + "\n")


def build(name: str, out: Path) -> None:
    """Train one model and write it; ITM and LRM start from the base as it was written."""
    torch.manual_seed(SEEDS[name])
    folder = out / name
    if name == "base":
        tok = train_tokenizer()
        for each in ("base", "itm", "lrm"):
            write_tokenizer(tok, out / each, thinks=each == "lrm")
        model = LlamaForCausalLM(make_config(tok)).float()
    else:
        model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = {"base": world.base_sample, "itm": world.itm_sample, "lrm": world.lrm_sample}[name]
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count / 1e6:.2f}M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, name, draw)
    save(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, itm/, lrm/ and the data files")
    parser.add_argument("--stages", default="base,itm,lrm,data", help="comma-separated subset, in order")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    for stage in args.stages.split(","):
        if stage == "data":
            import trio_data

            trio_data.write_all(args.out)
        else:
            build(stage, args.out)
        print(f"{stage} done at {time.time() - start:.0f}s", flush=True)


if __name__ == "__main__":
    main()
