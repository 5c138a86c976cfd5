"""The recipe: every mistake with its file and line, all of them at once, and never a traceback."""

from __future__ import annotations

import ast
import dataclasses
import tracemalloc
from pathlib import Path

import pytest
import yaml

from streammerge import load_recipe, parse_recipe
from streammerge.errors import RecipeError
from streammerge.recipe import MODULES, Recipe, layer_indices, to_yaml

GOOD = """\
merge_method: rain
base_model: b
instruct_model: i
reasoning_model: r
calibration:
  reasoning: r.json
  instruction: i.jsonl
"""


def mistakes(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yml")
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message) < 8000 and len(message.splitlines()) < 40
    return message


def test_a_plain_recipe_has_the_defaults():
    recipe = parse_recipe(GOOD, "r.yml")
    assert recipe == dataclasses.replace(
        Recipe("rain", "i", "r", "b"), calibration=recipe.calibration, source="r.yml"
    )  # fmt: skip
    assert recipe.modules == MODULES and recipe.layers is None and recipe.lam == 1.0
    assert recipe.needs_reasoning and recipe.needs_instruction


# lines appended to GOOD begin at line 8
WRONG = {
    "unknown key": ("seeed: 1", "r.yml:8: unknown key 'seeed'; did you mean 'seed'?"),
    "unknown, nothing near": ("zzz: 1", "r.yml:8: unknown key 'zzz'; keys here: allow_unchanged,"),
    "unknown nested": ("basis:\n  rank: exact\n  enrgy: .9", "r.yml:10: unknown key 'basis.enrgy'; did you mean 'ener"),
    "lambda under its Python name": ("lam: 1", "r.yml:8: unknown key 'lam'; did you mean 'lambda'?"),
    "hidden field": ("source: x", "r.yml:8: unknown key 'source'"),
    "twice": ("base_model: c", "r.yml:8: key 'base_model' is given twice"),
    "twice, nested": ("basis:\n  energy: .5\n  energy: .6", "r.yml:10: key 'basis.energy' is given twice"),
    "text for a number": ("lambda: big", "r.yml:8: lambda is 'big'; wanted a finite number"),
    "truth for a number": ("lambda: true", "r.yml:8: lambda is True; wanted a finite number"),
    "infinite": ("lambda: .inf", "r.yml:8: lambda is inf; wanted a finite number"),
    "nan": ("lambda: .nan", "r.yml:8: lambda is nan; wanted a finite number"),
    "hundreds of digits": ("lambda: 1" + "0" * 400, "r.yml:8: lambda is 1000"),
    "nothing for a number": ("lambda:", "r.yml:8: lambda is None; wanted a finite number"),
    "fraction for a count": ("seed: 1.5", "r.yml:8: seed is 1.5; wanted a whole number"),
    "text for a truth": ("allow_unchanged: maybe", "r.yml:8: allow_unchanged is 'maybe'; wanted true or false"),
    "number for a truth": ("proxy_base: 1", "r.yml:8: proxy_base is 1; wanted true or false"),
    "below": ("seed: -1", "r.yml:8: seed is -1; wanted at least 0"),
    "exclusive bound": ("basis: {energy: 0}", "r.yml:8: basis.energy is 0.0; wanted more than 0"),
    "above": ("basis: {energy: 1.01}", "r.yml:8: basis.energy is 1.01; wanted at most 1"),
    "not a choice": ("dtype: int8", "r.yml:8: dtype is 'int8'; wanted one of auto, float32, float16, bfloat16"),
    "list for a choice": ("dtype: [float32]", "r.yml:8: dtype is ['float32']; wanted one of"),
    "list for a mapping": ("basis: [1]", "r.yml:8: basis must be a mapping of keys"),
    "text for a mapping": ("thinking: auto", "r.yml:8: thinking must be a mapping of keys"),
    "mapping for a text": ("shard_size: {a: 1}", "r.yml:8: shard_size is {'a': 1}; wanted a size, such as 8GiB"),
    "bounds of one": ("coefficients: {bounds: [1]}", "r.yml:8: coefficients.bounds is [1]; wanted a list of 2 numbers"),
    "bounds reversed": ("coefficients: {bounds: [2, 1]}", "coefficients.bounds is [2.0, 1.0]; wanted 0 <= low <= high"),
    "bounds negative": ("coefficients: {bounds: [-1, 1]}", "wanted 0 <= low <= high"),
    "uniform outside bounds": (
        "coefficients: {rule: uniform, value: 3}", "coefficients.value is 3.0; wanted a value inside"
    ),
    "unknown module": ("modules: [q, w]", "modules has w; choose from q, k, v"),
    "no module": ("modules: []", "modules has nothing"),
    "layers in words": ("layers: all", "r.yml:8: layers is 'all'; wanted layer numbers and ranges"),
    "layers backwards": ("layers: 5-3", "r.yml:8: layers is '5-3'; wanted layer numbers"),
    "no layer": ("layers: []", "r.yml:8: layers is []; wanted at least one layer"),
    "a million million layers": ("layers: 0-1000000000000", "wanted layer numbers and ranges"),
    "negative layer": ("layers: -1", "r.yml:8: layers is -1; wanted layer numbers"),
    "fixed without size": ("basis: {rank: fixed}", "give basis.size"),
    "size without fixed": ("basis: {size: 4}", "write rank: fixed, or drop size"),
    "size": ("shard_size: 5 parsec", "r.yml:8: shard_size: cannot read the size '5 parsec'"),
    "size zero": ("budget: {host_memory: 0GB}", "r.yml:8: budget.host_memory: the size '0GB' is zero"),
    "size of 400 digits": ("shard_size: '" + "9" * 400 + "GB'", "r.yml:8: shard_size: cannot read the size"),
    "base and proxy": ("proxy_base: true", "give base_model, or proxy_base: true"),
    "few tokens": ("budget: {tokens_per_batch: 3}", "r.yml:8: budget.tokens_per_batch is 3; wanted at least 64"),
    "python object": ("seed: !!python/object/apply:os.getcwd []", "r.yml:8: seed: cannot be read as YAML"),
    "tag that trips its parser": ("seed: !!timestamp soon", "r.yml:8: seed: cannot be read as YAML (AttributeError"),
    "list as a key": ("? [a, b]\n: 1", "r.yml:8: a key must be a plain word"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_names_file_and_line(case):
    lines, wanted = WRONG[case]
    assert wanted in mistakes(GOOD + lines + "\n")


def test_all_mistakes_at_once():
    text = GOOD + "seeed: 1\nlambda: big\nbasis: {energy: 7, rnk: exact}\nshard_size: x\nlayers: y\n"
    message = mistakes(text)
    for part in ("r.yml:8:", "r.yml:9:", "r.yml:10: basis.energy", "r.yml:10: unknown", "r.yml:11:", "r.yml:12:"):
        assert part in message
    contradictions = GOOD + "proxy_base: true\nmodules: [x]\nbasis: {size: 3}\ncoefficients: {bounds: [3, 1]}\n"
    assert mistakes(contradictions).count("\n  - r.yml: ") == 4


def test_missing_keys_are_all_named():
    message = mistakes("lambda: 1\n")
    for key in ("merge_method", "instruct_model", "reasoning_model"):
        assert f"the key '{key}' is missing" in message
    bare = mistakes("merge_method: rain\ninstruct_model: .\nreasoning_model: r\n")  # there, and no adapter
    assert all(k in bare for k in ("calibration.reasoning is missing", "calibration.instruction is missing", "base_mo"))


@pytest.mark.parametrize("keys", ["basis: {rank: exact}", "coefficients: {kappa: 1}", "basis: {rank: none}"])
def test_task_arithmetic_refuses_keys_of_rain(keys):
    models = "merge_method: task_arithmetic\nbase_model: b\ninstruct_model: i\nreasoning_model: r\n"
    assert "task_arithmetic would ignore them" in mistakes(models + keys)
    recipe = parse_recipe(models + "lambda: .3", "r.yml")
    assert not recipe.needs_reasoning and not recipe.needs_instruction


def test_stages_switched_off_need_no_calibration():
    models = "merge_method: rain\nbase_model: b\ninstruct_model: i\nreasoning_model: r\n"
    recipe = parse_recipe(models + "basis: {rank: none}\ncoefficients: {rule: uniform}\n", "r.yml")
    assert not recipe.needs_reasoning and not recipe.needs_instruction
    assert "calibration.instruction is missing" in mistakes(models + "basis: {rank: none}\n")
    assert "calibration.reasoning is missing" in mistakes(models + "coefficients: {rule: uniform}\n")


NO_RECIPE = {
    "empty": "",
    "comment": "# nothing\n",
    "list": "- a\n- b\n",
    "text": "hello",
    "number": "7",
    "null": "null",
    "two documents": "a: 1\n---\nb: 2\n",
    "tab": "a:\n\t- b\n",
    "unclosed": "a: [1, 2",
    "unknown alias": "a: *nowhere",
    "control character": "a: \x00",
    "deep lists": "seed: " + "[" * 4000 + "]" * 4000,
    "deep mappings": "{a: " * 4000 + "}" * 4000,
}


@pytest.mark.parametrize("case", NO_RECIPE)
def test_what_is_no_recipe(case):
    assert mistakes(NO_RECIPE[case]).startswith("r.yml: ")


def bomb(levels: int) -> str:
    """Nine aliases a level: 9^levels texts when written out."""
    lines = ["zzz0: &a0 [lol, lol, lol]"]
    lines += [f"zzz{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("key", ["seed", "modules", "layers", "dtype", "shard_size", "lambda", "thinking", "? "])
def test_alias_bomb_stays_small(key):
    tail = "? *a12\n: 1\n" if key == "? " else f"{key}: *a12\n"
    tracemalloc.start()
    try:
        mistakes(GOOD + bomb(12) + tail)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [
    "&r\nmerge_method: rain\ncalibration: *r\n",
    GOOD + "modules: &m [q, *m]\n",
    GOOD + "layers: &m [1, *m]\n",
    GOOD + "basis: &b\n  rank: *b\n",
    GOOD + "? &k [*k]\n: 1\n",
    GOOD + "<<: {seed: 1}\n",
    GOOD + "deep: " + "[" * 200 + "]" * 200 + "\nmodules: " + "[" * 200 + "]" * 200 + "\n",
])  # fmt: skip
def test_recursion_and_merge_keys_are_mistakes(text):
    assert "r.yml" in mistakes(text)


def test_aliases_are_allowed():
    recipe = parse_recipe(GOOD + "lambda: &x 0.5\ncoefficients: {kappa: *x}\n", "r.yml")
    assert recipe.lam == recipe.coefficients.kappa == 0.5


def test_files_that_cannot_be_read(tmp_path):
    binary = tmp_path / "binary.yml"
    binary.write_bytes(bytes(range(256)))
    for path in (binary, tmp_path, tmp_path / "absent.yml"):
        with pytest.raises(RecipeError, match="cannot read the recipe") as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw, wanted", [
    (3, (3,)), ("0-3, 7", (0, 1, 2, 3, 7)), ([0, "2-4", 3], (0, 2, 3, 4)), ("2 - 3", (2, 3)), ([5, 1, 5], (1, 5)),
])  # fmt: skip
def test_layers(raw, wanted):
    assert layer_indices(raw) == wanted
    assert parse_recipe(GOOD + yaml.safe_dump({"layers": raw}), "r.yml").layers == wanted


