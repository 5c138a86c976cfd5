"""A recipe is read from a stranger as safely as from a friend: limits of size, depth and aliases, and odd texts."""

import os
import time

import pytest

from streammerge import load_recipe, parse_recipe
from streammerge.errors import RecipeError
from streammerge.strict import TEXT_LIMIT

GOOD = "merge_method: task_arithmetic\nbase_model: b\ninstruct_model: i\nreasoning_model: r\n"
HUGE = "0x" + "f" * 5000  # CPython does not write it out in decimal


def merges(levels: int) -> str:
    """`<<` lists double what they name at each level: 2^levels pairs when constructed."""
    lines = ["z0: &m0 {x: 1}"] + [f"z{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, levels + 1)]
    return "\n".join(lines) + f"\nseed: *m{levels}\n"


CASES = {
    "merge key bomb": (GOOD + merges(40), "stand for more than"),
    "a list that holds itself": (GOOD + "layers: &m [1, *m]\n", "contains itself"),
    "33 levels": (GOOD + "seed: " + "[" * 40 + "]" * 40, "nested deeper than"),
    "too long": (GOOD + "#" * TEXT_LIMIT, "a recipe has at most"),
    "seed of 5000 digits": (GOOD + f"seed: {HUGE}\n", "seed is a number of thousands of digits; wanted a whole number"),
    "negative seed of 5000 digits": (GOOD + f"seed: -{HUGE}\n", "seed is a number of thousands of digits"),
    "lambda of 5000 digits": (GOOD + f"lambda: {HUGE}\n", "lambda is a number of thousands of digits"),
    "size of 5000 digits": (GOOD + f"shard_size: {HUGE}\n", "shard_size is a number of thousands of digits"),
    "layer of 5000 digits": (GOOD + f"layers: [{HUGE}]\n", "layers is "),
    "modules of 5000 digits": (GOOD + f"modules: [{HUGE}]\n", "modules is "),
    "seed beyond 64 bits": (GOOD + f"seed: {2**63}\n", "wanted a whole number below 2**63"),
    "work without end": (GOOD + "basis: {power_iterations: 1000000000}\n", "wanted at most 100"),
    "NUL": (GOOD.replace("base_model: b", 'base_model: "a\\0b"'), "without NUL"),
    "surrogate": (GOOD.replace("base_model: b", 'base_model: "\\ud800"'), "r.yml"),
    "python tag": (GOOD + "seed: !!python/object/apply:os.system ['touch canary']\n", "cannot be read as YAML"),
    "python name": (GOOD + "dtype: !!python/name:os.system\n", "cannot be read as YAML"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_time(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, wanted = CASES[case]
    began = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yml")
    assert wanted in str(caught.value) and "r.yml" in str(caught.value)
    assert time.monotonic() - began < 10 and len(str(caught.value)) < 4000
    assert not list(tmp_path.iterdir()), "code of a recipe ran"


@pytest.mark.parametrize("name", ["n" * 5000, "~nobody-of-that-name/model", "a" * 300 + "/b"])
def test_names_that_the_file_system_refuses_are_kept_as_written(name, tmp_path):
    recipe = parse_recipe(GOOD.replace("base_model: b", f"base_model: {name}"), "r.yml", tmp_path)
    assert recipe.base_model == name


def test_a_recipe_that_is_no_regular_file_or_is_endless(tmp_path):
    os.mkfifo(tmp_path / "pipe.yml")
    (tmp_path / "long.yml").write_bytes(b"#" * (TEXT_LIMIT + 1))
    for path in (tmp_path / "pipe.yml", tmp_path / "long.yml", "/dev/zero"):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            load_recipe(path)
