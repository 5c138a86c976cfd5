"""Recipes drawn at random over all families and dtypes: each ends in a sound merge or in an error that a user can act
on, never in a crash, and what is refused leaves nothing behind."""

from __future__ import annotations

import json
import random

import pytest
import torch
from builders import FAMILIES, recipe_text, save_trio

from streammerge import merge, parse_recipe
from streammerge.errors import StreamMergeError
from streammerge.recipe import MODULES


@pytest.fixture(scope="module")
def trios(tmp_path_factory):
    """A trio of each family; of other dtypes; one whose three models differ in dtype."""
    root = tmp_path_factory.mktemp("trios")
    made = {family: save_trio(root / family, family) for family in FAMILIES}
    made |= {str(d): save_trio(root / str(d), "llama", dtype=d) for d in (torch.bfloat16, torch.float16)}
    made["mixed"] = {
        "lrm": made["torch.bfloat16"]["lrm"], "itm": made["torch.float16"]["itm"], "base": made["llama"]["base"]
    }  # fmt: skip
    return made


def draw(dice: random.Random) -> dict:
    """Any combination of settings, extreme ones included."""
    one = dice.choice
    basis = {"rank": one(["energy", "exact", "fixed", "none"]), "oversample": one([1, 16])}
    basis |= {"method": one(["auto", "qr", "randomized", "covariance"]), "power_iterations": one([0, 2])}
    basis |= {"size": one([1, 5, 500])} if basis["rank"] == "fixed" else {"energy": one([0.01, 0.5, 0.99, 1.0])}
    keys = {
        "basis": basis,
        "thinking": {"before": one([0, 1, 50]), "inside": one([0, 3, 500]), "after": one([0, 2, 500]),
                     "random": one([0, 4, 1000]), "attended_values": one([True, False])},
        "coefficients": {"rule": one(["standardized", "literal", "prior", "uniform"]), "scope": one(["layer", "model"]),
                         "rows": one(["token", "predicting"]), "rho": one([0, 1, 3]), "kappa": one([0, 0.5, 5]),
                         "bounds": one([[0, 2], [0.5, 0.5], [0, 0]])},
        "calibration": {"holdout": one([0, 0.1, 0.9]), "limit_reasoning": one([None, 1, 5]), "on_long": "drop",
                        "limit_instruction": one([None, 1, 3]), "max_tokens": one([None, None, None, 70, 30])},
        "dtype": one(["auto", "float32", "bfloat16", "float16"]), "compute_dtype": one(["auto", "bfloat16"]),
        "lambda": one([1, 0.3, -0.5, 0]), "shard_size": one(["5GB", "50KB", "1"]), "layers": one([None, "0,2", "1-2"]),
        "budget": {"tokens_per_batch": one([None, 64, 200])}, "allow_unchanged": one([True, True, False]),
    }  # fmt: skip
    if dice.random() < 0.5:
        keys["modules"] = dice.sample(MODULES, dice.randint(1, 7))
    return keys


@pytest.mark.parametrize("seed", range(40))
def test_a_random_recipe(seed, trios, sets, tmp_path):
    dice = random.Random(seed)
    trio = trios[dice.choice(list(trios))]
    keys = draw(dice)
    text = recipe_text(trio, sets, **keys)
    try:
        report = merge(parse_recipe(text, "random.yml"), tmp_path / "out")
    except StreamMergeError as error:
        assert error.exit_code in (2, 3, 6) and len(str(error).splitlines()) < 40
        assert not (tmp_path / "out").exists()
        return
    told = json.dumps(report)
    assert "NaN" not in told and "Infinity" not in told
    for name, tensor in report["per_tensor"].items():
        assert tensor["leak"] <= 1e-5 or tensor["inside"] < 1e-6, name
        assert tensor["finite"] and tensor["rank"] <= tensor["width"]
    assert (tmp_path / "out" / "streammerge_report.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial")) and not (tmp_path / "out" / ".streammerge").exists()


def test_the_draw_reaches_both_ends(trios, sets, tmp_path):
    """Among the seeds above some merge and some are refused: neither branch of the test is idle."""
    ends = set()
    for seed in range(40):
        if len(ends) == 2:
            break
        dice = random.Random(seed)
        trio = trios[dice.choice(list(trios))]
        try:
            merge(parse_recipe(recipe_text(trio, sets, **draw(dice)), "random.yml"), tmp_path / str(seed))
            ends.add("merged")
        except StreamMergeError:
            ends.add("refused")
    assert ends == {"merged", "refused"}