FULL = """\
merge_method: rain
base_model: 123
instruct_model: "i: # not a comment"
reasoning_model: ∇/r
calibration: {reasoning: a b.json, instruction: i.jsonl, holdout: .25, limit_reasoning: 7, on_long: drop}
thinking: {open: "<think>\\n", close: "no", before: 2, attended_values: false}
basis: {rank: fixed, size: 12, method: randomized, oversample: 3}
coefficients: {rule: prior, scope: layer, rho: 2, bounds: [0, 3], rows: token}
lambda: 1e-3
layers: 0-2,9
modules: [q, down]
dtype: bfloat16
seed: 11
shard_size: 1GB
allow_unchanged: true
budget: {device_memory: 8GiB, host_memory: 16 GiB, tokens_per_batch: 512}
"""


@pytest.mark.parametrize("text", [GOOD, FULL, GOOD.replace("base_model: b", "proxy_base: true")])
def test_to_yaml_and_back(text):
    recipe = parse_recipe(text, "r.yml")
    again = parse_recipe(to_yaml(recipe), "r.yml")
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)


@pytest.mark.parametrize("lines, wanted", [
    ("basis: {rank: exact, energy: .9}", "basis.energy is given but basis.rank is exact"),
    ("coefficients: {value: .5}", "coefficients.value is given but the rule is standardized"),
    ("coefficients: {rule: uniform, scope: layer, rho: 2}", "coefficients.rho has no effect with rule: uniform"),
    ("coefficients: {rule: literal, kappa: 1}", "coefficients.kappa has no effect with rule: literal"),
])  # fmt: skip
def test_keys_without_effect_are_refused(lines, wanted):
    assert wanted in mistakes(GOOD + lines + "\n")


