"""The mutation fuzzer of fuzz/ with few cases and one seed; `make test-slow` runs it with more than 20,000.

Below it: every defect that fuzzing or reading for it has found, by name, as the smallest input that showed it.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
from builders import recipe_text, save_trio, write_sets
from fuzz.runner import run_target
from fuzz.targets import TARGETS

from streammerge import load_recipe, merge
from streammerge.errors import InputError
from streammerge.io.checkpoint import INDEX, open_checkpoint
from streammerge.planned import make_plan

COUNTS = {"header": 400, "index": 300, "recipe": 200, "calibration": 60, "config": 60, "tokenizer": 40, "merge": 12}
SEED = 2026


@pytest.mark.parametrize("name", COUNTS)
def test_mutations(name, tmp_path):
    outcome = run_target(name, tmp_path, SEED, range(COUNTS[name]))
    assert not outcome.defects, "\n".join(outcome.defects[:10])
    assert outcome.ends.total() == COUNTS[name]
    assert outcome.ends["works"] < COUNTS[name], "nothing was refused: does the damage reach the reader?"
    assert outcome.ends["works"] > 0, "nothing works: is the undamaged input right?"


@pytest.mark.parametrize("name", ["header", "index", "config"])
def test_the_fuzzer_finds_a_reader_that_crashes(name, tmp_path, monkeypatch):
    """A KeyError, a hang and an error without a file's name must all be counted as defects."""
    ends = [KeyError("x"), InputError("something is wrong"), None]

    def broken(self):
        end = ends[broken.calls % 3]
        broken.calls += 1
        if end:
            raise end
        signal.raise_signal(signal.SIGALRM)

    broken.calls = 0
    monkeypatch.setattr(TARGETS[name], "run", broken)
    outcome = run_target(name, tmp_path, SEED, range(3))
    assert len(outcome.defects) == 3
    for line, wanted in zip(outcome.defects, ("KeyError", "names no file", "Hang"), strict=True):
        assert wanted in line


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    return save_trio(tmp_path_factory.mktemp("small"), "llama", layers=2, hidden=16)


@pytest.fixture()
def small(tmp_path, trio):
    """A copy of a tiny trio: (models, sets, a function of recipe keys that gives the recipe's path)."""
    import shutil

    models = {role: tmp_path / role for role in trio}
    for role, path in trio.items():
        shutil.copytree(path, models[role])
    sets = write_sets(tmp_path, reasoning=6, instruction=4)

    def recipe(**keys):
        (tmp_path / "recipe.yml").write_text(recipe_text(models, sets, **keys))
        return load_recipe(tmp_path / "recipe.yml")

    return models, sets, recipe


def change_configs(models, **keys):
    for path in models.values():
        config = json.loads((path / "config.json").read_text()) | keys
        (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("keys", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 2**62}, {"head_dim": 10**30}, {"hidden_size": 2**31},
    {"max_position_embeddings": "400"}, {"max_position_embeddings": [1]}, {"vocab_size": "400"}, {"vocab_size": -1},
])  # fmt: skip
def test_sizes_of_a_config_that_never_end_or_do_not_compare(keys, small, tmp_path):
    """A plan of 10^9 layers hung; a head of 10^30 was an OverflowError, a limit that is text a TypeError."""
    models, _, recipe = small
    change_configs(models, **keys)
    with pytest.raises(InputError, match=f"config.json: {next(iter(keys))} is"):
        merge(recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, wanted", [
    ('{"model_type": "llama", "model_type": "qwen2"}', "'model_type' appears twice"), ("{" * 100_000, "not valid JSON"),
    ('{"a":' * 100_000, "nested too deep"), ('{"rope_theta": NaN}', "NaN is no JSON number"),
])  # fmt: skip
def test_a_config_that_readers_would_disagree_on(text, wanted, small):
    models, _, recipe = small
    (models["lrm"] / "config.json").write_text(text)
    with pytest.raises(InputError, match=wanted):
        make_plan(recipe())


@pytest.mark.parametrize("shard", ["\ud800", "a\0b", "\x1b[2J", "n" * 5000, "", "..", "../lrm2/x", "/etc/passwd", "."])
def test_shard_names_that_are_none(shard, small):
    """Half a surrogate pair was a UnicodeEncodeError; an escape sequence reached the terminal."""
    models, _, _ = small
    (models["lrm"] / "model.safetensors").rename(models["lrm"] / "model-00001-of-00002.safetensors")
    (models["lrm"] / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(InputError) as caught:
        open_checkpoint(models["lrm"], "reasoning_model")
    assert str(models["lrm"]) in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_links_lead_nowhere_but_into_the_directory(small, tmp_path):
    models, _, _ = small
    file = models["lrm"] / "model.safetensors"
    private = tmp_path / "private.safetensors"
    file.rename(private)
    for target in (private, os.path.relpath(private, file.parent), file):  # the last is a link to itself
        file.symlink_to(target)
        with pytest.raises(InputError, match="is a link that leaves|is missing"):
            open_checkpoint(models["lrm"], "reasoning_model")
        file.unlink()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(name, small):
    models, _, _ = small
    for file in models["lrm"].glob("model*"):
        file.unlink()
    canary = models["lrm"].parent / "canary"
    (models["lrm"] / name).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(InputError, match="can run code.*save_pretrained"):
        open_checkpoint(models["lrm"], "reasoning_model")
    assert not canary.exists()


def test_code_beside_a_checkpoint_never_runs(small, tmp_path):
    """auto_map in every config and a module with that name in every directory: the merge works and runs none of it."""
    models, _, recipe = small
    canary = tmp_path / "canary"
    maps = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for path in models.values():
        for name in ("evil.py", "configuration_evil.py", "__init__.py", "conftest.py", "setup.py", "sitecustomize.py"):
            (path / name).write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            config = json.loads((path / name).read_text()) | {"auto_map": maps, "trust_remote_code": True}
            (path / name).write_text(json.dumps(config))
    merge(recipe(), tmp_path / "out")
    assert not canary.exists(), "code of a checkpoint ran"
    assert not list((tmp_path / "out").glob("*.py")), "code was copied into the output"


def test_the_package_unpickles_nothing():
    from pathlib import Path

    import streammerge

    for file in Path(streammerge.__file__).parent.rglob("*.py"):
        text = file.read_text()
        for word in ("torch.load(", "import pickle", "yaml.load(", "trust_remote_code=True", "eval(", "exec("):
            at = text.replace(".eval(", "").find(word)
            assert at < 0, f"{file.name}: {word}"
