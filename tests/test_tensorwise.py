"""Whole merges of mergekit configurations: bytes, kills, errors, memory, plan."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from builders import save_trio
from method_runs import checkpoint
from safetensors.torch import load_file, save_file

from streammerge import api, stream, tensorwise
from streammerge.errors import InputError, RecipeError, ResourceError
from streammerge.io.header import ITEM_BYTES
from streammerge.io.shards import OutTensor
from streammerge.jobs import Source, TensorJob, TensorPlan
from streammerge.methods import METHODS


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    return save_trio(tmp_path_factory.mktemp("trio"), "llama", dtype=torch.bfloat16)


def recipe(folder: Path, trio, method="ties", **extra) -> Path:
    per_model = {"density": 0.5, "weight": 0.5} if method in ("ties", "dare_ties", "della") else {}
    models = [{"model": str(trio[role]), "parameters": per_model} for role in ("itm", "lrm")]
    file = folder / f"{method}.yml"
    file.write_text(yaml.safe_dump({"models": models, "merge_method": method, "base_model": str(trio["base"]),
                                    "dtype": "bfloat16", **extra}))  # fmt: skip
    return file


def weights(out: Path) -> str:
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(out.glob("*.safetensors")))).hexdigest()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "model_stock", "karcher"])
def test_threads_and_sharing_out_do_not_change_a_byte(method, trio, tmp_path, monkeypatch):
    file = recipe(tmp_path, trio, method)
    found = []
    for threads, chunk in ((1, 1 << 17), (3, 1000), (2, 333)):  # 333 of bf16: no whole words, whose sums are checked
        monkeypatch.setattr(stream.Merge.__init__, "__kwdefaults__",
                            {**stream.Merge.__init__.__kwdefaults__, "chunk": chunk})
        out = tmp_path / f"out{len(found)}"
        api.merge(file, out, threads=threads)
        assert api.verify(out).error() is None
        found.append(weights(out))
    assert len(set(found)) == 1
    assert torch.get_num_threads() > 0


def test_copies_are_byte_copies_and_the_rest_is_told(trio, tmp_path):
    """Passthrough by slices takes other names' bytes; a scale makes it a computation."""
    scale = {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}
    upper = {"model": str(trio["itm"]), "layer_range": [1, 3], "parameters": scale}
    slices = [{"sources": [{"model": str(trio["lrm"]), "layer_range": [0, 2]}]}, {"sources": [upper]}]
    file = tmp_path / "stack.yml"
    file.write_text(yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
    report = api.merge(file, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    lrm, itm = ({k: v for f in trio[r].glob("*.safetensors") for k, v in load_file(f).items()} for r in ("lrm", "itm"))
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], lrm["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(found["model.layers.3.mlp.up_proj.weight"], itm["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(found["model.layers.2.mlp.down_proj.weight"], itm["model.layers.1.mlp.down_proj.weight"] * 0.5)
    assert report["tensors"] == {"merged": 2, "copied": len(found) - 2}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


def test_a_killed_merge_goes_on_to_the_same_bytes(trio, tmp_path):
    file = recipe(tmp_path, trio, "dare_ties")
    whole, out = tmp_path / "whole", tmp_path / "out"
    api.merge(file, whole)
    script = (
        "import streammerge.tensorwise as t, sys, time; from streammerge import api\n"
        "run = t.METHODS['dare_ties'].run; count = [0]\n"
        "def slow(*a, **k):\n"
        "    count[0] += 1\n"
        "    if count[0] == 14: print('half', flush=True)\n"
        "    time.sleep(0.5 if count[0] > 12 else 0)\n"
        "    run(*a, **k)\n"
        "object.__setattr__(t.METHODS['dare_ties'], 'run', slow)\n"
        f"api.merge({str(file)!r}, {str(out)!r}, threads=1, save_every=0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "half"
    deadline = time.monotonic() + 30
    while not (out / ".streammerge" / "journal.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists()
    report = api.merge(file, out)
    assert "of 29 tensors" in report["resumed_at"] and not report["resumed_at"].startswith("merge: 0 ")
    assert weights(out) == weights(whole) and api.verify(out).error() is None


def test_what_is_done_is_not_done_again_and_another_recipe_does_not_go_on(trio, tmp_path, monkeypatch):
    file, out = recipe(tmp_path, trio), tmp_path / "out"
    spec = METHODS["ties"]
    real, seen = spec.run, []

    def failing(merge, **settings):
        seen.append(merge.job.out.name)
        if len(seen) == 20:
            raise KeyboardInterrupt
        real(merge, **settings)

    monkeypatch.setitem(tensorwise.METHODS, "ties", spec.__class__(**{**vars(spec), "run": failing}))
    monkeypatch.setattr("streammerge.threads._POLL", 0.01)
    with pytest.raises(KeyboardInterrupt):
        api.merge(file, out, threads=1, save_every=0)
    journal = json.loads((out / ".streammerge" / "journal.json").read_text().partition("\n")[2])
    done = journal["state"]["placed"]
    assert done
    other = recipe(tmp_path, trio, parameters={"normalize": False})
    with pytest.raises(InputError, match="differs from this one"):
        api.merge(other, out)
    file, seen[:] = recipe(tmp_path, trio), [""] * 100
    api.merge(file, out)
    assert not set(done) & set(seen) and len(seen) == 100 + 29 - len(done)


def job(made, method="linear", shape=(40, 30), dtype="F32", **parameters):
    sources = tuple(Source(c, "w", {"weight": 0.5}) for c in made)
    return TensorJob(OutTensor("w", dtype, shape), method, sources, None, parameters)


def test_values_that_are_not_finite_are_told_by_tensor_and_file(tmp_path, monkeypatch):
    kwargs = stream.Merge.__init__.__kwdefaults__
    monkeypatch.setattr(stream.Merge.__init__, "__kwdefaults__", {**kwargs, "chunk": 100})  # others wait for this one
    good, bad = torch.zeros(40, 30), torch.zeros(40, 30)
    bad[20, 3] = float("nan")
    for values, text in ((bad, r"m1: w in .*model.safetensors has NaN or infinite values"),
                         (torch.full((40, 30), 3e38), r"w: the merged values overflow F16 by linear")):  # fmt: skip
        made = [checkpoint(tmp_path / text[:2], f"m{i}", {"w": v}) for i, v in enumerate((good, values))]
        dtype = "F16" if "overflow" in text else "F32"
        plan = TensorPlan("{}", "x.yml", "linear", tuple(made), made[0], {}, {}, (job(made, dtype=dtype),))
        with pytest.raises(InputError, match=text):
            run(plan, tmp_path / f"out-{text[:2]}")
        assert not (tmp_path / f"out-{text[:2]}").exists()


def run(plan, out, threads=2, **settings):
    from streammerge.io.writer import CheckpointWriter
    from streammerge.progress import Progress

    with CheckpointWriter(out, plan.tensors, 1 << 40) as writer:
        tensorwise.merge_tensors(plan, writer, Progress("quiet"), threads, **settings)
        writer.finish()


def test_jobs_that_cannot_run_are_listed_at_once(tmp_path):
    made = [checkpoint(tmp_path, f"m{i}", {"w": torch.zeros(40, 30), "i": torch.zeros(3, dtype=torch.int64)})
            for i in range(2)]  # fmt: skip
    integers = TensorJob(OutTensor("i", "I64", (3,)), "linear", tuple(Source(c, "i", {"weight": 1}) for c in made))
    other = TensorJob(OutTensor("s", "F32", (2, 2)), "linear", (Source(made[0], "w"),))
    odd = TensorJob(OutTensor("w", "F32", (40, 30)), "median", (Source(made[0], "w"),))
    plan = TensorPlan("{}", "x.yml", "linear", tuple(made), made[0], {}, {}, (integers, other, odd))
    with pytest.raises(InputError) as error:
        run(plan, tmp_path / "out")
    for part in ("x.yml", "i: I64 is no dtype", "s: its inputs have the shapes [(40, 30)]", "unknown method 'median'"):
        assert part in str(error.value)


def test_a_budget_that_is_too_small_is_refused_and_a_small_one_takes_threads(trio, tmp_path):
    file = recipe(tmp_path, trio)
    with pytest.raises(ResourceError, match="Raise the budget"):
        api.merge(file, tmp_path / "out", host_memory="1MiB")
    assert api.plan(file, threads=8, host_memory="200MiB")["threads"] == 2
    with pytest.raises(RecipeError, match="lambda: not for a mergekit configuration"):
        api.merge(file, tmp_path / "out", lam=0.5)


@pytest.mark.parametrize("method", ["ties", "slerp", "karcher"])
def test_memory_does_not_know_the_size_of_a_tensor(method, tmp_path):
    """Beyond what torch takes when it is imported: the plan's bound holds for a tensor of four times that size."""
    shape = (4096, 10240)
    for i in range(2):
        path = tmp_path / f"m{i}"
        path.mkdir()
        torch.manual_seed(i)
        block = torch.randn(1024, shape[1]).bfloat16()
        save_file({"w": block.repeat(4, 1)}, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text('{"model_type": "llama"}')
    script = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_tensorwise import measured\n"
        f"measured({str(tmp_path)!r}, {method!r}, {shape!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, bound, size = json.loads(done.stdout)
    assert bound < size * 3, "inputs and output whole would take as much"
    assert peak < 1.1 * bound


def measured(root, method, shape):
    """Prints [peak beyond imports, the plan's bound, bytes of one tensor]; in a process of its own."""
    from streammerge import memory
    from streammerge.io.checkpoint import open_checkpoint

    made = [open_checkpoint(Path(root) / f"m{i}", f"m{i}") for i in range(2)]
    sources = tuple(Source(c, "w", {"weight": 0.5, "density": 0.4}) for c in made)
    base = None if method == "karcher" else sources[0]
    used = sources[1:] if method == "slerp" else sources
    task = TensorJob(OutTensor("w", "BF16", shape), method, used, base, {"t": 0.3} if method == "slerp" else {})
    plan = TensorPlan("{}", "x.yml", method, tuple(made), made[0], {}, {}, (task,))
    torch.randn(10).sort()
    memory.tame_allocator()
    memory.reset_host_peak()
    floor = memory.host_now()
    run(plan, Path(root) / "out")
    size = shape[0] * shape[1] * ITEM_BYTES["BF16"]
    print(json.dumps([memory.host_peak() - floor, 2 * tensorwise.thread_bytes(plan), size]))


def test_the_plan_tells_every_tensor_its_resolved_parameters(trio, tmp_path, capsys):
    from streammerge.cli import main

    file = recipe(tmp_path, trio, parameters={"lambda": [0.5, 1.5]})
    assert main(["plan", str(file), "--json"]) == 0
    told = capsys.readouterr()
    plan = json.loads(told.out)
    first, last = (plan["per_tensor"][f"model.layers.{i}.mlp.up_proj.weight"]["parameters"] for i in (0, 2))
    assert (first["lambda"], last["lambda"]) == (0.5, 1.5) and first["density"] == [0.5, 0.5]
    assert "model.layers.2.mlp.up_proj.weight  BF16 96x48  ties" in told.err and "lambda=1.5" in told.err
    assert plan["disk"] == sum(f.stat().st_size for f in trio["base"].glob("*.safetensors")) - 8 * len(
        list(trio["base"].glob("*.safetensors"))) or plan["disk"] > 100_000  # fmt: skip
    assert main(["merge", str(file), str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()


def test_the_command_merges_and_the_model_loads(trio, tmp_path):
    from transformers import AutoModelForCausalLM

    from streammerge.cli import main

    out = tmp_path / "out"
    assert main(["merge", str(recipe(tmp_path, trio)), str(out), "--quiet"]) == 0
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert (out / "mergekit_config.yml").read_text() == recipe(tmp_path, trio).read_text()
