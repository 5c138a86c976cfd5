"""`streammerge demo` end to end, as a newcomer runs it, and what it must show on the bundled trio."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge import merge
from streammerge.demo.run import TASK_ARITHMETIC_BEST, VARIANTS, Variant, demo_recipe

KEYS = {"method", "lambda", "reasoning_accuracy", "instruction_accuracy", "both_accuracy", "missing_think", "l_think"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the demo keeps its merged models."""
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def table(kept):
    """The rows of `streammerge demo --json`, by (method, λ)."""
    script = Path(sys.executable).with_name("streammerge")
    done = subprocess.run([script, "demo", "--json", "--out", kept], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return {(row["method"], row["lambda"]): row for row in json.loads(done.stdout)}


def test_rows_are_complete(table):
    assert all(set(row) == KEYS for row in table.values())
    wanted = {("LRM", None), ("ITM", None), ("uniform α, equal norm", 1.0)} | {(v.method, v.lam) for v in VARIANTS}
    assert wanted == set(table)
    assert ("task arithmetic", TASK_ARITHMETIC_BEST) in table
    assert table["LRM", None]["l_think"] == pytest.approx(0, abs=1e-9)


def test_merged_models_are_kept_where_asked(table, kept):
    found = {path.name for path in kept.iterdir()}
    assert {v.slug for v in VARIANTS} < found and len(found) == len(table) - 2
    for name in found:
        lam = json.loads((kept / name / "streammerge_report.json").read_text())["recipe"]["lambda"]
        assert (kept / name / "model.safetensors").exists() and name.endswith(f"-{lam:g}")


def test_the_merge_does_what_it_is_for(table):
    """Keeps the thinking format, and follows instructions better than the LRM."""
    lrm, rain = table["LRM", None], table["RAIN", 1.0]
    assert rain["instruction_accuracy"] > lrm["instruction_accuracy"] + 0.3
    assert rain["both_accuracy"] > lrm["both_accuracy"] + 0.3
    best, uniform = table["task arithmetic", TASK_ARITHMETIC_BEST], table["uniform α, equal norm", 1.0]
    for accuracy in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy"):
        assert rain[accuracy] >= best[accuracy], accuracy
    assert rain["l_think"] <= best["l_think"] / 2
    assert rain["instruction_accuracy"] > uniform["instruction_accuracy"]
    for (method, lam), row in table.items():
        if method == "RAIN":
            assert row["missing_think"] == 0, lam


def test_l_think_is_a_tenth_of_task_arithmetics(table):
    assert table["RAIN", 1.0]["l_think"] <= table["task arithmetic", 1.0]["l_think"] / 10


def test_null_space_holds_in_the_demo_merge(tmp_path):
    report = merge(demo_recipe(Variant("RAIN", 1.0)), tmp_path / "out")
    assert len(report["per_tensor"]) == 7 * 4
    for name, told in report["per_tensor"].items():
        assert told["inside"] > 0 and told["leak"] <= 1e-5, name
    assert report["l_think"]["mean"] > 0
