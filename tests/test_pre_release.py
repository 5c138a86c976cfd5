"""The README's pre-release script, as it stands there, on a real merge; and what it does when a step fails."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from damage import bench  # noqa: F401

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def script(tmp_path):
    """(recipe, OUT) -> the script's end, with this interpreter's streammerge and python3 on its path."""
    text = next(t for t in re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if "pre-release" in t)
    (tmp_path / "pre-release").write_text(text)
    tools = tmp_path / "bin"
    tools.mkdir()
    start = "import sys; from streammerge.cli import main; sys.exit(main())"
    (tools / "streammerge").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{start}' \"$@\"\n")
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(recipe: Path, out: Path) -> subprocess.CompletedProcess:
        return subprocess.run(["sh", tmp_path / "pre-release", recipe, out], capture_output=True, text=True, env=env,
                              cwd=tmp_path, timeout=300)  # fmt: skip

    return run


def test_from_plan_to_card(bench, script):
    bench.out.parent.mkdir(exist_ok=True)
    done = script(bench.recipe(), bench.out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready: ")
    planned, merged, verified = (json.loads(Path(f"{bench.out}.{step}.json").read_text())
                                 for step in ("plan", "merge", "verify"))  # fmt: skip
    assert planned["tensors"] == merged["tensors"] and verified["ok"]
    assert all(json.loads(line)["level"] for line in done.stderr.splitlines())


def test_the_first_step_that_fails_ends_it(bench, script):
    bench.out.parent.mkdir(exist_ok=True)
    bench.sets["reasoning"].unlink()
    done = script(bench.recipe(), bench.out)
    assert done.returncode == 3 and not bench.out.exists() and not Path(f"{bench.out}.merge.json").exists()
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["exit_code"] == 3 and str(bench.sets["reasoning"]) in told["event"]
