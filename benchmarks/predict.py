"""What will a merge of this size take? The plan's predicted peaks for full-size models, on any machine, in seconds.

    python benchmarks/predict.py [--terms]

The checkpoints are real headers over sparse files (no disk, no weights): the numbers come from the same
`estimate.predict` that a merge reports and tests/test_memory.py holds to what is measured. Predicted, not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from streammerge import parse_recipe
from streammerge.calibration import CalibrationSet, InstructionSample, ReasoningSample
from streammerge.estimate import predict
from streammerge.memory import format_size
from streammerge.planned import make_plan

# hidden, intermediate, layers, query heads, kv heads, vocabulary
SHAPES = {
    "7B (Qwen2.5)": (3584, 18944, 28, 28, 4, 152064),
    "32B (Qwen2.5)": (5120, 27648, 64, 40, 8, 152064),
    "70B (Llama 3)": (8192, 28672, 80, 64, 8, 128256),
}
CARDS = ("8GiB", "24GiB")  # --device-memory
REASONING, INSTRUCTION, TOKENS = 150, 365, (1400, 600)  # the authors' sets: samples, and mean tokens a sample


def sparse_checkpoint(path: Path, shape: tuple[int, ...]) -> Path:
    """A Llama-family checkpoint whose weights are holes in one sparse bf16 file."""
    hidden, wide, layers, heads, kv, vocabulary = shape
    head = hidden // heads
    inside = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv * head, hidden),
        "self_attn.v_proj": (kv * head, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    tensors = {f"model.layers.{i}.{name}.weight": s for i in range(layers) for name, s in inside.items()}
    tensors |= {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    tensors["model.norm.weight"] = (hidden,)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size in tensors.items():
        stop = at + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.mkdir()
    with open(path / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary}
    (path / "config.json").write_text(json.dumps(config))
    return path


def calibration() -> CalibrationSet:
    """As many samples and tokens as the authors' sets have; Ω_think of eight positions."""
    held = REASONING // 10
    thoughts = [ReasoningSample(str(i), (0,) * TOKENS[0], tuple(range(8)), 0, 1, 2) for i in range(REASONING)]
    orders = tuple(InstructionSample(str(i), (0,) * TOKENS[1], ()) for i in range(INSTRUCTION))
    return CalibrationSet(tuple(thoughts[held:]), tuple(thoughts[:held]), orders, {})


def plan_of(root: Path, name: str, device_memory: str):
    """The plan of a merge of this size under a device budget; host memory is without limit."""
    path = root / name.split()[0]
    if not path.exists():
        sparse_checkpoint(path, SHAPES[name])
    recipe = {"merge_method": "rain", "reasoning_model": str(path), "instruct_model": str(path)}
    recipe |= {"base_model": str(path), "calibration": {"reasoning": __file__, "instruction": __file__}}
    recipe |= {"budget": {"device_memory": device_memory, "host_memory": "1TiB"}}
    return make_plan(parse_recipe(json.dumps(recipe), "predict"))


def gib(terms: dict[str, int]) -> str:
    return f"{sum(terms.values()) / 2**30:.1f}"


def main() -> None:
    """Print the README's table, or the terms of its sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", action="store_true", help="print the terms of each sum as well")
    args = parser.parse_args()
    torch.set_num_threads(2)  # a batch a core: the CPU column is for two
    budgets = [*CARDS, None]
    cards = " | ".join(f"{b} for a GPU: device / host" for b in CARDS)
    print(f"| model | {cards} | two CPU cores: host | output |")
    print("|---" * (len(budgets) + 2) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in SHAPES:
            cells, told = [], []
            for budget in budgets:
                plan = plan_of(Path(scratch), name, budget or "1TiB")
                device, dtype = ("cuda", torch.bfloat16) if budget else ("cpu", torch.float32)
                e = predict(plan, calibration(), torch.device(device), dtype)
                cells.append(f"{gib(e.device)} / {gib(e.host)} GiB" if budget else f"{gib(e.host)} GiB")
                told += [f"    {name}, {budget or 'CPU'}, {side}: {format_size(nbytes):>12}  {term}"
                         for side in ("device", "host") for term, nbytes in getattr(e, side).items() if nbytes]
            print(f"| {name} | " + " | ".join(cells) + f" | {e.disk / 2**30:.1f} GiB |")
            if args.terms:
                print("\n".join(told))


if __name__ == "__main__":
    main()
