"""What else a first user gets wrong, through the real command line: tokenizer, calibration, recipe, flags, budget,
output directory. As in test_bad_models.py: one screen, an exit code, nothing left behind."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from builders import save_tokenizer
from damage import bench, screen  # noqa: F401

from streammerge.cli import main

# ---- tokenizer and calibration


def test_a_tokenizer_without_markers(bench):
    save_tokenizer(bench.models["lrm"], template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = json.loads((bench.models["lrm"] / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("think", "thonk")
    (bench.models["lrm"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    bench.refused(3, bench.models["lrm"] / "tokenizer.json", "no thinking markers", "thinking.open", "<think>")


def test_no_tokenizer_at_all(bench):
    for file in bench.models["lrm"].glob("*token*"):
        file.unlink()
    bench.refused(3, bench.models["lrm"], "no tokenizer")


def test_an_instruction_file_as_reasoning_set(bench):
    shutil.copy(bench.sets["instruction"], bench.sets["reasoning"])
    bench.refused(3, bench.sets["reasoning"], "calibration.reasoning", "instruction set", "exchanged")


def test_both_files_exchanged(bench):
    a, b = bench.sets["reasoning"], bench.sets["instruction"]
    bench.sets = {"reasoning": b, "instruction": a}
    bench.refused(3, a, b, "calibration.reasoning", "calibration.instruction")


def test_spans_that_are_not_in_their_text(bench):
    def change(samples):
        samples[2]["related_prompt_list"][0]["prompt_spans"] = ["in lower case"]
        samples[5]["unrelated_response_spans"] = ["as he said"]
        return samples

    bench.edit_samples("instruction", change)
    told = bench.refused(3, bench.sets["instruction"], "'in lower case'", "sample 2", "'as he said'", "sample 5")
    assert "prompt_spans" in told and "unrelated_response_spans" in told


def test_mistakes_of_both_files_at_once(bench):
    bench.edit_samples("instruction", lambda s: [{k: v for k, v in x.items() if k != "reason"} for x in s])
    bench.edit_samples("reasoning", lambda s: [*s[:3], {**s[3], "reasoning": 7}, *s[4:]])
    bench.refused(3, bench.sets["instruction"], "'reason' is missing", bench.sets["reasoning"], "r3", "is a number")


def test_hundreds_of_mistakes_fit_one_screen(bench):
    bench.edit_samples("instruction", lambda s: [{"id": i} for i in range(300)])
    bench.refused(3, bench.sets["instruction"], "more of the same kind")


def test_too_few_markers(bench):
    bench.edit_samples("reasoning", lambda s: [{**x, "reasoning": "" if i < 4 else x["reasoning"]}
                                               for i, x in enumerate(s)])  # fmt: skip
    bench.refused(7, bench.sets["reasoning"], "66.7% of 12", "thinking.min_share", "sample r0", "sample r3")
    bench.recipe(thinking={"min_share": 0.5})
    assert main(["merge", str(bench.root / "recipe.yml"), str(bench.out), "--quiet"]) == 0


def test_samples_over_the_limit(bench):
    told = bench.refused(3, bench.sets["instruction"], "max_tokens", "on_long", calibration={"max_tokens": 60})
    assert told.count(" tokens") > 3


# ---- recipe, flags, output, budget


def test_recipe_typos_are_all_named(bench):
    text = bench.recipe().read_text().replace("merge_method: rain", "merge_metod: rain")
    recipe = bench.recipe(text + "lambda: much\nbasis: {energie: 0.9}\n")
    bench.refused(2, f"{recipe}:", "unknown key 'merge_metod'; did you mean 'merge_method'?", "lambda is 'much'",
                  "did you mean 'energy'?", "'merge_method' is missing")  # fmt: skip


def test_unknown_recipe_file(bench):
    assert main(["merge", str(bench.root / "absent.yml"), str(bench.out)]) == 2
    told = bench.capfd.readouterr().err
    screen(told)
    assert str(bench.root / "absent.yml") in told and not bench.out.exists()


def test_layers_that_do_not_exist(bench):
    bench.refused(3, "layers: 7", "3 layers", layers="1-7")


@pytest.mark.parametrize("flags, named", [
    (["--device", "tpu9"], "--device"), (["--device", "cuda:99"], "--device cuda:99"),
    (["--device-memory", "lots"], "--device-memory"), (["--host-memory", "0GB"], "--host-memory"),
    (["--lambda", "nan"], "--lambda"), (["--lambda", "x"], "'x': wanted a finite number"),
    (["--tokens-per-batch", "-5"], "--tokens-per"), (["--tokens-per-batch", "x"], "wanted a whole number, at least 64"),
    (["--threads", "0"], "wanted a whole number, at least 1"),
    (["--colour"], "--colour"),
])  # fmt: skip
def test_flags(bench, flags, named):
    bench.recipe()
    bench.refused(2, named, flags=flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(bench):
    bench.recipe()
    bench.refused(2, "--device cuda", "0 CUDA devices", flags=["--device", "cuda"])


def test_budget_too_small(bench):
    told = bench.refused(4, "host memory", "needed, 64.00 KiB given", budget={"host_memory": "64KiB"})
    needed = told.split("host memory: ")[1].split(" needed")[0].replace(" ", "")
    assert "lower budget.tokens_per_batch" not in told
    bench.refused(4, "lower budget.tokens_per_batch", budget={"host_memory": "64KiB", "tokens_per_batch": 4096})
    size = str(float(needed[:-3]) * 1.01) + needed[-3:]
    bench.recipe(budget={"host_memory": size})
    assert main(["merge", str(bench.root / "recipe.yml"), str(bench.out), "--quiet"]) == 0, "the minimum does not work"


def test_output_directory_in_use(bench):
    bench.out.mkdir(parents=True)
    (bench.out / "thesis.tex").write_text("years of work")
    bench.recipe()
    bench.refused(3, bench.out, "thesis.tex")


def test_output_is_a_file(bench):
    bench.out.parent.mkdir()
    bench.out.write_text("years of work")
    bench.recipe()
    bench.refused(3, bench.out, "is a file")


def test_output_is_one_of_the_models(bench):
    bench.out = bench.models["lrm"]
    bench.recipe()
    bench.refused(3, bench.models["lrm"], "lies in reasoning_model")


def test_output_locked_by_a_live_process(bench):
    bench.recipe()
    code = "import sys\nfrom pathlib import Path\nfrom streammerge.io.claim import Claim\n"
    code += "Claim(Path(sys.argv[1])).acquire()\nprint('held', flush=True)\nsys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(bench.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        bench.refused(3, bench.out, f"pid {holder.pid}")
    finally:
        holder.communicate("")


def test_an_empty_output_directory_survives_a_failure(bench):
    bench.out.mkdir(parents=True)
    bench.edit_tensor("lrm", "model.norm.weight", float("nan"))  # found by the verification at the end
    bench.refused(3, "model.norm.weight")
    assert bench.out.is_dir() and not list(bench.out.iterdir())


def test_a_failed_verification_removes_only_what_was_written(bench, monkeypatch):
    from streammerge import pipeline
    from streammerge.errors import VerificationError

    def fails(plan, out):
        assert (out / "model.safetensors").exists() or (out / "model.safetensors.index.json").exists()
        (out / "note.txt").write_text("put here by somebody else in the meantime")
        raise VerificationError("the disk lied")

    monkeypatch.setattr(pipeline, "verify_output", fails)
    bench.recipe()
    assert main(["merge", str(bench.root / "recipe.yml"), str(bench.out), "--quiet"]) == 5
    assert [p.name for p in bench.out.iterdir()] == ["note.txt"]


def test_an_itm_that_is_the_base(bench):
    shutil.rmtree(bench.models["itm"])
    shutil.copytree(bench.models["base"], bench.models["itm"])
    bench.refused(6, bench.models["itm"], bench.models["base"], "hold the same weights", "allow_unchanged")


def test_lambda_zero_changes_nothing(bench):
    bench.recipe()
    bench.refused(6, "lambda", flags=["--lambda", "0"])
