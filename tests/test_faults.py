"""Faults while a merge runs: one message, the right exit code, resumable or no trace, inputs untouched (faults/)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import save_trio, write_sets
from faults.matrix import FAULTS, SLOW, Bench, meet, recipes, state
from faults.workshop import Unavailable, Workshop, content, stamps

PROGRAM = Path(sys.executable).with_name("streammerge")
PAIRS = [(fault, kind) for fault in FAULTS for kind in fault.kinds]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    trio = save_trio(root / "trio", "llama")
    (root / "sets").mkdir()
    try:
        with Workshop(root) as shop:
            yield Bench(shop, root, trio, recipes(trio, write_sets(root / "sets")))
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(("fault", "kind"), PAIRS, ids=[f"{fault.name}, {kind}" for fault, kind in PAIRS])
def test_fault(bench, fault, kind):
    try:
        met = meet(bench, fault, kind)
    except Unavailable as why:
        pytest.skip(str(why))
    assert not met.problems, "\n".join([*met.problems, met.ended.told])
    assert all(met.ended.counts[: len(fault.rules)]), f"a rule met nothing: {met.ended.counts}"


def until(there: Path, pid: int) -> None:
    """Wait for a file of a living process."""
    end = time.monotonic() + 30
    while not there.exists():
        assert time.monotonic() < end, f"{pid} made no {there}"
        time.sleep(0.002)


@pytest.mark.parametrize("kind", ["rain", "plain"])
def test_stopped_and_continued(bench, tmp_path, kind):
    """SIGSTOP in the middle of a shard, SIGCONT later. A second merge meanwhile is refused; the first does not care."""
    out = tmp_path / "out"
    argv = bench.argv(kind, out, "--quiet")
    pid = bench.shop.start(*argv, rules=("write *.safetensors.partial 9 S", *((SLOW,) if kind == "plain" else ())))
    assert bench.shop.wait(pid) is None, "it stopped"
    before = sorted(out.rglob("*"))
    second = bench.shop.do(*argv)
    assert second.code == 3 and f"another merge (pid {pid}) is writing to {out}" in second.told, second
    assert sorted(out.rglob("*")) == before
    restart = bench.shop.do(*argv, "--restart")
    assert restart.code == 3 and sorted(out.rglob("*")) == before, restart
    os.kill(pid, signal.SIGCONT)
    assert bench.shop.wait(pid).code == 0
    assert content(out) == bench.whole(kind) and not (out / ".streammerge").exists()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["rain", "plain"])
def test_interrupted(bench, tmp_path, kind, how, code):
    out = tmp_path / "out"
    pid = bench.shop.start(*bench.argv(kind, out, "--quiet"), rules=("write *.safetensors.partial 1+ Z30",))
    until(out / ".streammerge" / "journal.json", pid)
    os.kill(pid, how)
    ended = bench.shop.wait(pid)
    assert ended.code == code and "the same command" in ended.told and "Traceback" not in ended.told, ended
    assert bench.shop.do(*bench.argv(kind, out, "--quiet")).code == 0
    assert content(out) == bench.whole(kind) and state(out) == "done"


@pytest.mark.parametrize("what", ["*/.streammerge/[.a]*", "*/journal.json.partial", "*.safetensors.partial",
                                  "*/tokenizer.json.partial", "*/streammerge_manifest.json.partial"])  # fmt: skip
def test_killed_in_a_write(bench, tmp_path, what):
    """kill -9 with half of a write done: the next run clears what it left, down to the library's temporary files."""
    out, nth = tmp_path / "out", 1 if ".json.partial" in what and "journal" not in what else 2
    assert bench.shop.do(*bench.argv("rain", out, "--quiet"), rules=(f"write {what} {nth} K",)).code == -9
    assert bench.shop.do(*bench.argv("rain", out, "--quiet")).code == 0
    assert content(out) == bench.whole("rain") and state(out) == "done"


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_killed_while_it_takes_over(bench, tmp_path, nth):
    """A resume that dies while it writes the lock's record still knows its files: the next one goes on with them."""
    out, late = tmp_path / "out", ("write */streammerge_manifest.json.partial 1 K",)
    assert bench.shop.do(*bench.argv("rain", out, "--quiet"), rules=late).code == -9
    assert bench.shop.do(*bench.argv("rain", out, "--quiet"), rules=(f"write */lock {nth} K",)).code == -9
    again = bench.shop.do(*bench.argv("rain", out, "--quiet"))
    assert again.code == 0, again
    assert content(out) == bench.whole("rain") and state(out) == "done"


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_snapshot_is_told(bench, tmp_path, how):
    out = tmp_path / "out"
    assert bench.shop.do(*bench.argv("rain", out, "--quiet"), rules=("write *.safetensors.partial 20 K",)).code == -9
    file = next((out / ".streammerge").glob("activations-*"))
    file.unlink() if how == "missing" else os.truncate(file, file.stat().st_size // 2)
    again = bench.shop.do(*bench.argv("rain", out, "--quiet"))
    assert again.code == 3 and file.name in again.told and "--restart" in again.told, again
    assert "Traceback" not in again.told
    assert bench.shop.do(*bench.argv("rain", out, "--quiet", "--restart")).code == 0
    assert content(out) == bench.whole("rain") and state(out) == "done"


@pytest.mark.parametrize("where", ["in an input", "around an input", "an input"])
@pytest.mark.parametrize("kind", ["rain", "plain"])
def test_out_and_an_input_in_each_other(bench, where, kind):
    lrm = bench.trio["lrm"]
    out = {"in an input": lrm / "out", "around an input": lrm.parent, "an input": lrm}[where]
    before = stamps(lrm.parent), sorted(lrm.rglob("*"))
    ended = bench.shop.do(*bench.argv(kind, out, "--quiet"))
    assert ended.code == 3 and "Traceback" not in ended.told and str(out) in ended.told, ended
    assert (stamps(lrm.parent), sorted(lrm.rglob("*"))) == before


def test_nowhere_to_print(bench, tmp_path):
    """`--json > /dev/full`: the merge is done, and the refusal is told."""
    argv = [str(a) for a in bench.argv("plain", tmp_path / "out", "--quiet", "--json")]
    with open("/dev/full", "w") as full:
        done = subprocess.run([PROGRAM, *argv], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4 and "No space left" in done.stderr and "Traceback" not in done.stderr, done
    assert content(tmp_path / "out") == bench.whole("plain")


def test_the_readme_has_the_measured_tables():
    import importlib.util

    root = Path(__file__).parents[1]
    sys.path.append(str(root / "benchmarks"))  # what it imports lies beside it
    spec = importlib.util.spec_from_file_location("render", root / "benchmarks/render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    text = (root / "README.md").read_text()
    for name, table in (("faults", render.faults()), ("kills", render.kills()), ("budget", render.budget())):
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text, f"python benchmarks/render.py: {name}"
    assert " (!)" not in render.faults(), "a fault ended otherwise than wanted"
