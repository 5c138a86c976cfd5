"""Flags by their environment variables: the command line wins, mistakes name the variable."""

from __future__ import annotations

import json

import pytest
from builders import save_trio, write_sets  # noqa: F401 (bench needs them)
from damage import bench  # noqa: F401

from streammerge.cli import main
from streammerge.environment import Parser
from streammerge.flags import parser

# ruff: noqa: F811 (a fixture is imported, then named as an argument)


def parsed(monkeypatch, variables: dict[str, str], *args: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return parser().parse_args(["merge", "recipe.yml", "out", *args])


def test_every_flag_has_a_variable():
    parser()
    wanted = {"HOST_MEMORY", "LAMBDA", "DRY_RUN", "RESTART", "LOG_FORMAT", "JSON", "SHAPE", "GENERATE", "L_THINK"}
    assert {f"STREAMMERGE_{name}" for name in wanted} <= Parser.variables
    assert not {"STREAMMERGE_HELP", "STREAMMERGE_VERSION", "STREAMMERGE_RECIPE", "STREAMMERGE_"} & Parser.variables


def test_typed_like_the_flag_and_the_command_line_wins(monkeypatch):
    variables = {"STREAMMERGE_THREADS": "3", "STREAMMERGE_LAMBDA": "0.5", "STREAMMERGE_HOST_MEMORY": "2GiB"}
    args = parsed(monkeypatch, variables, "--lambda", "0.25")
    assert (args.threads, args.lam, args.host_memory, args.device_memory) == (3, 0.25, "2GiB", None)


@pytest.mark.parametrize(("text", "wanted"), [("1", True), ("Yes", True), ("off", False), ("0", False), ("", False)])
def test_a_switch(monkeypatch, text, wanted):
    assert parsed(monkeypatch, {"STREAMMERGE_RESTART": text}).restart is wanted


def test_a_required_flag_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("STREAMMERGE_SHAPE", "7b")
    assert parser().parse_args(["bench"]).shape == "7b"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("THREADS", "0", "at least 1"), ("RESTART", "maybe", "wanted 1, on"), ("LOG_FORMAT", "xml", "choose from text"),
     ("HOST_MEMORY", "much", "much")],
)  # fmt: skip
def test_a_mistake_names_the_variable(monkeypatch, capsys, name, value, told):
    with pytest.raises(SystemExit) as stopped:
        parsed(monkeypatch, {f"STREAMMERGE_{name}": value})
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"STREAMMERGE_{name}: " in error and told in error


def test_only_the_chosen_command_minds(monkeypatch):
    monkeypatch.setenv("STREAMMERGE_SHAPE", "9b")
    assert parsed(monkeypatch, {}).command == "merge"
    with pytest.raises(SystemExit):
        parser().parse_args(["bench"])


def test_a_real_merge_from_the_environment(bench, monkeypatch):
    for name, value in {"LAMBDA": "0.5", "JSON": "yes", "QUIET": "1", "TREADS": "2"}.items():
        monkeypatch.setenv(f"STREAMMERGE_{name}", value)
    assert main(["merge", str(bench.recipe()), str(bench.out)]) == 0
    told = bench.capfd.readouterr()
    assert json.loads(told.out)["recipe"]["lambda"] == 0.5
    assert told.err == "streammerge: STREAMMERGE_TREADS is no flag of streammerge; did you mean STREAMMERGE_THREADS?\n"
