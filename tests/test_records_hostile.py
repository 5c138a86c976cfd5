"""Calibration files that are broken on purpose: one line that names the file, in time and at a readable length."""

import json
import os

import pytest

from streammerge import records
from streammerge.records import read_set

GOOD = {"prompt": "p", "reasoning": "t", "response": "r"}


def told(path, kind="reasoning") -> str:
    problems: list[str] = []
    assert read_set(str(path), kind, None, problems) == []
    assert problems and all(str(path) in p and len(p) < 700 + len(str(path)) for p in problems), problems
    return "\n".join(problems)


CASES = {
    "deep list": ("[" * 100_000, "nested too deep"),
    "deep line": ('{"prompt": "x"}\n{"a":' + "[" * 100_000, "nested too deep"),
    "key twice": ('[{"prompt": "a", "prompt": "b", "reasoning": "t", "response": "r"}]', "'prompt' appears twice"),
    "half a character": (json.dumps([{**GOOD, "prompt": "\ud800"}]), "'prompt' holds half a surrogate pair"),
    "half a character in an id": (
        json.dumps([{**GOOD, "sample_id": "\udfff", "response": 1}]), "'response' is a number"
    ),
    "a long id": (json.dumps([{"sample_id": "x" * 10**6}]), "sample xxx"),
    "an id of many levels": (json.dumps([{"sample_id": [[[[["x" * 1000]]]]] * 1000}]), "'prompt' is missing"),
    "many keys": (json.dumps({f"key {i} {'x' * 500}": 1 for i in range(10_000)}), "one object with the keys key 0"),
    "a number of 5000 digits": ('[{"sample_id": 1' + "0" * 5000 + "}]", "neither JSON nor JSON Lines"),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_sets(case, tmp_path):
    text, wanted = CASES[case]
    (tmp_path / "set.json").write_text(text)
    assert wanted in told(tmp_path / "set.json")


def test_files_that_never_end(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in told(tmp_path / "pipe")
    assert "not a regular file" in told("/dev/zero")
    monkeypatch.setattr(records, "FILE_LIMIT", 100)
    (tmp_path / "long.json").write_text(json.dumps([GOOD] * 10))
    assert "more than 100 bytes" in told(tmp_path / "long.json")
