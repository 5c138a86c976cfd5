"""mergekit's YAML, key by key: what is understood, and everything that is refused, by name, with file and line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streammerge.errors import RecipeError
from streammerge.mergekit import is_mergekit, load_config, parse_config
from streammerge.mergekit.config import Reference, parts
from streammerge.methods import METHODS

TIES = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: one
    parameters:
      weight: 1.0
      density: [1, 0.5]
  - model: two
    parameters:
      weight:
        - filter: mlp
          value: 0.3
        - value: 0
parameters:
  normalize: true
"""
PASS = """\
merge_method: passthrough
slices:
  - sources:
      - model: one
        layer_range: [0, 3]
  - sources:
      - model: two
        layer_range: [1, 4]
"""


def mistakes(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_config(text, "c.yml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_configuration_as_it_is():
    config = parse_config(TIES + "dtype: bfloat16\nout_dtype: torch.float32\ntokenizer_source: base\n", "c.yml")
    assert [r.name for r in config.references] == ["base", "one", "two"]
    assert (config.dtype, config.out_dtype, config.vocabulary) == ("BF16", "F32", Reference("base"))
    assert config.models[1].parameters["density"].setting == (1, 0.5)
    assert config.models[1].parameters["density"].at == "c.yml:8"
    assert config.text.startswith("merge_method: ties")


def test_the_base_comes_last_where_it_is_not_listed_and_first_among_the_references():
    text = TIES.replace("  - model: base\n", "")
    config = parse_config(text, "c.yml")
    ((_, part),) = parts(config)
    assert [s.model.name for s in part.sources] == ["one", "two", "base"]
    assert [r.name for r in config.references] == ["base", "one", "two"]


def test_references_without_a_base_are_in_the_order_of_the_recipe():
    assert [r.name for r in parse_config(PASS, "c.yml").references] == ["one", "two"]


@pytest.mark.parametrize("written, name", [
    ("one", "one"), ("'org/one@v1.0'", "org/one@v1.0"), ("{model: one}", "one"),
    ("{model: {path: org/one, revision: v1}}", "org/one@v1"), ("{model: {path: one}}", "one"),
])  # fmt: skip
def test_a_model_can_be_named_in_mergekit_s_ways(written, name):
    assert parse_config(TIES.replace("- model: one", f"- model: {written}"), "c.yml").models[1].model.name == name


WRONG = {  # (what is replaced, by what, what the message says)
    "unknown key": ("dtype", "dtyp: float16", "c.yml:17: unknown key 'dtyp'; did you mean 'dtype'?"),
    "unknown key, inner": ("  - model: base", "  - modle: base", "c.yml:4: unknown key 'models[0].modle'; did you"),
    "layer_range in models": ("  - model: base", "  - model: base\n    layer_range: [0, 3]",
                              "c.yml:5: unknown key 'models[0].layer_range'"),
    "twice": ("dtype", "base_model: b2", "c.yml:17: key 'base_model' is given twice"),
    "unknown method": ("merge_method: ties", "merge_method: teis", "'teis' is not known; did you mean 'ties'?"),
    "unsupported method": ("merge_method: ties", "merge_method: nearswap", "merge_method nearswap is not supported:"),
    "our method": ("merge_method: ties", "merge_method: rain", "merge_method rain is no method of mergekit; in a rain"),
    "unknown parameter": ("density: [", "densty: [", "c.yml:8: models[1].parameters.densty is no parameter of ties and "
                          "would have no effect; did you mean 'density'?"),
    "parameter of another method": ("normalize: true", "select_topk: 1", "select_topk is no parameter of ties"),
    "merge's parameter at a model": ("density: [1, 0.5]", "normalize: true", "models[1].parameters.normalize has no "
                                     "effect there; normalize belongs under the top-level parameters"),
    "text for a number": ("density: [1, 0.5]", "density: [1, half]", "c.yml:8: models[1].parameters.density has 'half'"
                          "; wanted a finite number"),
    "number for a truth": ("normalize: true", "normalize: 2", "c.yml:16: parameters.normalize has '2'; wanted true or"),
    "nan": ("density: [1, 0.5]", "density: .nan", "density has 'nan'; wanted a finite number"),
    "null for a parameter": ("density: [1, 0.5]", "density:", "models[1].parameters.density: wanted a value, a list"),
    "mixed list": ("density: [1, 0.5]", "density: [1, {value: 2}]", "models[1].parameters.density: wanted a value, a "),
    "filter without a value": ("value: 0.3", "valeu: 0.3", "unknown key 'valeu'"),
    "dtype": ("dtype", "dtype: int8", "c.yml:17: dtype is 'int8'; wanted one of bfloat16, float16, float32, float64"),
    "no dtype at all": ("dtype", "dtype: []", "c.yml:17: dtype is []; wanted one of bfloat16, float16, float32"),
    "modules": ("dtype", "modules: {x: {}}", "c.yml:17: modules is not supported: modules of a model cannot be merged"),
    "union": ("dtype", "tokenizer_source: union", "c.yml:17: tokenizer_source: union is not supported: it would make"),
    "union, by default": ("dtype", "tokenizer: {pad_to_multiple_of: 8}", "tokenizer.source is missing, which mergekit"),
    "tokens": ("dtype", "tokenizer: {source: base, tokens: {a: {}}}", "c.yml:17: tokenizer.tokens is not supported:"),
    "both tokenizers": ("dtype", "tokenizer_source: base\ntokenizer: {source: base}", "are both given; keep one"),
    "lora": ("model: one", "model: one+adapter", "c.yml:5: one+adapter: a LoRA adapter behind '+' is not supported"),
    "lora, as a mapping": ("model: one", "model: {model: one, lora: x}", "c.yml:5: models[1].model.lora is not supp"),
    "override": ("model: one", "model: {model: one, override_architecture: X}", "override_architecture is not support"),
    "empty model": ("model: one", "model:", "c.yml:5: models[1].model is empty; wanted the path or the Hub id"),
    "number for a model": ("model: one", "model: 7", "c.yml:5: models[1].model is '7'; wanted the path or the Hub id"),
    "no weight": ("      weight: 1.0\n", "", "c.yml:5: models: ties needs the parameter weight of one"),
    "no base": ("base_model: base\n", "", "merge_method ties needs base_model"),
    "listed twice": ("  - model: base\n", "  - model: two\n", "models: two is listed twice; give it once"),
    "both": ("dtype", "slices: [{sources: [{model: one, layer_range: [0, 1]}]}]", "give either models or slices, and"),
    "models is no list": ("dtype", "slices: 3", "c.yml:17: slices must be a list"),
    "experts": ("dtype", "experts: []", "the key 'experts' says that this is a mixture of experts, for mergekit-moe"),
    "genome": ("dtype", "genome: {}", "an evolutionary search, for mergekit-evolve"),
    "two documents": ("dtype", "---\nmerge_method: ties", "holds several configurations, for mergekit-multi: put each"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_has_its_words(name):
    old, new, says = WRONG[name]
    text = TIES + new + "\n" if old == "dtype" else TIES.replace(old, new, 1)
    assert text != TIES
    assert says in mistakes(text)


SLICED = {
    "end first": ("[0, 3]", "[3, 3]", "c.yml:5: slices[0].sources[0].layer_range is [3, 3]; wanted an end beyond the"),
    "not two": ("[0, 3]", "[3]", "wanted [first, end]: two whole numbers; the end is not included"),
    "not whole": ("[0, 3]", "[0, 3.5]", "wanted [first, end]: two whole numbers"),
    "missing": ("        layer_range: [0, 3]\n", "", "the key 'slices[0].sources[0].layer_range' is missing"),
    "unequal": ("      - model: one\n", "      - model: b\n        layer_range: [0, 2]\n      - model: one\n",
                "slices[0]: its sources have layer ranges of different lengths: [0, 2], [0, 3]"),
    "residual": ("  - sources:\n      - model: two", "  - residual_weight: 1\n    sources:\n      - model: two",
                 "slices[1].residual_weight has no effect in mergekit either; drop it"),
    "two models": ("      - model: one\n", "      - model: b\n        layer_range: [0, 3]\n      - model: one\n",
                   "c.yml: slices[0]: passthrough merges exactly 1 models; 2 are given"),
    "base outside": ("merge_method: passthrough", "merge_method: ties\nbase_model: b\nparameters: {weight: 1}",
                     "c.yml:2: slices[0]: base_model b is not among its sources, and ties needs it there"),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICED)
def test_every_mistake_in_slices(name):
    old, new, says = SLICED[name]
    assert old in PASS and says in mistakes(PASS.replace(old, new, 1))


def test_all_mistakes_at_once():
    text = TIES.replace("density: [", "densty: [").replace("model: two", "model: two+lora") + "dtype: float32\n"
    message = mistakes(text)
    assert "densty" in message and "two+lora" in message
    message = mistakes(TIES.replace("model: one", "modle: one") + "dtype: x\nfoo: 1\n")
    assert "modle" in message and "dtype is 'x'" in message and "unknown key 'foo'" in message


@pytest.mark.parametrize("key", ["dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "slices",
                                 "modules", "parameters"])  # fmt: skip
def test_null_is_the_same_as_absence(key):
    text = TIES.replace("parameters:\n  normalize: true\n", "")
    same = parse_config(text + f"{key}:\n", "c.yml")
    plain = parse_config(text, "c.yml")
    assert (same.models, same.dtype, same.vocabulary) == (plain.models, "", None)


@pytest.mark.parametrize("method, count, base, says", [
    ("slerp", 2, True, "slerp merges exactly 1 models besides the base; 2 are given"),
    ("model_stock", 1, True, "model_stock merges at least 2 models besides the base; 1 are given"),
    ("nuslerp", 1, False, "nuslerp merges exactly 2 models; 1 are given"),
    ("passthrough", 1, True, "passthrough merges exactly 1 models (base_model counts as one); 2 are given"),
])  # fmt: skip
def test_how_many_models_a_method_takes(method, count, base, says):
    text = f"merge_method: {method}\n" + ("base_model: b\n" if base else "")
    text += "models: [" + ", ".join(f"{{model: m{i}}}" for i in range(count)) + "]\n"
    text += f"parameters: {{{', '.join(f'{n}: 0.5' for n in _required(method))}}}\n"
    assert says in mistakes(text)


def _required(method: str) -> list[str]:
    spec = METHODS[method]
    return [n for n, p in {**spec.parameters, **spec.model_parameters}.items() if p.required]


def test_linear_needs_a_weight_of_the_base_too():
    """For methods that know no base it is one more model."""
    text = "merge_method: linear\nbase_model: b\nmodels: [{model: one, parameters: {weight: 1}}]\n"
    assert "models: linear needs the parameter weight of b" in mistakes(text)
    assert parse_config(text + "parameters: {weight: 1}\n", "c.yml").merge_method == "linear"


def test_files_and_their_kinds(tmp_path):
    file = tmp_path / "c.yml"
    for text, wanted in ((TIES, True), (PASS, True), ("merge_method: rain\nreasoning_model: x\nmodels: []\n", False),
                         ("merge_method: task_arithmetic\ninstruct_model: x\n", False), ("experts: []\n", True),
                         ("modules: {}\n", True), ("{merge_method: slerp, models: []}\n", True),
                         ("merge_method: slerp\nmodels: []\n---\nx: 1\n", True)):  # fmt: skip
        file.write_text(text)
        assert is_mergekit(file) is wanted, text
    assert is_mergekit(tmp_path / "absent.yml") is False
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_config(tmp_path / "absent.yml")
    file.write_text(TIES)
    assert load_config(file).directory == tmp_path


def test_a_configuration_is_read_without_torch():
    code = f"from streammerge.mergekit import parse_config; parse_config({TIES!r}, 'c.yml')\n"
    code += "import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
