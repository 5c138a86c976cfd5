"""Greedy evaluation of one small Llama-shaped checkpoint on the demo's rows, fast enough to run a dozen times.

What: `evaluate` (one model, all rows), `summarize` (rates with Wilson intervals), `paired_p` (exact McNemar), `l_think`
(KL from the LRM at the thinking positions of held-out samples).
Holds in memory: the model in fp32 and, per batch, its key/value cache: layers x batch x kv heads x (prompt +
max_new_tokens) x head_dim x 2 floats (14 MB at the demo's sizes and batch 96).
Why this way: greedy decoding of 2.5M parameters is bound by per-call overhead in a general `generate`.  Rows are sorted
by prompt length, left-padded to one width, decoded into a cache that is allocated once, and dropped soon after
they end.  The result is token for token that of `generate(do_sample=False)` in fp32 (tests/test_demo_data.py).
A model whose template opens no thinking block (base, ITM) is judged on its whole output, and `closed` is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from .checks import THINK_CLOSE, answer_is_right, answer_part, follows

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Row:
    """One prompt: a plain problem ("reasoning"), or a problem with a format constraint ("instruction")."""

    id: str
    kind: str
    prompt: str
    answer: str
    constraint: str | None


@dataclass(frozen=True)
class Outcome:
    """What one model did with one row.

    correct: the final answer is right.  follows: the constraint is obeyed in the answer part (None without one).
    both: follows and correct (None without a constraint).  closed: the output has `</think>`; None when the prompt
    opens no thinking block, and then the whole output was the answer part.  text: the output, without the prompt.
    """

    id: str
    kind: str
    correct: bool
    follows: bool | None
    both: bool | None
    closed: bool | None
    text: str


def load_rows(path: Path) -> list[Row]:
    """Rows of validation.jsonl or test.jsonl."""
    return [Row(**json.loads(line)) for line in Path(path).read_text().splitlines() if line]


class _Llama:
    """A Llama forward over plain fp32 tensors: fused projections, preallocated cache, grouped-query attention."""

    def __init__(self, model_dir: Path):
        from safetensors.torch import load_file
        from transformers import AutoConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = AutoConfig.from_pretrained(model_dir)
        act = getattr(config, "hidden_act", None)
        if config.model_type != "llama" or act != "silu":
            raise ValueError(
                f"{model_dir}/config.json: the demo evaluator runs llama models with silu, found {config.model_type!r}"
                f" with {act!r}; use transformers' generate for other families"
            )
        w: dict[str, torch.Tensor] = {}
        for shard in sorted(Path(model_dir).glob("*.safetensors")):
            w.update(load_file(shard))
        w = {k: v.float() for k, v in w.items()}
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.head_dim or config.hidden_size // self.heads
        self.eps, self.rotary = config.rms_norm_eps, LlamaRotaryEmbedding(config)
        self.embed, self.norm = w["model.embed_tokens.weight"], w["model.norm.weight"]
        self.head = w.get("lm_head.weight", self.embed)
        self.layers = [self._layer(w, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]

    @staticmethod
    def _layer(w: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor | None]:
        def stack(part: str, *names: str):
            keys = [f"{prefix}{part}.{n}_proj" for n in names]
            bias = [w[f"{k}.bias"] for k in keys if f"{k}.bias" in w]
            return torch.cat([w[f"{k}.weight"] for k in keys]), torch.cat(bias) if bias else None

        return {
            "in": w[f"{prefix}input_layernorm.weight"],
            "post": w[f"{prefix}post_attention_layernorm.weight"],
            "qkv": stack("self_attn", "q", "k", "v"),
            "o": stack("self_attn", "o"),
            "gate_up": stack("mlp", "gate", "up"),
            "down": stack("mlp", "down"),
        }

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(self.embed, positions)  # (B, T, D)
        return cos[:, :, None], sin[:, :, None]

    def hidden(self, ids, positions, cache, at: int, mask) -> torch.Tensor:
        """Hidden states of new tokens ids (B, T) that stand in cache columns at .. at+T; fills those columns."""
        b, t = ids.shape
        x = self.embed[ids]
        cos, sin = self.rope(positions)
        q_size, kv_size, half = self.heads * self.dim, self.kv * self.dim, self.dim // 2
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            h = F.rms_norm(x, x.shape[-1:], layer["in"], self.eps)
            qkv = F.linear(h, *layer["qkv"])
            qk = qkv[..., : q_size + kv_size].view(b, t, self.heads + self.kv, self.dim)
            qk = qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), -1) * sin
            q, k = qk.transpose(1, 2).split((self.heads, self.kv), 1)
            keys[:, :, at : at + t] = k
            values[:, :, at : at + t] = qkv[..., q_size + kv_size :].view(b, t, self.kv, self.dim).transpose(1, 2)
            seen = slice(0, at + t)
            a = F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen], mask, enable_gqa=True)
            x = x + F.linear(a.transpose(1, 2).reshape(b, t, q_size), *layer["o"])
            h = F.rms_norm(x, x.shape[-1:], layer["post"], self.eps)
            gate, up = F.linear(h, *layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, *layer["down"])
        return x

    def next_ids(self, x: torch.Tensor) -> torch.Tensor:
        """Greedy choice after hidden states x (B, hidden)."""
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.eps), self.head).argmax(-1)


@torch.inference_mode()
def greedy(model: _Llama, prompts: Sequence[list[int]], ends: set[int], max_new_tokens: int) -> list[list[int]]:
    """New ids of each prompt, without the end token: one left-padded batch."""
    width, count = max(map(len, prompts)), len(prompts)
    pad = torch.tensor([width - len(p) for p in prompts])
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    shape = (count, model.kv, width + max_new_tokens, model.dim)
    cache = [(torch.empty(shape), torch.empty(shape)) for _ in model.layers]
    columns = torch.arange(width + max_new_tokens)
    real = columns >= pad[:, None]
    # A padding row may look at itself: its output is never read, and an empty softmax would be nan.
    causal = columns[:width, None] >= columns[:width]
    mask = causal & (real[:, None, :width] | torch.eye(width, dtype=torch.bool))
    positions = (columns[:width] - pad[:, None]).clamp(min=0)
    new = model.next_ids(model.hidden(ids, positions, cache, 0, mask[:, None])[:, -1])
    found: list[list[int]] = [[] for _ in prompts]
    rows, ended = list(range(count)), [False] * count
    for at in range(width, width + max_new_tokens):
        for row, token in zip(rows, new.tolist(), strict=True):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                found[row].append(token)
        live = [i for i, row in enumerate(rows) if not ended[row]]
        if not live or at == width + max_new_tokens - 1:
            break
        if len(live) < 0.9 * len(rows):  # copying the cache costs about as much as a tenth of a step
            pick = torch.tensor(live)
            rows, new, pad, real = [rows[i] for i in live], new[pick], pad[pick], real[pick]
            cache = [(k[pick], v[pick]) for k, v in cache]
        x = model.hidden(new[:, None], (at - pad)[:, None], cache, at, real[:, None, None, : at + 1])
        new = model.next_ids(x[:, -1])
    return found


def _end_ids(model_dir: Path, tokenizer) -> set[int]:
    path = Path(model_dir) / "generation_config.json"
    stated = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if stated is None:
        stated = tokenizer.eos_token_id
    return set(stated) if isinstance(stated, list) else {stated}


def _judge(row: Row, text: str, opens: bool) -> Outcome:
    answer = answer_part(text, opens_thinking=opens)
    correct = answer is not None and answer_is_right(answer, row.answer)
    obeys = None if row.constraint is None else answer is not None and follows(row.constraint, answer)
    closed = THINK_CLOSE in text if opens else None
    return Outcome(row.id, row.kind, correct, obeys, None if obeys is None else obeys and correct, closed, text)


def evaluate(model_dir: Path, rows: Sequence[Row], *, batch: int = 96, max_new_tokens: int = 112) -> list[Outcome]:
    """Greedy outcomes of one model, in the order of the rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chats = [[{"role": "user", "content": row.prompt}] for row in rows]
    heads = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    prompts = tokenizer(heads, add_special_tokens=False)["input_ids"]
    model, ends = _Llama(Path(model_dir)), _end_ids(model_dir, tokenizer)
    outcomes: list[Outcome | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (len(prompts[i]), i))

    def run(start: int) -> None:
        group = order[start : start + batch]
        new = greedy(model, [prompts[i] for i in group], ends, max_new_tokens)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(group, texts, strict=True):
            outcomes[i] = _judge(rows[i], text, heads[i].rstrip().endswith("<think>"))

    # These matrices are too small to share: a batch on each core is faster than all cores on each batch.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(0, len(order), batch)))
    finally:
        torch.set_num_threads(threads)
    return outcomes


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = count / n, Z95 * Z95
    middle, spread = p + z2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z2 / n)), min(1.0, (middle + spread) / (1 + z2 / n))