def test_every_field_survives_to_yaml():
    keys = yaml.safe_load(to_yaml(parse_recipe(FULL, "r.yml")))
    names = {f.name for f in dataclasses.fields(Recipe)} - {"source", "names", "lam"} | {"lambda"}
    assert set(keys) == names


def test_relative_paths_are_the_recipes_own(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "models" / "b").mkdir(parents=True)
    (tmp_path / "recipes" / "r.json").write_text("[]")
    path = tmp_path / "recipes" / "r.yml"
    text = GOOD.replace("base_model: b", "base_model: models/b").replace("instruct_model: i", "instruct_model: o/i")
    path.write_text(text)
    for directory, name in ((tmp_path, "recipes/r.yml"), (path.parent, "r.yml"), (Path("/"), str(path))):
        monkeypatch.chdir(directory)
        recipe = load_recipe(name)
        assert recipe.base_model == str(tmp_path / "recipes" / "models" / "b")
        assert recipe.calibration.reasoning == str(tmp_path / "recipes" / "r.json")
        assert recipe.instruct_model == "o/i"  # no such directory: a Hub id stays as written
        assert recipe.source == name


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse_recipe(GOOD.replace("base_model: b", "base_model: ~/m"), "r.yml")
    assert recipe.base_model == str(tmp_path / "m")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_recipe(GOOD, "r.yml").lam = 2


def test_defaults_live_in_the_recipe_only():
    """Nothing that a recipe can set has a second default in the signature of a stage."""
    settings = set()
    for cls in (Recipe, *(type(v) for v in vars(parse_recipe(GOOD, "r.yml")).values() if dataclasses.is_dataclass(v))):
        settings |= {f.name for f in dataclasses.fields(cls)}
    settings -= {"source", "value", "open", "close", "method"}  # words that mean other things elsewhere
    package = Path(__file__).parents[1] / "streammerge"
    second = []
    stages = "sweep bases linalg capture coefficients attention compose planned calibration"
    for name in stages.split():
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                with_default = a.args[len(a.args) - len(a.defaults):]
                with_default += [k for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None]
                second += [f"{name}.{node.name}({k.arg})" for k in with_default if k.arg in settings]
    assert second == []
