"""What a user sees: the bar on a terminal, the JSON log, few words elsewhere, and the table at the end."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from streammerge import merge
from streammerge.progress import Progress
from streammerge.report import print_summary, rank_warnings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    merge(make_recipe(), tmp_path / "out", progress=Progress())
    told = sys.stderr.getvalue()
    for wanted in ("merge: layer 3/3", "100%", "ETA", r"\d+\.\dk tok/s", r"\d+ MB/s", r"peak \d+\.\d\d GB"):
        assert re.search(wanted, told), wanted


def test_only_stages_elsewhere(make_recipe, tmp_path, capsys):
    merge(make_recipe(), tmp_path / "out", progress=Progress())
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["[streammerge] calibration", "[streammerge] survey of the LRM, then merge"]


def test_json_has_a_line_a_layer_of_each_pass(make_recipe, tmp_path, capsys):
    merge(make_recipe(), tmp_path / "out", progress=Progress("json"))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for name in ("survey", "layer"):
        assert [e["layer"] for e in events if e["event"] == name] == [0, 1, 2]
    last = events[-1]
    assert last["event"] == "layer" and last["of"] == 3 and last["eta_seconds"] == 0
    assert last["tokens_per_second"] > 0 and last["bytes_per_second"] > 0 and last["peak"] >= last["rss"] > 0


@pytest.mark.parametrize("keys", [
    {}, {"coefficients": {"scope": "layer"}}, {"coefficients": {"rule": "uniform"}}, {"basis": {"rank": "none"}},
    {"merge_method": "task_arithmetic"},
])  # fmt: skip
def test_the_work_announced_is_the_work_done(make_recipe, tmp_path, keys):
    """Whatever the stages: no sample is held, or counted, that passes through no layer."""
    progress = Progress("quiet")
    report = merge(make_recipe(**keys), tmp_path / "out", progress=progress)
    assert progress._done == progress._total
    assert progress._tokens == 3 * report["throughput"]["calibration_tokens"] > 0
    assert report["l_think"]["mean"] > 0


def test_the_summary_says_it_all(make_recipe, tmp_path, capsys, monkeypatch):
    """Every number of the spec is on the screen; a path that looks like markup is printed as it is."""
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "out[" / "b]"
    report = merge(make_recipe(basis={"energy": 0.99}), out)
    report["warnings"].append("rope_parameters is [bold]{'factor': 2}[/none] in base_model")
    print_summary(report, out)
    told = capsys.readouterr().err.replace("\n", "")
    for wanted in ("rank / in", "‖Δ⊥‖/‖Δ‖", "leak fp32", "leak written", "α  min", "at a bound", "L_think", "opener",
                   "predecessor", "closer", "peak memory", str(out), "[bold]{'factor': 2}[/none]"):  # fmt: skip
        assert wanted in told, wanted
    for row in report["modules"]:
        assert re.search(rf"{row['module']} .*{row['rank_over_in']:.1%}", told)
    assert "the protected space takes" in told


def test_wide_bases_are_warned_about():
    rows = [{"module": "q", "rank_over_in": 0.75, "kept_over_delta": 0.5},
            {"module": "down", "rank_over_in": 0.5, "kept_over_delta": 0.7}]  # fmt: skip
    [warning] = rank_warnings(rows)
    assert warning.startswith("q: ") and "75%" in warning and "50%" in warning and "basis.energy" in warning
