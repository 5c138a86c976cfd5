"""What a first user gets wrong, through the real command line: an exit code, one screen of text that names everything
that is wrong, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import make_model, recipe_text, save_tokenizer, save_trio, write_sets
from safetensors.torch import load_file, save_file

from streammerge.cli import main

COMMAND = [sys.executable, "-c", "import sys; from streammerge.cli import main; sys.exit(main())"]


@pytest.fixture()
def bench(tmp_path, trio, sets, capfd):
    """A private copy of a trio and its sets, to be damaged, and the command over them."""
    return Bench(tmp_path, trio, sets, capfd)


class Bench:
    def __init__(self, root, trio, sets, capfd):
        self.root, self.capfd, self.out = root, capfd, root / "deep" / "out"
        self.models = {role: root / role for role in trio}
        for role, path in trio.items():
            shutil.copytree(path, self.models[role])
        self.sets = {kind: root / path.name for kind, path in sets.items()}
        for kind, path in sets.items():
            shutil.copy(path, self.sets[kind])

    def recipe(self, text: str | None = None, **keys) -> Path:
        path = self.root / "recipe.yml"
        path.write_text(recipe_text(self.models, self.sets, **keys) if text is None else text)
        return path

    def refused(self, code: int, *named: object, flags=(), **keys) -> str:
        """Run the merge; it must fail with `code`, name everything in `named`, and leave nothing."""
        before = snapshot(self.root)
        recipe = self.root / "recipe.yml" if (self.root / "recipe.yml").exists() and not keys else self.recipe(**keys)
        before |= snapshot(self.root)
        self.capfd.readouterr()
        try:
            found = main(["merge", str(recipe), str(self.out), *flags])
        except SystemExit as exit_:  # argparse
            found = exit_.code
        told = self.capfd.readouterr()
        screen(told.err)
        assert found == code, told.err
        assert told.out == ""
        for name in named:
            assert str(name) in told.err, f"{name} is not named in:\n{told.err}"
        assert snapshot(self.root) == before, "something was left behind"
        return told.err

    def edit_config(self, role: str, **changes):
        path = self.models[role] / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    def edit_tensor(self, role: str, tensor: str, value: float) -> Path:
        index = json.loads((self.models[role] / "model.safetensors.index.json").read_text())["weight_map"]
        file = self.models[role] / index[tensor]
        tensors = load_file(file)
        tensors[tensor].view(-1)[5] = value
        save_file(tensors, file, {"format": "pt"})
        return file

    def edit_samples(self, kind: str, change):
        path = self.sets[kind]
        text = path.read_text()
        if kind == "reasoning":
            path.write_text(json.dumps(change(json.loads(text))))
        else:
            path.write_text("".join(json.dumps(s) + "\n" for s in change([json.loads(x) for x in text.splitlines()])))


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every path below root, with the content of files."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def screen(text: str) -> None:
    """One screen, and no traceback."""
    assert "Traceback" not in text
    assert len(text.splitlines()) < 40, text


# ---- models


def test_missing_model_directories_are_all_named(bench):
    bench.models |= {"base": bench.root / "nowhere", "itm": bench.root / "elsewhere"}
    bench.sets["instruction"] = bench.root / "absent.jsonl"
    bench.refused(3, "base_model", bench.root / "nowhere", "instruct_model", bench.root / "elsewhere",
                  "calibration.instruction", bench.root / "absent.jsonl")  # fmt: skip


def test_a_missing_calibration_file(bench):
    bench.sets["reasoning"].unlink()
    bench.refused(3, "calibration.reasoning", bench.sets["reasoning"])


def test_wrong_family(bench):
    for role in bench.models:
        bench.edit_config(role, model_type="gpt2", hidden_size=..., num_attention_heads=...)
    told = bench.refused(3, "gpt2", "qwen3", *(p / "config.json" for p in bench.models.values()))
    assert told.count("model_type is 'gpt2'") == 3


def test_mixed_families(bench, tmp_path_factory):
    other = save_trio(tmp_path_factory.mktemp("q"), "qwen2")
    shutil.rmtree(bench.models["itm"])
    shutil.copytree(other["itm"], bench.models["itm"])
    bench.refused(3, "instruct_model", "model_type is 'qwen2'", "'llama'", bench.models["itm"])


def test_shapes_that_differ(bench):
    for role, sizes in (("itm", {"hidden": 32}), ("base", {"layers": 2, "intermediate_size": 40})):
        shutil.rmtree(bench.models[role])
        make_model("llama", **sizes).save_pretrained(bench.models[role])
    bench.refused(3, "hidden_size is 32", "instruct_model", "num_hidden_layers is 2", "intermediate_size is 40",
                  "base_model", bench.models["base"] / "config.json")  # fmt: skip


def test_shapes_that_differ_from_their_own_config(bench):
    shutil.rmtree(bench.models["base"])
    make_model("llama", intermediate_size=40).save_pretrained(bench.models["base"])
    bench.edit_config("base", intermediate_size=96)
    told = bench.refused(3, "base_model", "model.layers.2.mlp.down_proj.weight", "[48, 40]", "[48, 96]")
    assert told.count("has shape") == 9


def test_an_lrm_that_lacks_norms(bench):
    file = bench.models["lrm"] / "model.safetensors"
    model = make_model("llama")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for layer in (0, 2):
        del tensors[f"model.layers.{layer}.input_layernorm.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(48)
    for old in bench.models["lrm"].glob("model*"):
        old.unlink()
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "reasoning_model", "model.layers.0.input_layernorm.weight", "layers.2.input_layernorm",
                  "model.layers.1.self_attn.q_proj.bias")  # fmt: skip


@pytest.mark.parametrize("change, key", [
    ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"intermediate_size": None}, "intermediate_size is 'None'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"model_type": ["llama"]}, "model_type is ['llama']"),
    ({"hidden_act": "no_such_activation"}, "no_such_activation"),
    ({"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}}, "no_such_rope"),
])  # fmt: skip
def test_corrupted_config(bench, change, key):
    bench.edit_config("lrm", **change)
    bench.refused(3, key, bench.models["lrm"])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null", b"[" * 5000])
def test_config_that_is_no_json_object(bench, content):
    for role in bench.models:
        (bench.models[role] / "config.json").write_bytes(content)
    bench.refused(3, "config.json", "base_model", "instruct_model", "reasoning_model")


def test_quantized(bench):
    bench.edit_config("itm", quantization_config={"quant_method": "gptq", "bits": 4})
    bench.refused(3, "instruct_model", bench.models["itm"], "quantized")


def test_truncated_shards_are_all_named(bench):
    cut = []
    for role in ("base", "lrm"):
        file = sorted(bench.models[role].glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-100])
        cut.append(file)
    bench.refused(3, "base_model", "reasoning_model", *(f.name for f in cut), *(f.parent for f in cut), "download")


def test_three_broken_checkpoints_fit_one_screen(bench):
    for path in bench.models.values():
        for file in path.glob("*.safetensors"):
            file.write_bytes(b"no safetensors")
    bench.refused(3, *bench.models.values(), "model-00001-of-")


def test_nan_in_several_files(bench):
    key = "model.layers.{}.mlp.up_proj.weight"
    files = [bench.edit_tensor("itm", key.format(2), float("nan"))]
    files.append(bench.edit_tensor("base", key.format(1), float("inf")))
    files.append(bench.edit_tensor("lrm", "model.layers.0.input_layernorm.weight", float("nan")))
    bench.refused(3, *files, key.format(2), key.format(1), "input_layernorm", "itm", "base_model")


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_in_an_untouched_tensor(bench, tensor, value):
    file = bench.edit_tensor("lrm", tensor, value)
    bench.refused(3, tensor, file.parent, "reasoning_model")


def test_infinity_in_an_embedding_row_that_is_used(bench):
    file = bench.models["lrm"] / json.loads(
        (bench.models["lrm"] / "model.safetensors.index.json").read_text())["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][:, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "model.embed_tokens.weight", file, "reasoning_model")


def test_activations_that_overflow(bench):
    key = "model.layers.0.input_layernorm.weight"
    file = bench.edit_tensor("lrm", key, 1.0)
    tensors = load_file(file)
    tensors[key] *= 1e7
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "compute_dtype", compute_dtype="float16")


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
    (["--lambda", "nan"], "--lambda"), (["--lambda", "x"], "--lambda"), (["--tokens-per-batch", "-5"], "--tokens-per"),
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
    told = bench.refused(4, "host memory", "needed, 64KiB given", budget={"host_memory": "64KiB"})
    needed = told.split("host memory: ")[1].split(" needed")[0].replace(" ", "")
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
    bench.refused(3, bench.models["lrm"], "is not empty")


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


# ---- the command itself


def run(*args: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=180, **kwargs)


def test_as_a_subprocess(bench):
    """One bad input through a fresh interpreter: nothing but our message on stderr."""
    bench.sets["reasoning"].unlink()
    done = run("merge", bench.recipe(), bench.out)
    assert (done.returncode, done.stdout) == (3, "") and not bench.out.parent.exists()
    assert done.stderr.startswith("streammerge: error: ") and str(bench.sets["reasoning"]) in done.stderr
    screen(done.stderr)


def test_json_on_stdout_and_json_log_on_stderr(bench):
    done = run("merge", bench.recipe(), bench.out, "--json", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((bench.out / "streammerge_report.json").read_text())
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [e["layer"] for e in events if e["event"] == "layer"] == [0, 1, 2]
    assert all({"ts", "level", "event"} <= e.keys() for e in events)
    again = run("merge", bench.root / "recipe.yml", bench.out, "--json", "--log-format", "json")
    assert (again.returncode, again.stdout) == (3, "")
    told = [json.loads(line) for line in again.stderr.splitlines()][-1]
    assert told["level"] == "error" and told["exit_code"] == 3 and str(bench.out) in told["event"]


def test_quiet_is_quiet(bench):
    assert main(["merge", str(bench.recipe()), str(bench.out), "--quiet"]) == 0
    told = bench.capfd.readouterr()
    assert told.out == "" and told.err == ""


def test_help_tells_keys_and_exit_codes(capsys):
    for args in (["--help"], ["merge", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
    told = capsys.readouterr().out
    for word in ("merge_method", "base_model", "instruct_model", "reasoning_model", "calibration", "lambda", "130",
                 "exit codes", "streammerge_report.json", *(f"  {code}  " for code in range(8))):  # fmt: skip
        assert word in told, word
    start = told.index("  merge_method")
    example = yaml.safe_load(told[start : told.index("\n\n", start)])
    from streammerge import parse_recipe

    assert parse_recipe(yaml.safe_dump(example), "help").lam == 1.0


def test_interrupt_leaves_nothing(tmp_path):
    """Ctrl-C in the middle of the sweep of a model that takes seconds."""
    paths = save_trio(tmp_path, "llama", layers=12, hidden=192, shard="20MB")
    sets = write_sets(tmp_path, reasoning=60, instruction=60)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(recipe_text(paths, sets))
    before = snapshot(tmp_path)
    process = subprocess.Popen(
        [*COMMAND, "merge", str(recipe), str(tmp_path / "out"), "--log-format", "json"], stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if json.loads(line)["event"] == "layer":
            break
    assert list((tmp_path / "out").glob("*.partial")), "the merge was over before it could be interrupted"
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert time.perf_counter() - began < 30
    screen(rest)
    assert "nothing was left behind" in rest
    assert snapshot(tmp_path) == before
