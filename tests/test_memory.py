"""Peak host memory of a real merge, measured in its own process: independent of depth, and inside the plan.

The meter is the kernel's high-water mark from the moment the merge begins; what torch and transformers take to import
is not counted, what loads later (tokenizer, the family's modules) is: the plan has a term for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import recipe_text, save_trio, write_sets

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the meter reads Linux's /proc")

# a layer of (512, 2048) is 16 MiB in fp32, so that layers and not the interpreter make the peak
SHAPES = {
    "narrow, bf16": {"hidden": 512, "intermediate_size": 2048, "layers": 4, "dtype": "bfloat16"},
    "narrow, fp32": {"hidden": 512, "intermediate_size": 2048, "layers": 4, "dtype": "float32"},
    "wide, bf16": {"hidden": 1024, "intermediate_size": 4096, "layers": 2, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """A function of a shape that merges a trio of it in a subprocess (once) and gives the report."""
    roots, reports = {}, {}

    def run(*, scope: str = "layer", dtype: str, **shape) -> dict:
        key = json.dumps([dtype, shape], sort_keys=True)
        if key not in roots:
            roots[key] = tmp_path_factory.mktemp("memory")
            save_trio(roots[key], "llama", dtype=getattr(torch, dtype), shard="1GB", **shape)
        root, name = roots[key], f"{key} {scope}"
        if name not in reports:
            paths = {role: root / role for role in ("base", "itm", "lrm")}
            recipe = root / f"{scope}.yml"
            recipe.write_text(recipe_text(paths, write_sets(root), coefficients={"scope": scope}))
            reports[name] = merged_by_command(recipe, root / f"out-{scope}")
        return reports[name]

    return run


def merged_by_command(recipe: Path, out: Path) -> dict:
    """`streammerge merge` in its own process, on one thread; its report."""
    command = [str(Path(sys.executable).with_name("streammerge")), "merge", str(recipe), str(out), "--quiet", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def beyond_imports(report: dict) -> int:
    assert report["memory"]["peak_since"] == "merge began"
    return report["memory"]["host_beyond_imports"]


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_peak_does_not_know_the_number_of_layers(measure, scope):
    narrow = SHAPES["narrow, bf16"]
    few, many = (beyond_imports(measure(**narrow | {"layers": n}, scope=scope)) for n in (4, 16))
    layer = 2 * (4 * 512 * 512 * 3 // 4 + 3 * 512 * 2048)
    print(f"scope {scope}: 4 layers {few / 1e6:.1f} MB, 16 layers {many / 1e6:.1f} MB; a layer is {layer / 1e6:.1f} MB")
    assert abs(many - few) <= 0.15 * few
    assert 0.15 * few < 12 * layer, "a merge that held the LRM's other 12 layers would not be noticed"


@pytest.mark.parametrize("shape", SHAPES)
def test_peak_stays_inside_the_plan(measure, shape):
    report = measure(**SHAPES[shape])
    planned, found = report["plan"]["host_total"], beyond_imports(report)
    terms = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in report["plan"]["host"].items())
    print(f"{shape}: planned {planned / 1e6:.1f} MB ({terms}), measured {found / 1e6:.1f} MB")
    assert found <= 1.1 * planned
    assert found >= 0.85 * planned, "a plan far above what is used turns merges away that would fit"


def test_whole_embedding_is_never_read(make_recipe, tmp_path, monkeypatch):
    """The largest tensor of a small model: its rows and chunks are read, never the table."""
    from streammerge import merge
    from streammerge.io.checkpoint import Checkpoint

    whole, read = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: whole.append(name) or read(self, name))
    merge(make_recipe(), tmp_path / "out")
    assert "model.norm.weight" in whole and "model.embed_tokens.weight" not in whole
