"""Ids that stand for different tokens in the parents of a merge are told (as R1's distilled models and their bases)."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import json

import pytest
from damage import bench  # noqa: F401

from streammerge import load_recipe
from streammerge.planned import make_plan
from streammerge.tokens import added_tokens, other_meanings


def write(folder, tokens: dict[int, str], **more):
    folder.mkdir(exist_ok=True)
    listed = [{"id": i, "content": text, "special": True} for i, text in tokens.items()]
    vocabulary = {"model": {"type": "BPE", "vocab": {"a": 0, '"added_tokens"': 1}}}
    data = {"version": "1.0", "added_tokens": listed} | vocabulary | more
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    return folder


def test_the_ids_that_differ_are_told(tmp_path):
    lrm = write(tmp_path / "lrm", {5: "<｜User｜>", 6: "<think>", 7: "</think>", 8: "<｜end｜>", 9: "x", 10: "y"})
    itm = write(tmp_path / "itm", {5: "<|im_start|>", 6: "<think>", 7: "a", 8: "b", 9: "z", 11: "only here"})
    told = other_meanings(lrm, itm)
    assert told.startswith("stands for other tokens at 4 ids: 5 is '<|im_start|>' there and '<｜User｜>' in the LRM")
    assert "and 1 more; the LRM's tokenizer" in told and "11" not in told
    assert other_meanings(lrm, write(tmp_path / "same", added_tokens(lrm))) == ""


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"added_tokens": 3}', '{"added_tokens": [3]}', '{"added_tokens": [{"id": 1}]}',
     '{"added_tokens": ' + "[" * 5000],
)  # fmt: skip
def test_what_cannot_be_read_has_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert added_tokens(tmp_path) == {} and added_tokens(tmp_path / "nowhere") == {}


def test_a_plan_warns(bench):
    def warned() -> list[str]:
        return [w for w in make_plan(load_recipe(bench.recipe())).warnings if "other tokens" in w]

    tokens = added_tokens(bench.models["lrm"])
    assert tokens and not warned()
    write(bench.models["itm"], tokens | {min(tokens): "<|another|>"})
    assert len(warned()) == 1 and warned()[0].startswith("instruct_model stands for other tokens at 1 ids: ")
