"""The command itself: what it prints where, help, Ctrl-C and kill -9."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from builders import recipe_text, save_trio, write_sets
from damage import bench, screen, snapshot  # noqa: F401

from streammerge.cli import main

COMMAND = [sys.executable, "-c", "import sys; from streammerge.cli import main; sys.exit(main())"]



def run(*args: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=180, **kwargs)


def test_as_a_subprocess(bench):
    """One bad input through a fresh interpreter: nothing but our message on stderr."""
    bench.sets["reasoning"].unlink()
    done = run("merge", bench.recipe(), bench.out)
    assert (done.returncode, done.stdout) == (3, "") and not bench.out.parent.exists()
    assert done.stderr.startswith("streammerge: error: ") and str(bench.sets["reasoning"]) in done.stderr
    screen(done.stderr)


def test_json_on_stdout_and_json_log_on_stderr(bench):
    done = run("merge", bench.recipe(), bench.out, "--json", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((bench.out / "streammerge_report.json").read_text())
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [e["layer"] for e in events if e["event"] == "layer"] == [0, 1, 2]
    assert all({"ts", "level", "event"} <= e.keys() for e in events)
    again = run("merge", bench.root / "recipe.yml", bench.out, "--json", "--log-format", "json")
    assert (again.returncode, again.stdout) == (3, "")
    told = [json.loads(line) for line in again.stderr.splitlines()][-1]
    assert told["level"] == "error" and told["exit_code"] == 3 and str(bench.out) in told["event"]


# a process around `main` that says when it ends in which way
LEAVING = """import atexit, sys
from streammerge.cli import main
atexit.register(lambda: print("an exit function ran"))
print("before")
code = main()
print("main has returned", file=sys.stderr)
sys.exit(code)"""
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # as a user's pipe is


def test_a_command_that_is_done_leaves_at_once(bench):
    """Straight out of `main`: all that was printed is there, exit functions have run, and theirs is there too."""
    recipe = bench.recipe(recipe_text(bench.models, None, merge_method="task_arithmetic"))
    command = [sys.executable, "-c", LEAVING, "plan", str(recipe), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=BUFFERED)
    first, *report, last = done.stdout.splitlines()
    assert (done.returncode, first, last) == (0, "before", "an exit function ran"), done.stderr
    assert json.loads("".join(report))["recipe"]["merge_method"] == "task_arithmetic"
    assert "main has returned" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_has_gone(bench, flags):
    """`streammerge merge … | head -0`: the merge is whole, no traceback; 120 is Python's own exit code for output that
    cannot be flushed at the end. A report that does not fit the buffer is an error before."""
    recipe = bench.recipe(recipe_text(bench.models, None, merge_method="task_arithmetic"))
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", LEAVING, "merge", str(recipe), str(bench.out), "--quiet", *flags]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, env=BUFFERED)
    os.close(write)
    assert done.returncode == 120 and "main has returned" in done.stderr and "Traceback" not in done.stderr
    assert (bench.out / "streammerge_report.json").exists() and not list(bench.out.glob("*.partial"))
    assert ("error: Broken pipe" in done.stderr) == bool(flags)


def test_quiet_is_quiet(bench):
    assert main(["merge", str(bench.recipe()), str(bench.out), "--quiet"]) == 0
    told = bench.capfd.readouterr()
    assert told.out == "" and told.err == ""


def test_flags_override_the_recipe(bench):
    recipe = bench.recipe(**{"lambda": 1.0, "budget": {"host_memory": "3GiB", "tokens_per_batch": 4096}})
    flags = ["--lambda", "0.5", "--tokens-per-batch", "512", "--host-memory", "2GiB", "--device-memory", "1GiB"]
    assert main(["merge", str(recipe), str(bench.out), "--quiet", "--json", "--device", "cpu", *flags]) == 0
    report = json.loads(bench.capfd.readouterr().out)
    assert report["recipe"]["lambda"] == 0.5 and report["plan"]["tokens_per_batch"] == 512
    wanted = {"host_memory": "2GiB", "device_memory": "1GiB", "tokens_per_batch": 512}
    assert wanted.items() <= report["recipe"]["budget"].items() and report["device"] == "cpu"
    assert main(["merge", str(recipe), str(bench.root / "second"), "--quiet", "--host-memory", "1MB"]) == 4


def test_help_tells_keys_and_exit_codes(capsys):
    for args in (["--help"], ["merge", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
    told = capsys.readouterr().out
    for word in ("merge_method", "base_model", "instruct_model", "reasoning_model", "calibration", "lambda", "130",
                 "exit codes", "streammerge_report.json", *(f"  {code}  " for code in range(8))):  # fmt: skip
        assert word in told, word
    start = told.index("  merge_method")
    example = yaml.safe_load(told[start : told.index("\n\n", start)])
    from streammerge import parse_recipe

    assert parse_recipe(yaml.safe_dump(example), "help").lam == 1.0


@pytest.fixture(scope="module")
def slow_merge(tmp_path_factory):
    """A directory with a recipe over a model that takes seconds."""
    root = tmp_path_factory.mktemp("slow")
    paths = save_trio(root, "llama", layers=12, hidden=192, shard="20MB")
    sets = write_sets(root, reasoning=60, instruction=60)
    (root / "recipe.yml").write_text(recipe_text(paths, sets, coefficients={"scope": "model"}))
    return root


def start(root: Path, out: str, event: str) -> subprocess.Popen:
    """The merge in a process of its own, up to the first line of an event in its log."""
    process = subprocess.Popen(
        [*COMMAND, "merge", str(root / "recipe.yml"), str(root / out), "--log-format", "json"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if json.loads(line)["event"] == event:
            break
    return process


def test_interrupt_leaves_nothing(slow_merge):
    """Ctrl-C in the middle of the sweep."""
    before = snapshot(slow_merge)
    process = start(slow_merge, "out", "layer")
    assert list((slow_merge / "out").glob("*.partial")), "the merge was over before it could be interrupted"
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert time.perf_counter() - began < 30
    screen(rest)
    assert "nothing was left behind" in rest
    assert snapshot(slow_merge) == before


def test_a_killed_merge_is_finished_by_the_same_command(slow_merge):
    """SIGKILL leaves no half checkpoint under a final name; the next run's bytes are those of an undisturbed one."""
    process = start(slow_merge, "killed", "layer")
    process.kill()
    process.wait()
    process.stderr.close()
    assert not list((slow_merge / "killed").glob("*.safetensors")) and list((slow_merge / "killed").glob("*.partial"))
    recipe = str(slow_merge / "recipe.yml")
    for out in ("killed", "whole"):
        assert main(["merge", recipe, str(slow_merge / out), "--quiet"]) == 0
    killed, whole = (snapshot(slow_merge / out) for out in ("killed", "whole"))
    assert {n.replace("/killed/", "/whole/") for n in killed} == set(whole)
    for name in killed:
        if name.endswith(".safetensors"):
            assert killed[name] == whole[name.replace("/killed/", "/whole/")], name
