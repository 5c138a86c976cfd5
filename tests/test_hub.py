"""From a recipe's name to a directory, offline; and which of its files belong into the output."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import recipe_text
from safetensors.torch import save_file

from streammerge.errors import InputError
from streammerge.io.checkpoint import open_checkpoint, resolve_model, side_files


def model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    return path


def hub(cache: Path, repo: str, commit: str, files: dict[str, Path], shared: bool = False) -> Path:
    """The layout of the Hub cache: snapshots link to blobs, with `shared` those link to the cache-wide store."""
    root = cache / ("models--" + repo.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    for part in (snapshot, root / "blobs", root / "refs", cache / "blobs" / "ab"):
        part.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for i, (name, file) in enumerate(files.items()):
        blob = root / "blobs" / f"{i:064x}"
        if shared:
            store = cache / "blobs" / "ab" / f"ab{i:062x}"
            store.write_bytes(file.read_bytes())
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            blob.write_bytes(file.read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # the variable is read at its import
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a network call"))
    return tmp_path / "cache"


@pytest.mark.parametrize("shared", [False, True])
def test_resolves_from_the_hub_cache_alone(tmp_path, cache, shared):
    local = model(tmp_path / "local")
    (local / "README.md").write_text("card")
    names = {n: local / n for n in ("config.json", "model.safetensors", "README.md")}
    commit = "c" * 40
    snapshot = hub(cache, "org/some-model", commit, names, shared)
    for name in ("org/some-model", "org/some-model@main", f"org/some-model@{commit}"):
        assert resolve_model(name, "base_model") == snapshot
    ckpt = open_checkpoint(resolve_model("org/some-model", "base_model"), "base_model")
    assert ckpt.read("a").tolist() == [1, 1]
    assert [f.name for f in side_files(snapshot)] == ["config.json"]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(local / "config.json")
    with pytest.raises(InputError, match="leaves the directory"):
        open_checkpoint(snapshot, "base_model")


def test_resolve_says_what_to_do(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "m").mkdir(parents=True)
    assert resolve_model("org/m", "base_model") == Path("org/m")  # a local directory comes first
    for name, wanted in (
        ("org/absent", "Hub cache.*hf download org/absent"),
        ("org/absent@v2", "hf download org/absent --revision v2"),
        ("./models/absent", "no such directory .*models/absent.*not a Hub id"),
        ("/absent", "no such directory"),
        ("a--b", "no such directory"),
    ):
        with pytest.raises(InputError, match=rf"(?s)^reasoning_model: '{name}': .*{wanted}"):
            resolve_model(name, "reasoning_model")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, wanted the directory"):
        resolve_model("file", "reasoning_model")


def test_resolve_in_a_process_that_is_offline(tmp_path):
    local = model(tmp_path / "local")
    snapshot = hub(tmp_path / "c", "o/m", "d" * 40, {n: local / n for n in ("config.json", "model.safetensors")})
    code = "from streammerge.io.checkpoint import resolve_model as r; print(r('o/m', 'base_model'))"
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "c"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


def test_side_files(tmp_path):
    kept = "LICENSE NOTICE.txt chat_template.jinja config.json generation_config.json merges.txt tokenizer.json"
    kept = [*kept.split(), "tokenizer.model", "tokenizer_config.json", "vocab.json"]
    dropped = "README.md .gitattributes model.safetensors model.safetensors.index.json pytorch_model.bin x.gguf"
    dropped = [*dropped.split(), "modeling_x.py", "consolidated.pth", "SHA256SUMS", "streammerge_report.json"]
    for name in kept + dropped:
        (tmp_path / name).write_text(name)
    (tmp_path / "onnx").mkdir()
    assert [f.name for f in side_files(tmp_path)] == kept
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "LICENSE").symlink_to("/etc/hostname")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").symlink_to("gone")
    with pytest.raises(InputError, match="(?s)LICENSE: is a link that leaves.*vocab.json: is missing"):
        side_files(tmp_path)


def test_a_ref_that_leads_out_of_the_cache(tmp_path, cache):
    """A ref is a file of the cache that holds a folder's name; it may hold any path."""
    local = model(tmp_path / "private")
    snapshot = hub(cache, "o/m", "e" * 40, {n: local / n for n in ("config.json", "model.safetensors")})
    (snapshot.parents[1] / "refs" / "main").write_text(os.path.relpath(local, snapshot.parent))
    with pytest.raises(InputError, match="base_model: 'o/m'.*leads out of the Hub cache|not in the Hub cache"):
        resolve_model("o/m", "base_model")


ODD = ["~nobody-of-that-name/x", "n" * 5000, "a" * 300 + "/b", "a\0b", "o/m@../../../private"]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_input_errors(name, cache):
    with pytest.raises(InputError, match="^base_model: ") as caught:
        resolve_model(name, "base_model")
    assert len(str(caught.value)) < 1500


def test_links_of_the_cache_lead_into_its_own_blobs_only(tmp_path, cache):
    """Not to another model's blobs, and not through a blob that is itself a link to a private file."""
    local = model(tmp_path / "local")
    files = {n: local / n for n in ("config.json", "model.safetensors")}
    snapshot, other = hub(cache, "o/mine", "a" * 40, files), hub(cache, "o/other", "b" * 40, files)
    weights = snapshot / "model.safetensors"
    own = weights.readlink()
    weights.unlink()
    weights.symlink_to((other / "model.safetensors").resolve())
    with pytest.raises(InputError, match="model.safetensors: is a link that leaves the directory"):
        open_checkpoint(snapshot, "base_model")
    weights.unlink()
    weights.symlink_to(own)
    blob = snapshot / own
    blob.resolve().unlink()
    (snapshot.parents[1] / "blobs" / own.name).symlink_to(local / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: is a link that leaves the directory"):
        open_checkpoint(snapshot, "base_model")


@pytest.mark.parametrize("inside", ["snapshots/" + "f" * 40 + "/out", "blobs/out", "out", "snapshots/other/out"])
def test_nothing_is_written_into_the_cache_of_a_model(trio, tmp_path, cache, inside):
    from streammerge import merge, parse_recipe
    from streammerge.planning.run import plan_merge

    snapshot = hub(cache, "o/lrm", "f" * 40, {f.name: f for f in trio["lrm"].iterdir()})
    text = recipe_text(trio | {"lrm": "o/lrm"}, None, merge_method="task_arithmetic")
    recipe, out = parse_recipe(text, "r.yml"), snapshot.parents[1] / inside
    before = sorted(cache.rglob("*"))
    for run in (merge, plan_merge):
        with pytest.raises(InputError, match="reasoning_model .*Hub cache.*nothing is written"):
            run(recipe, out)
    assert sorted(cache.rglob("*")) == before
    assert merge(recipe, cache / "out")["verified"]
