"""A real checkpoint end to end: SmolLM2-135M as LRM (its `<think>` is ordinary text), merged from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import SETS, recipe_text, write_sets
from safetensors import safe_open
from smollm2 import THINKING
from test_forward import Sample, streamed
from test_memory import beyond_imports, merged_by_command

MARGIN = 200_000_000
EMBEDDING = "model.embed_tokens.weight"


def short_sets(root: Path, reasoning: int = 4, instruction: int = 6) -> dict[str, Path]:
    """The shortest samples of the authors' sets, or made-up ones where these are not at hand."""
    if not all(path.exists() for path in SETS.values()):
        return write_sets(root, reasoning, instruction)
    chosen = sorted(json.loads(SETS["reasoning"].read_text()), key=lambda s: len(s["prompt"] + s["reasoning"]))
    lines = sorted(SETS["instruction"].read_text().splitlines(), key=len)
    paths = {"reasoning": root / "reasoning.json", "instruction": root / "instruction.jsonl"}
    paths["reasoning"].write_text(json.dumps(chosen[:reasoning]))
    paths["instruction"].write_text("\n".join(lines[:instruction]))
    return paths


@pytest.fixture(scope="module")
def merged(smollm2, tmp_path_factory):
    """The calibration, the output and the report of one `streammerge merge` in its own process."""
    from streammerge import load_recipe
    from streammerge.pipeline import calibrate
    from streammerge.planned import make_plan
    from streammerge.progress import Progress

    root = tmp_path_factory.mktemp("smollm2")
    recipe = root / "recipe.yml"
    text = recipe_text(smollm2, short_sets(root), thinking=THINKING, calibration={"holdout": 0.25})
    recipe.write_text(text)
    report = merged_by_command(recipe, root / "out")
    data = calibrate(make_plan(load_recipe(recipe)), Progress("quiet"))
    return SimpleNamespace(data=data, out=root / "out", report=report, lrm=smollm2["lrm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_forward_is_bit_equal_to_the_resident_model(smollm2, dtype):
    from transformers import AutoModelForCausalLM

    samples = [Sample(n, n) for n in (9, 40, 61, 120)]
    _, stream = streamed(smollm2["lrm"], samples, dtype, tokens_per_batch=130)
    resident = AutoModelForCausalLM.from_pretrained(smollm2["lrm"], dtype=dtype, attn_implementation="sdpa").eval()
    assert len(stream.batches) == 3 and len(resident.model.layers) == 30
    for n, batch in enumerate(stream.batches):
        with torch.no_grad():
            mine = resident.lm_head(resident.model.norm(stream.stash.fetch(n)))
            theirs = resident(input_ids=batch.ids, use_cache=False).logits
        for row, length in enumerate(batch.lengths):
            assert torch.equal(mine[row, :length], theirs[row, :length]), f"batch {n}, row {row}"


def test_output_loads_and_generates(merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(merged.out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(merged.out)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])  # it is still a language model


def test_untouched_bytes_are_the_lrms(merged):
    def raw(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as f:
                found |= {name: f.get_tensor(name).view(torch.int16) for name in f.keys()}  # noqa: SIM118
        return found

    before, after = raw(merged.lrm), raw(merged.out)
    assert before.keys() == after.keys() and len(before) == 272
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (merged.out / name).read_bytes() == (merged.lrm / name).read_bytes()


def test_markers_of_several_tokens_are_protected(merged):
    from streammerge.markers import load_tokenizer

    tokenizer = load_tokenizer(merged.lrm)
    assert all(len(tokenizer.encode(text)) > 1 for text in THINKING.values())
    data = merged.data
    assert data.notes["reasoning"]["marker_share"] == 1.0 and len(data.reasoning) == 3
    for sample in (*data.reasoning, *data.heldout):
        opener, closer = (
            tokenizer.decode([sample.ids[p] for p in range(first, last + 1)])
            for first, last in ((sample.opener - 3, sample.opener), (sample.predecessor + 1, sample.closer))
        )
        assert "<think>" in opener and "</think>" in closer
        assert {*range(sample.predecessor, sample.closer + 1), sample.opener} <= set(sample.omega)


def test_merge_kept_its_promises(merged):
    """Null space before rounding, α inside its bounds and not constant, L_think finite and small."""
    told = merged.report
    assert all(t["leak"] <= 1e-5 and t["inside"] > 0 for t in told["per_tensor"].values())
    assert len(told["per_tensor"]) == 7 * 30 == told["verified"]["merged"]
    assert 0 <= told["alpha"]["min"] < told["alpha"]["max"] <= 2
    assert 0 < told["l_think"]["mean"] < 0.1


def test_peak_memory(merged):
    """Beyond imports: two layers in fp32, the calibration's hidden states, and 200 MB for all the rest (one token
    batch, the staged trio, features, the tokenizer, the family's modules, the allocator)."""
    data = merged.data  # the held-out set runs twice, through the LRM and through the merged model
    tokens = sum(len(s.ids) for s in (*data.reasoning, *data.heldout, *data.heldout, *data.instruction))
    layer = 4 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576)
    stash = 4 * tokens * 576
    bound, found = 2 * layer + stash + MARGIN, beyond_imports(merged.report)
    print(
        f"\nSmolLM2-135M: measured {found / 1e6:.1f} MB beyond imports ({merged.report['memory']['imports'] / 1e6:.1f})"
        f"; bound {bound / 1e6:.1f} MB = two layers {2 * layer / 1e6:.1f} + activations of {tokens} tokens "
        f"{stash / 1e6:.1f} + {MARGIN / 1e6:.0f}; planned {merged.report['plan']['host_total'] / 1e6:.1f}; "
        f"the model in fp32 {4 * 134_515_008 / 1e6:.1f}"
    )
    assert found <= bound
    assert found <= 1.1 * merged.report["plan"]["host_total"]
