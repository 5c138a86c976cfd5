"""Plans against mergekit's own planner: each tensor's inputs, base and resolved parameters, for random configurations.

mergekit has an environment of its own: STREAMMERGE_MERGEKIT is its Python.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mergekit_oracle import MERGEKIT, compare, oracle, ours
from safetensors.torch import load_file
from stand_ins import save_words, stand_in

from streammerge.io.checkpoint import Checkpoint, TensorInfo
from streammerge.jobs import mapped_rows
from streammerge.mergekit import make_tensor_plan, parse_config
from streammerge.mergekit.config import DTYPES
from streammerge.mergekit.names import is_before, is_vocabulary, sort_out
from streammerge.methods import METHODS
from streammerge.tensor_merging import merge_config, request

pytestmark = pytest.mark.skipif(not MERGEKIT, reason="STREAMMERGE_MERGEKIT (mergekit's Python) is not set")
MODELS = ("a", "b", "c")
FILTERS = ("self_attn", "mlp", "q_proj", "embed_tokens", "lm_head", "norm", "layers.1.", "model.layers.3", "*", "none")
RANGES = {  # what each parameter may be without being nonsense
    "weight": (0.1, 2), "density": (0.3, 0.7), "gamma": (0, 0.2), "epsilon": (0, 0.2), "t": (0, 1), "lambda": (0, 2),
    "tol": (1e-6, 1e-3), "select_topk": (0, 1), "scale": (-2, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models of five layers; b ties its head, the others store one."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(MODELS):
        stand_in(root / name, head=name != "b", seed=seed)
    return root


def scalar(draw: random.Random, name: str, kind: type):
    """A value of a parameter, in one of the notations that YAML has for it."""
    if kind is bool:
        return draw.choice([True, False])
    if kind is int:
        return draw.choice([3, 5, "7", 4.0])
    low, high = RANGES[name]
    value = round(draw.uniform(low, high), 3)
    return draw.choice([value, value, value, str(value), f"{value:e}"])


def value(draw: random.Random, name: str, kind: type):
    """A scalar or a gradient."""
    if draw.random() < 0.5:
        return scalar(draw, name, kind)
    if kind is int:  # whatever lies between two of them must be whole
        return [draw.choice([3, 7])] * draw.randint(1, 3)
    return [scalar(draw, name, kind) for _ in range(draw.randint(1, 7))]


def some(draw: random.Random, name: str, kind: type, last: bool):
    """A setting: a value, one filter or several; with a fallback where nothing stands behind it (`last`)."""
    if draw.random() < 0.4:
        return value(draw, name, kind)
    if draw.random() < 0.2 and not last:
        return {"filter": draw.choice(FILTERS), "value": value(draw, name, kind)}
    choices = [{"filter": draw.choice(FILTERS), "value": value(draw, name, kind)} for _ in range(draw.randint(1, 4))]
    return choices + [{"value": value(draw, name, kind)}] * (last or draw.random() < 0.5)


def scope(draw: random.Random, known: dict, last: bool = False) -> dict:
    """A mapping of parameters; the last one has all that are required."""
    chosen = {n: p for n, p in known.items() if (last and p.required) or draw.random() < 0.4}
    return {name: some(draw, name, p.type, last) for name, p in chosen.items()}


def random_config(seed: int) -> dict:
    """A configuration that both sides can follow."""
    draw = random.Random(seed)
    spec = METHODS[draw.choice(sorted(METHODS))]
    both = {**spec.parameters, **spec.model_parameters}
    least, most = spec.count
    names = draw.sample(MODELS, 3)
    base = spec.needs_base or (spec.needs_base is None and draw.random() < 0.5)
    count = min(3 - base, most or 3, max(least, draw.randint(1, 3)))
    inputs = names[:count]
    data = {"merge_method": spec.name, "parameters": scope(draw, both, last=True)}
    if base:
        data["base_model"] = names[-1]

    def model(name: str, **more) -> dict:
        return {"model": name, **more, "parameters": scope(draw, {} if name == data.get("base_model") else
                                                           spec.model_parameters)}  # fmt: skip

    if draw.random() < 0.5:
        data["models"] = [model(name) for name in inputs + [names[-1]] * (base and draw.random() < 0.5)]
    else:
        data["slices"] = []
        for _ in range(draw.randint(1, 3)):
            length = draw.randint(1, 5)
            sources = draw.sample(inputs + [names[-1]] * bool(base), count + bool(base))
            ranges = [draw.randint(0, 5 - length) for _ in sources]
            data["slices"].append({
                "sources": [model(n, layer_range=[r, r + length]) for n, r in zip(sources, ranges, strict=True)],
                "parameters": scope(draw, both),
            })  # fmt: skip
    for key in ("dtype", "out_dtype"):
        if draw.random() < 0.4:
            data[key] = draw.choice(sorted(DTYPES))
    return data


def test_random_configurations_resolve_as_mergekit_resolves_them(folder):
    count = int(os.environ.get("STREAMMERGE_PARITY_CONFIGS", "300"))
    texts = [yaml.safe_dump(random_config(seed), sort_keys=False) for seed in range(count)]
    answers = oracle(texts, folder)
    methods = set()
    for text, theirs in zip(texts, answers, strict=True):
        assert "error" not in theirs, (text, theirs)
        compare(text, ours(text, folder), theirs)
        methods.add(yaml.safe_load(text)["merge_method"])
    assert methods == set(METHODS)


WORDS = [f"w{i}" for i in range(40)]
LENT = {  # how the output's vocabulary is asked for, and whose it is
    "base": ("merge_method: ties\nbase_model: a\nmodels: [{model: b}, {model: c}]\ntokenizer_source: base\n", "a"),
    "a model": ("merge_method: ties\nbase_model: a\nmodels: [{model: b}, {model: c}]\ntokenizer_source: c\n", "c"),
    "no base": ("merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}]\ntokenizer: {source: b}\n", "b"),
    "base as an input": ("merge_method: linear\nbase_model: c\nmodels: [{model: a}, {model: b}]\n"
                         "tokenizer_source: b\n", "b"),
    "slerp": ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
              "tokenizer_source: a\n", "a"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
@pytest.mark.parametrize("name", LENT)
def test_rows_are_mapped_as_mergekit_permutes_them(name, dtype, tmp_path):
    """Vocabularies that overlap in part and number their tokens differently; 16-bit models beside a 32-bit one."""
    text, lender = LENT[name]
    text += "" if "parameters" in text else "parameters: {weight: 1}\n"
    text += f"dtype: {dtype}\n" if dtype else ""
    shuffled = random.Random(3).sample(WORDS, 40)
    words = {"a": WORDS[:30], "b": shuffled[:34], "c": shuffled[12:]}
    for seed, (model, known) in enumerate(words.items()):
        stored = torch.float32 if model == "a" else torch.bfloat16
        stand_in(tmp_path / model, 1, head=model != "b", seed=seed, dtype=stored, vocab_size=40, vocabulary=40)
        save_words(tmp_path / model, known)
    (vocabulary,) = oracle([text], tmp_path, "vocabulary")
    theirs = load_file(tmp_path / "mergekit.safetensors")
    plan = make_tensor_plan(parse_config(text, "c.yml", tmp_path))
    assert vocabulary == {word: i for i, word in enumerate(words[lender])}
    assert plan.config["vocab_size"] == len(vocabulary)
    seen = set()
    for job in plan.jobs:
        if job.out.name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert job.out.shape == (len(vocabulary), 8)
            for source in (*job.sources, *([job.base] if job.base else [])):
                key = f"{source.checkpoint.path.name}/{job.out.name}"
                half = len(vocabulary) // 2
                mine = torch.cat([mapped_rows(source, 0, half, theirs[key].dtype),
                                  mapped_rows(source, half, len(vocabulary), theirs[key].dtype)])  # fmt: skip
                assert torch.equal(mine, theirs[key]), key
                seen.add(key)
    assert seen == set(theirs)


def test_names_mean_what_mergekit_s_tables_of_architectures_say(tmp_path):
    """Which tensors come before the layers, which hold a row for every token, and where a layer's number stands."""
    (tables,) = oracle(["{}"], tmp_path, "names")
    assert len(tables) > 30
    for table, (before, inside, after) in tables.items():
        for name, is_vocabulary_there in (*before.items(), *after.items()):
            assert is_before(name) is (name in before), (table, name)
            assert is_vocabulary(name) is is_vocabulary_there, (table, name)
        for name in inside:
            info = TensorInfo(name, "F32", (2,), tmp_path, 0, 8)
            names = sort_out(Checkpoint(tmp_path, "x", {name: info}, {}))
            if names.computed:
                assert name.endswith("inv_freq") or "bias" in name, (table, name)
                continue
            ((prefix, layers),) = names.stacks.items()
            assert f"{prefix}7.{min(layers[7])}" == name, (table, name)


