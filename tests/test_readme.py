"""The README is kept true: its commands, recipe, keys, exit codes, tree and measured table."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from streammerge import errors, recipe
from streammerge.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for found, text in fences if found == language]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for block in blocks("bash") for t in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


def test_commands_parse():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("streammerge ")]
    assert commands
    for line in commands:
        parser().parse_args(line.split("#")[0].split()[1:])


def test_benchmark_commands_exist():
    named = re.findall(r"python (benchmarks/\w+\.py)", README)
    assert named and all((ROOT / n).exists() for n in named)


def test_recipe_is_valid():
    parsed = recipe.parse_recipe(blocks("yaml")[0], "README.md")
    assert parsed.merge_method == "rain" and parsed.lam == 1.0


def _defaults(cls, prefix="") -> dict[str, object]:
    found = {}
    for f in dataclasses.fields(cls):
        name = prefix + {"lam": "lambda"}.get(f.name, f.name)
        if dataclasses.is_dataclass(f.default):
            found |= _defaults(type(f.default), name + ".")
        elif not f.metadata.get("hidden"):
            found[name] = f.default
    return found


def test_every_recipe_key_and_default_is_listed():
    listed = {}
    for names, default in re.findall(r"^\| (`[a-z_.`, ]+`) \| (.+?) \|", README, re.MULTILINE):
        names = re.findall(r"`([a-z_.]+)`", names)
        prefix = names[0].rpartition(".")[0]
        values = [] if "required" in default else re.findall(r"`(.+?)`", default)
        for n, name in enumerate(names):
            key = prefix + name if name.startswith(".") else name
            listed[key] = values[min(n, len(values) - 1)] if values else None
    wanted = _defaults(recipe.Recipe)
    assert set(listed) == set(wanted)
    for name, default in wanted.items():
        if listed[name] is not None:
            plain = list(default) if isinstance(default, tuple) else default
            assert yaml.safe_load(listed[name]) == plain, name


def test_every_exit_code_is_listed():
    codes = {int(c) for c in re.findall(r"^\| (\d+) \| ", README, re.MULTILINE)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.StreamMergeError)]
    assert {c.exit_code for c in classes} | {0, 1, 75, 130} == codes


def test_tree_is_the_repository():
    tree = next(b for b in blocks("") if b.startswith("streammerge/"))
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = name if name.endswith("/") else ""
            named.add(name)
        else:
            named.add(folder + name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {n.split("/")[0] + ("/" if "/" in n else "") for n in tracked if not n.startswith(".git")}
    files = {n for n in tracked if re.fullmatch(r"(streammerge|kernels)/\w+\.py", n) and "__init__" not in n}
    folders = {"/".join(n.split("/")[:2]) + "/" for n in tracked if re.match(r"streammerge/\w+/", n)}
    assert named - {".ci/run"} == (top - {".ci/"}) | files | folders


def test_demo_table_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks/results/demo-test.json").read_text())["rows"]
    for row in rows:
        name = f"{row['method']} λ = {row['lambda']:g}" if row["lambda"] is not None else row["method"]
        rates = [f"{100 * row[k]:.1f}" for k in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy")]
        assert f"| {name} | {' | '.join(rates)} |" in README, name


@pytest.mark.parametrize("number", re.findall(r"tests/(test_\w+\.py)", README))
def test_named_tests_exist(number):
    assert (ROOT / "tests" / number).exists()