def _rate(flags: Sequence[bool]) -> dict[str, float | int | None]:
    low, high = wilson(sum(flags), len(flags))
    return {"count": sum(flags), "n": len(flags), "rate": sum(flags) / len(flags) if flags else None,
            "low": low, "high": high}


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | int | None]]:
    """Counts, rates and Wilson 95 % intervals; missing_think counts only prompts that open a thinking block."""
    plain = [o for o in outcomes if o.kind == "reasoning"]
    told = [o for o in outcomes if o.kind == "instruction"]
    missing = {"missing_think": outcomes, "missing_think_reasoning": plain, "missing_think_instruction": told}
    return {
        "reasoning_accuracy": _rate([o.correct for o in plain]),
        "instruction_accuracy": _rate([bool(o.follows) for o in told]),
        "both_accuracy": _rate([bool(o.both) for o in told]),
        **{name: _rate([not o.closed for o in some if o.closed is not None]) for name, some in missing.items()},
    }


def paired_p(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact McNemar p: a fair coin on the rows where the two models differ."""
    if len(a) != len(b):
        raise ValueError(f"paired test needs the same rows: {len(a)} and {len(b)} outcomes")
    wins = sum(x and not y for x, y in zip(a, b, strict=True))
    losses = sum(y and not x for x, y in zip(a, b, strict=True))
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


@lru_cache(maxsize=1)
def _resident(path: Path):
    """The whole model in fp32; the LRM is wanted once for every model that is compared with it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def l_think(model_dir: Path, lrm_dir: Path, samples: Sequence[dict], *, batch: int = 32) -> dict[str, float]:
    """Mean KL(LRM || model), in nats, of the next-token distributions at the thinking positions of the samples.

    opener: the position of `<think>`.  predecessor: the position whose next token is `</think>`.  closer: the position
    of `</think>`.  all: the mean over these three.  inside: over every position from `<think>` to the predecessor.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lrm_dir)
    models = [_resident(Path(lrm_dir)), _resident.__wrapped__(Path(model_dir))]
    opener, closer = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", THINK_CLOSE))
    texts = []
    for s in samples:
        chat = [{"role": "user", "content": s["prompt"]}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(f"{head}{s['reasoning']}\n{THINK_CLOSE}\n\n{s['response']}")
    found: dict[str, list[float]] = {"opener": [], "predecessor": [], "closer": [], "inside": []}
    for start in range(0, len(texts), batch):
        ids = tokenizer(texts[start : start + batch], add_special_tokens=False)["input_ids"]
        width = max(map(len, ids))
        padded = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i in ids])  # causal: no mask needed
        p, q = (F.log_softmax(m(padded).logits, -1) for m in models)
        kl = (p.exp() * (p - q)).sum(-1)
        for row, i in enumerate(ids):
            first, last = i.index(opener), i.index(closer)
            found["opener"].append(kl[row, first].item())
            found["predecessor"].append(kl[row, last - 1].item())
            found["closer"].append(kl[row, last].item())
            found["inside"] += kl[row, first:last].tolist()
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {**means, "all": (means["opener"] + means["predecessor"] + means["closer"]) / 3}
