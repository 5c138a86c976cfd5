"""A second merge reuses what the first found out about the LRM, and nothing that was made of something else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from builders import recipe_text, write_sets
from safetensors import SafetensorError

from streammerge import artifacts, merge, parse_recipe
from streammerge.errors import ResourceError


def weights(out) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(out.glob("*.safetensors"))}


@pytest.fixture()
def first(make_recipe, tmp_path):
    """A merge that kept its artifacts: their folder."""
    report = merge(make_recipe(), tmp_path / "first", artifacts=tmp_path / "kept")
    assert report["artifacts"] == {"reused": [], "wanted": ["bases", "masses"]}
    return tmp_path / "kept"


@pytest.mark.parametrize("change, reused", [
    ({}, ["bases", "masses"]),
    ({"lambda": 0.4}, ["bases", "masses"]),
    ({"coefficients": {"kappa": 0.1, "rho": 0.3}}, ["bases", "masses"]),
    ({"coefficients": {"rule": "uniform", "value": 0.5}}, ["bases"]),
    ({"coefficients": {"scope": "layer"}}, ["bases"]),
    ({"coefficients": {"rows": "token"}}, ["bases"]),
    ({"basis": {"energy": 0.9}}, ["masses"]),
    ({"thinking": {"random": 1}}, ["masses"]),
    ({"seed": 3}, ["masses"]),
    ({"compute_dtype": "bfloat16"}, []),
    ({"basis": {"rank": "none"}}, ["masses"]),
])  # fmt: skip
def test_what_serves_is_reused_and_the_bytes_are_the_same(make_recipe, tmp_path, first, change, reused):
    recipe = make_recipe(**change)
    report = merge(recipe, tmp_path / "second", artifacts=first)
    assert report["artifacts"]["reused"] == reused
    wanted = merge(recipe, tmp_path / "alone")
    assert weights(tmp_path / "second") == weights(tmp_path / "alone")
    assert report["alpha"] == wanted["alpha"] and report["l_think"] == wanted["l_think"]


def test_what_is_reused_is_not_done_again(make_recipe, tmp_path, first):
    whole = merge(make_recipe(), tmp_path / "alone")["throughput"]["calibration_tokens"]
    again = merge(make_recipe(**{"lambda": 0.4}), tmp_path / "second", artifacts=first)["throughput"]
    assert 0 < again["calibration_tokens"] < whole / 3  # the held-out samples, twice


def test_another_calibration_set_finds_nothing(trio, tmp_path, first):
    (tmp_path / "other").mkdir()
    sets = write_sets(tmp_path / "other")
    sets["reasoning"].write_text(sets["reasoning"].read_text() + "\n")
    recipe = parse_recipe(recipe_text(trio, sets), "test.yml")
    assert merge(recipe, tmp_path / "second", artifacts=first)["artifacts"]["reused"] == []


def test_an_interrupted_merge_leaves_nothing_that_looks_complete(make_recipe, tmp_path, monkeypatch):
    from streammerge import sweep

    plain = sweep.merge_layer

    def dying(run, feed, drain, layer, known):
        if layer == 2:
            raise KeyboardInterrupt
        plain(run, feed, drain, layer, known)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "merge_layer", dying)
        merge(make_recipe(), tmp_path / "out", artifacts=tmp_path / "kept")
    report = merge(make_recipe(), tmp_path / "out", artifacts=tmp_path / "kept")
    assert report["artifacts"]["reused"] == []
    merge(make_recipe(), tmp_path / "alone")
    assert weights(tmp_path / "out") == weights(tmp_path / "alone")
    assert merge(make_recipe(), tmp_path / "third", artifacts=tmp_path / "kept")["artifacts"]["reused"]


@pytest.mark.parametrize("kind", ["bases", "masses"])
def test_a_disk_that_refuses_them_ends_no_merge(make_recipe, tmp_path, monkeypatch, kind):
    """Told once, nothing of that kind is left, and the next merge makes it again (faults/matrix.py has a full disk)."""
    seen, plain, dumps = [], artifacts.save_file, json.dumps

    def full(tensors, path):
        seen.append(path)
        if len(seen) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        plain(tensors, path)

    def no_room(found, **settings):
        if "sort_keys" in settings:  # the folder's name
            return dumps(found, **settings)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if kind == "bases":
            patch.setattr(artifacts, "save_file", full)
        else:
            patch.setattr(artifacts, "json", SimpleNamespace(loads=json.loads, dumps=no_room))
        report = merge(make_recipe(), tmp_path / "out", artifacts=tmp_path / "kept")
    told = [w for w in report["warnings"] if w.startswith("--artifacts: ")]
    assert len(told) == 1 and f"its {kind} are not kept" in told[0] and "No space left" in told[0]
    assert not list((tmp_path / "kept").glob(f"{kind}-*"))
    merge(make_recipe(), tmp_path / "alone")
    assert weights(tmp_path / "out") == weights(tmp_path / "alone")
    again = merge(make_recipe(), tmp_path / "again", artifacts=tmp_path / "kept")["artifacts"]
    assert again["reused"] == ["masses" if kind == "bases" else "bases"]
    assert merge(make_recipe(), tmp_path / "third", artifacts=tmp_path / "kept")["artifacts"]["reused"] == [
        "bases", "masses"]  # fmt: skip


def test_artifacts_want_a_directory(make_recipe, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ResourceError, match="--artifacts .*kept: is no directory"):
        merge(make_recipe(), tmp_path / "out", artifacts=tmp_path / "kept")
    assert not (tmp_path / "out").exists() and (tmp_path / "kept").read_text() == "mine"


def test_a_damaged_artifact_is_told(make_recipe, tmp_path, first):
    file = next(first.glob("bases-*/bases-00001.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ResourceError, match=rf"{file.name}: cannot be read.*remove {file.parent}"):
        merge(make_recipe(), tmp_path / "second", artifacts=first)
    assert not (tmp_path / "second").exists()
