"""The Python API: merge, plan and verify from a path, with budgets and a callback; what goes wrong is an exception."""

from __future__ import annotations

import json
import pkgutil
import typing

import pytest

import streammerge
from streammerge import api, load_recipe
from streammerge.errors import InputError, ResourceError
from streammerge.progress import Progress, Step


def test_from_plan_to_verify(make_recipe, tmp_path, capfd):
    recipe, out = make_recipe(), tmp_path / "out"
    planned = api.plan(recipe, out, tokens_per_batch=256)
    assert planned["plan"]["tokens_per_batch"] == 256 and planned["tensors"]["merged"] == 21 and not out.exists()
    steps: list[Step] = []
    report = api.merge(recipe, out, tokens_per_batch=256, lam=0.5, progress=steps.append)
    assert report == json.loads((out / "streammerge_report.json").read_text())
    assert report["recipe"]["lambda"] == 0.5 and report["recipe"]["budget"]["tokens_per_batch"] == 256
    assert report.keys() >= typing.get_type_hints(api.MergeReport).keys() - {"device"}
    last = steps[-1]
    assert last.done == last.total > 1 and last.tokens > 0 and last.eta_seconds == 0
    assert [s.done for s in steps if s.stage == last.stage] == sorted(s.done for s in steps if s.stage == last.stage)
    found = api.verify(out)
    assert found.error() is None and found.tensors == report["tensors"]["merged"] + report["tensors"]["copied"]
    assert capfd.readouterr() == ("", "")


def test_a_public_name_is_no_module():
    """Importing a submodule puts it in the place of the name in the package."""
    modules = {info.name for info in pkgutil.iter_modules(streammerge.__path__)}
    assert not modules & set(streammerge.__all__)
    assert streammerge.plan is api.plan and streammerge.verify is api.verify and streammerge.merge is api.merge


def test_a_path_is_a_recipe(make_recipe, tmp_path):
    path = tmp_path / "recipe.yml"
    made = make_recipe()
    from streammerge.recipe import to_yaml

    path.write_text(to_yaml(made))
    assert api.with_budget(path).calibration == load_recipe(path).calibration
    assert api.with_budget(str(path), host_memory="3GiB").budget.host_memory == "3GiB"


def test_errors_are_exceptions_with_the_exit_code(make_recipe, tmp_path):
    with pytest.raises(ResourceError) as small:
        api.merge(make_recipe(), tmp_path / "out", host_memory="1MB")
    assert small.value.exit_code == 4 and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="manifest"):
        api.verify(tmp_path)


def test_a_listener_that_raises_ends_the_merge_and_it_goes_on(make_recipe, tmp_path):
    class Enough(Exception):
        pass

    def stop(step: Step) -> None:
        if step.stage == "merge: layer 2/3":
            raise Enough

    recipe, out = make_recipe(), tmp_path / "out"
    whole = api.merge(recipe, tmp_path / "whole")
    with pytest.raises(Enough):
        api.merge(recipe, out, progress=stop, save_every=0)
    report = api.merge(recipe, out, progress=Progress("quiet"))
    assert report["resumed_at"] and not whole["resumed_at"]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
