"""What the benchmarks promise without running for minutes: they start, and what they wrote is what is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    for name in ("README.md", "benchmarks/render.py", *results):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    assert run(str(tmp_path / "benchmarks/render.py")).returncode == 0
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
