"""Every operand is on the device: a whole merge on a device that refuses to mix with the CPU."""

from __future__ import annotations

import pytest
import torch
from builders import recipe_text
from far_device import FAR, Far, far_device

from streammerge import merge, parse_recipe, pipeline


def test_the_far_device_finds_operands_that_were_left_behind(monkeypatch):
    near = torch.ones(3, 3)
    with far_device(monkeypatch):
        far = near.to(FAR)
        assert type(far) is Far and type(far @ far) is Far and type(far.cpu()) is torch.Tensor
        assert torch.equal((far[[0, 2]] * 2).cpu(), near[:2] * 2) and float(far.sum()) == 9
        for mistake in (lambda: far + near, lambda: near @ far, lambda: near[torch.tensor([0], device=FAR)],
                        lambda: torch.cat([far, near])):  # fmt: skip
            with pytest.raises((RuntimeError, IndexError)):
                mistake()


@pytest.mark.parametrize("options", [
    {},
    {"coefficients": {"scope": "layer"}, "basis": {"method": "covariance"}},
    {"basis": {"method": "randomized", "rank": "fixed", "size": 5}, "compute_dtype": "bfloat16", "dtype": "bfloat16"},
    {"basis": {"rank": "none"}, "coefficients": {"rule": "uniform"}},
])  # fmt: skip
def test_a_merge_on_a_far_device(any_trio, sets, tmp_path, monkeypatch, options):
    family, paths = any_trio
    recipe = parse_recipe(recipe_text(paths, sets, budget={"device_memory": "8GiB"}, **options), "test.yml")
    wanted = merge(recipe, tmp_path / "near", device="cpu")
    monkeypatch.setattr(pipeline, "pick_device", lambda name: FAR)
    monkeypatch.setattr(pipeline, "compute_dtype", lambda plan, _, plain=pipeline.compute_dtype: plain(
        plan, torch.device("cpu")))  # fmt: skip
    with far_device(monkeypatch):
        found = merge(recipe, tmp_path / "far")
    assert found["totals"]["applied_norm"] == pytest.approx(wanted["totals"]["applied_norm"], rel=0.02), family
    assert found["l_think"]["mean"] == pytest.approx(wanted["l_think"]["mean"], rel=0.2)
