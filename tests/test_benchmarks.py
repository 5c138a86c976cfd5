"""What the benchmarks promise without running for minutes: they start, and what they wrote is what is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.name for p in (ROOT / "benchmarks").glob("*.py") if "argparse" in p.read_text())


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script):
    done = run(f"benchmarks/{script}", "--help")
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr


def test_predictions_in_the_readme_are_the_scripts():
    told = run("benchmarks/predict.py").stdout
    assert told.count("\n") == 5 and told in (ROOT / "README.md").read_text(), told


def test_every_row_says_where_it_comes_from():
    for file in (ROOT / "benchmarks/results").glob("*.jsonl"):
        lines = file.read_text().splitlines()
        assert lines
        for line in lines:
            row = json.loads(line)
            assert {"command", "machine", "versions", "commit"} <= row.keys(), file
            assert row["machine"]["cores"] >= 1 and "torch" in row["versions"]


def test_rendering_changes_nothing(tmp_path):
    """The README's table is the committed result: rendering a copy gives the same text."""
    results = [f.relative_to(ROOT).as_posix() for f in (ROOT / "benchmarks/results").iterdir()]
    for name in ("README.md", "benchmarks/render.py", "benchmarks/scaling.py", "benchmarks/parity_table.py", *results):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    assert run(str(tmp_path / "benchmarks/render.py")).returncode == 0
    for name in ("README.md", *(n for n in results if n.endswith(".svg"))):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_sweep_rows_become_a_table_and_a_plot(tmp_path, monkeypatch):
    """From real reports of the two smallest shapes on two devices; the last row of each counts."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    metrics = {
        "measured s a layer": 2.0, "extrapolated total min": 3.5, "measured peak host GB beyond imports": 0.4,
        "predicted peak host GB, whole merge": 1.25, "measured token-layers/s": 4096.0,
    }  # fmt: skip

    def rows(shape: str, device: str, times: float) -> str:
        note = f"{device}, 2 CPU threads, float32, scope model; 2 of 24 layers and 4096 of 429000 tokens measured; …"
        what = f"RAIN sweep, {shape}, 2 layers"
        return "".join(json.dumps({"what": what, "metric": m, "median": v * times, "note": note}) + "\n"
                       for m, v in metrics.items())

    assert scaling.table(tmp_path).startswith("*Empty*")
    flat = {"what": "RAIN sweep, 0.5b, 16 layers beside 4", "metric": "peak host memory, ratio", "median": 1.02}
    (tmp_path / "cpu-sweep.jsonl").write_text(
        rows("1.5b", "cpu", 9) + rows("0.5b", "cpu", 5) + rows("0.5b", "cpu", 1) + json.dumps(flat) + "\n")
    (tmp_path / "gpu-sweep.jsonl").write_text(rows("70b", "cuda", 1))
    lines = scaling.table(tmp_path).splitlines()
    assert lines[2] == "| cpu | 0.5b | 2 of 24, 4,096 of 429,000 | 2.00 s | 3.5 min | 0.40 GB | 1.2 GB | 4,096 |"
    assert [line.split(" | ")[:2] for line in lines[3:5]] == [["| cpu", "1.5b"], ["| cuda", "70b"]]
    assert lines[-1] == "0.5b, 16 layers beside 4: peak host memory x 1.02"
    drawn = ElementTree.fromstring(scaling.plot(tmp_path))
    names = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"● cpu", "● cuda", "● the trio in bf16", "● cpu: measured layers"} <= set(names)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 3 + 3 * 2 + 3
