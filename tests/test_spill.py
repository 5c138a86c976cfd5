"""Activations that the host has no room for: spilled to a file, and the same bytes come out."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import recipe_text

from streammerge import merge, parse_recipe, pipeline
from streammerge.errors import ResourceError
from streammerge.estimate import predict
from streammerge.io.stash import Stash
from streammerge.planned import make_plan
from streammerge.progress import Progress

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_spilled_comes_back(tmp_path, dtype):
    stash, batches = Stash(CPU, spill=tmp_path), {n: torch.randn(2, 3 + n, 5).to(dtype) for n in range(4)}
    for n, hidden in batches.items():
        stash.put(n, hidden.transpose(0, 1).contiguous().transpose(0, 1))  # any strides
    assert os.listdir(tmp_path) == [], "the file has no name: a crash leaves nothing"
    stash.put(2, batches[2] * 2)  # in place of what was there
    batches[2] = batches[2] * 2
    for n in (3, 0, 2, 1):
        assert torch.equal(stash.fetch(n), batches[n]) and torch.equal(stash.part(n, 1), batches[n][1])
    assert stash.nbytes == sum(t.numel() * dtype.itemsize for t in batches.values())
    assert stash.kept() == {n: (t.shape, t.dtype) for n, t in batches.items()}
    assert all(torch.equal(stash.on_host(n), t) for n, t in batches.items())
    stash.drop()
    assert stash.nbytes == 0 and stash.kept() == {}


def spilling(monkeypatch, seen: list) -> None:
    """Merges choose to spill, whatever the budget."""
    plain = pipeline.predict

    def predict(*args):
        found = plain(*args)
        seen.append(found)
        return dataclasses.replace(found, choice=dataclasses.replace(found.choice, spill=True), scratch=1)

    monkeypatch.setattr(pipeline, "predict", predict)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_same_bytes_as_without(make_recipe, tmp_path, monkeypatch, scope, one_thread):
    recipe = make_recipe(coefficients={"scope": scope})
    merge(recipe, tmp_path / "held")
    with monkeypatch.context() as patch:
        spilling(patch, [])
        report = merge(recipe, tmp_path / "spilled", save_every=0.0)  # snapshots read the file as well
    assert report["plan"]["spill"]
    for file in (tmp_path / "held").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "spilled" / file.name).read_bytes()
    assert report["plan"]["host_total"] > 0 and not (tmp_path / "spilled" / ".streammerge").exists()


def least(recipe, tmp_path, **budget) -> int:
    """The host budget that an error names as needed."""
    with pytest.raises(ResourceError) as told:
        merge(dataclasses.replace(recipe, budget=dataclasses.replace(recipe.budget, **budget)), tmp_path / "none")
    return told


def test_a_budget_below_the_activations_spills_and_one_below_the_rest_is_refused(make_recipe, tmp_path, monkeypatch):
    recipe, seen = make_recipe(), []
    with monkeypatch.context() as patch:
        spilling(patch, seen)
        merge(recipe, tmp_path / "first")
    limit = sum(seen[0].host.values())
    while not seen[-1].spill:  # the first budget, from above, at which nothing smaller helps
        limit -= 10_000
        tight = dataclasses.replace(recipe, budget=dataclasses.replace(recipe.budget, host_memory=str(limit)))
        plan = make_plan(tight)
        seen.append(predict(plan, pipeline.calibrate(plan, Progress("quiet")), CPU, torch.float32))
    report = merge(tight, tmp_path / "tight")
    assert report["plan"]["spill"] and report["plan"]["scratch"] > 0 and report["plan"]["host_total"] <= limit
    assert "host memory" in str(least(recipe, tmp_path, host_memory="1MiB").value)
    told = least(recipe, tmp_path, host_memory=str(limit), scratch_space="1000")
    assert "1000 B are given (--scratch-space)" in str(told.value) and not (tmp_path / "none").exists()
    told = least(recipe, tmp_path, host_memory=str(limit), scratch_dir=str(tmp_path / "nowhere"))
    assert "--scratch-dir" in str(told.value) and "No such file" in str(told.value)


def test_a_full_scratch_disk_is_told(tmp_path):
    """A limit on the size of files stands for the full disk: writing the spill file fails with a real error."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from streammerge.errors import ResourceError\n"
        "from streammerge.io.stash import Stash\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    Stash(torch.device('cpu'), spill=Path(sys.argv[1])).put(0, torch.zeros(1, 64, 64))\n"
        "except ResourceError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "--scratch-dir" in done.stdout and done.returncode == 0, done.stderr


def test_recipes_name_the_scratch_directory_beside_themselves(trio, sets, tmp_path):
    text = recipe_text(trio, sets, budget={"scratch_dir": "big-disk"})
    assert Path(parse_recipe(text, "r.yml", tmp_path).budget.scratch_dir) == tmp_path / "big-disk"


# ---- memory that runs out all the same


@pytest.fixture()
def starved(monkeypatch):
    """Layers find too little memory for batches of more than so many tokens: a real allocation fails."""
    from streammerge import forward

    plain = forward.functional_call

    def call(module, weights, args, *rest, **kwargs):
        if args[0].dim() == 3 and args[0].shape[0] * args[0].shape[1] > call.most:
            torch.empty(1 << 60, dtype=torch.uint8)
        return plain(module, weights, args, *rest, **kwargs)

    call.most = 1 << 30
    monkeypatch.setattr(forward, "functional_call", call)
    return call


def test_out_of_memory_is_tried_once_more_with_half_the_batch(make_recipe, tmp_path, starved):
    recipe = make_recipe(budget={"tokens_per_batch": 600})
    starved.most = 300
    report = merge(recipe, tmp_path / "out")
    assert report["plan"]["tokens_per_batch"] == 300
    assert "out of memory with batches of 600 tokens: done again with 300" in report["warnings"]
    starved.most = 10
    with pytest.raises(ResourceError, match="batches of 300 tokens.*--tokens-per-batch"):
        merge(recipe, tmp_path / "never")
    assert not (tmp_path / "never").exists()