MERGED = {
    "tokens": ("merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: [0.6, 0.3]}\n"
               "tokenizer: {source: b}\ndtype: bfloat16\n"),
    "layers": ("merge_method: passthrough\nbase_model: a\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}, "
               "{sources: [{model: c, layer_range: [1, 3]}]}]\nparameters: {scale: [{filter: q_proj, value: 0.5}, "
               "{value: 1}]}\nout_dtype: float16\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_a_whole_merge_has_mergekit_s_tensors_and_config(name, tmp_path):
    words = {"a": WORDS[:30], "b": WORDS[34:4:-1], "c": WORDS[12:]}
    for seed, (model, known) in enumerate(words.items()):
        stand_in(tmp_path / model, 3, head=model != "b", seed=seed, dtype=torch.bfloat16, vocab_size=40, vocabulary=40)
        save_words(tmp_path / model, known)
    (tmp_path / "c.yml").write_text(MERGED[name])
    command = [str(Path(MERGEKIT).parent / "mergekit-yaml"), "c.yml", "theirs", "--no-write-model-card"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    merge_config(request(tmp_path / "c.yml"), tmp_path / "ours")
    mine, theirs = ({k: v for f in sorted((tmp_path / who).glob("*.safetensors")) for k, v in load_file(f).items()}
                    for who in ("ours", "theirs"))  # fmt: skip
    assert list(mine) and mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    told = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        assert told[0][key] == told[1][key]
    assert told[0].get("torch_dtype") == told[1]["dtype"]


if __name__ == "__main__":
    print(yaml.safe_dump(random_config(int(sys.argv[1])), sort_keys=False))
