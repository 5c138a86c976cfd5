"""The kernels' benchmark runs end to end on a CPU, refuses to measure without a GPU, and the README shows its rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LIBRARY = {"span_mass": {"SDPA"}, "row_gram": {"torch.mm"}, "gram_update": {"torch.mm, add", "torch.addmm"},
           "project": {"torch.addmm", "torch.addmm, TF32"}}  # fmt: skip
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The benchmarks' folder as their own scripts see it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=clean | env
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kernel_runs_and_what_cannot_says_why(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = run("benchmarks/bench_kernels.py", "--quick", "--runs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    for kernel, calls in LIBRARY.items():
        mine = [r for r in rows if r["facts"]["kernel"] == kernel]
        assert {r["facts"]["variant"] for r in mine} == {"Triton", "twin"} | calls
        for r in mine:
            facts = r["facts"]
            assert facts["auto"].startswith("torch (no GPU") and facts["quick"] and "gpu" not in r["machine"]
            if facts["variant"] == "Triton":
                assert r["median"] is None and r["runs"] == [] and "no GPU" in r["note"]
                continue
            assert facts["status"] == "ok" and facts["error"] <= facts["limit"], r["what"]
            assert len(r["runs"]) == 2 and facts["share"] == pytest.approx(facts["floor_us"] / r["median"], rel=1e-3)
            rate = facts["ceilings"]
            work = facts["flops"] / (rate[facts["unit"]] * 1e6)
            assert facts["floor_us"] == pytest.approx(max(work, facts["bytes"] / (rate["copy"] * 1e3)))


def test_triton_runs_in_it_under_the_interpreter(tmp_path):
    out = tmp_path / "rows.jsonl"
    script = ["benchmarks/bench_kernels.py", "--quick", "--runs", "1", "--kernels", "span_mass", "row_gram"]
    done = run(*script, "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for r in rows_of(out):
        assert r["facts"]["status"] == "ok" and r["facts"]["auto"] == "triton" and r["median"] > 0
        assert "TRITON_INTERPRET=1" in r["command"] and "triton" in r["versions"]


@no_gpu
@pytest.mark.parametrize("script", ["bench_kernels.py", "bench_gpu.py"])
def test_without_a_gpu_one_line_and_exit_2(script):
    done = run(f"benchmarks/{script}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


def test_a_checkout_is_importable_where_the_package_is_not_installed():
    code = "import checkout, streammerge.kernels.gram as g, streammerge.recipe; print(g.__file__)"
    packages = [p for p in sys.path if p.endswith("-packages")]
    done = run("-S", "-c", code, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), *packages]))
    assert done.stdout.strip() == str(ROOT / "kernels/gram.py"), done.stderr  # -S: no .pth file, so no editable install


def test_a_wrong_variant_is_found():
    """Wrong rows, rows nobody writes, a projection on one TF32 product: each is beyond its limit."""
    from kernel_cases import TINY, cases

    def changed(call, where, only=None):
        calls = []

        def wrong(*inputs):
            out = call(*inputs)
            calls.append(1)
            if only in (None, len(calls)):
                where(out)
            return out

        return wrong

    seen = set()
    for case in cases({"tiny": TINY}, CPU):
        given = case.make(3)
        assert case.error(case.run["twin"], given) <= case.limit
        for where in (lambda out: out[-1].mul_(1.1), lambda out: out[0].fill_(float("nan"))):
            assert not case.error(changed(case.run["twin"], where), given) <= case.limit, case
        if case.about.get("r"):
            rough = tuple(x + 0 for x in given[:3]), [u * (1 + 5e-4) for u in given[3]]
            assert case.error(lambda *i, u=rough[1], c=case: c.run["twin"](*i[:3], u, *i[4:]), given) > case.limit
        if case.kernel == "project":  # the third call is the one in fp32, whatever the inputs are
            for third in (lambda out: out[-1].mul_(1.1), lambda out: out[0].fill_(float("nan"))):
                assert not case.error(changed(case.run["twin"], third, only=3), given) <= case.limit, case
        seen.add(case.kernel)
    assert seen == set(LIBRARY)


def test_shapes_are_those_of_the_models():
    from kernel_cases import MODELS, cases

    from streammerge.bench.shapes import SHAPES, tensors

    assert set(MODELS) == {"1.5b", "7b", "32b", "70b"}
    found = list(cases(MODELS, CPU))
    for model in MODELS:
        about = SHAPES[model].config(1)
        real = {t.shape for t in tensors(about) if "proj.weight" in t.name}
        mine = [c.about for c in found if c.model == model and c.kernel == "project"]
        assert {(a["out"], a["in"]) for a in mine} == real
        for width in {a["in"] for a in mine}:
            ranks = {a["r"] for a in mine if a["in"] == width}
            assert ranks == {0, round(0.05 * width), round(0.2 * width)}
        widths = {c.about["d"] for c in found if c.model == model and c.kernel == "gram_update"}
        assert widths == {size[1] for size in real}


def test_no_symmetric_product_has_come_to_torch():
    """kernel_library.py says so; a torch that has one should be measured against it."""
    assert not [name for name in torch._C._dispatch_get_all_op_names() if "syrk" in name.lower()]


def test_the_readme_shows_the_committed_rows():
    import render

    shown = re.search(r"<!-- kernels -->\n(.*)\n<!-- /kernels -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown[1] == render.kernels()


def gpu_row(variant: str, median: float | None, status: str = "ok", **more) -> dict:
    import rows

    facts = {"device": "Some GPU", "quick": False, "dtype": "bfloat16", "kernel": "project", "model": "7b",
             "shape": "q: 8 x 8, r 2", "variant": variant, "status": status, "share": 0.625, "auto": "triton",
             "ceilings": {"matmul": 700.0, "tf32": 300.0, "copy": 2900.0}} | more  # fmt: skip
    one = asdict(rows.row(f"project: {variant}", "us", [] if median is None else [median], status, facts))
    return one | {"machine": one["machine"] | {"gpu": "Some GPU"}}


def test_the_table_has_the_last_rows_of_a_gpu(tmp_path, monkeypatch):
    import render

    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert render.kernels().startswith("*Empty*") and "make bench-gpu" in render.kernels()
    cpu = gpu_row("Triton", 1.0)
    del cpu["machine"]["gpu"]
    file = tmp_path / "some-gpu-kernels.jsonl"
    for ignored in (cpu, gpu_row("Triton", 1.0, quick=True)):
        file.write_text(json.dumps(ignored) + "\n")
        assert render.kernels().startswith("*Empty*")
    told = [gpu_row("Triton", 99.0), gpu_row("Triton", 40.0), gpu_row("twin", 80.0), gpu_row("torch.addmm", 70.0),
            gpu_row("torch.addmm, TF32", 20.0, "error 5e-04 > 1e-04")]  # fmt: skip
    file.write_text("".join(json.dumps(r) + "\n" for r in told))
    table = render.kernels()
    assert "| project | 7b | q: 8 x 8, r 2 | 40 | 80 | 70 (torch.addmm) | 62 % | triton |" in table
    assert "Some GPU, bfloat16: 700 TFLOP/s, 300 in TF32, 2900 GB/s" in table
    told[1:2], told[3] = [gpu_row("Triton", None, "failed: no")], gpu_row("torch.addmm", None, "failed: no")
    file.write_text("".join(json.dumps(r) + "\n" for r in told))
    assert "| – | 80 | 20 † (torch.addmm, TF32) | – | triton |" in render.kernels()
