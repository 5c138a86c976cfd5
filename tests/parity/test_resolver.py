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
import yaml
from stand_ins import stand_in

from streammerge.mergekit import make_tensor_plan, parse_config
from streammerge.mergekit.config import DTYPES, base_of, parts
from streammerge.methods import METHODS

MERGEKIT = os.environ.get("STREAMMERGE_MERGEKIT", "")
pytestmark = pytest.mark.skipif(not MERGEKIT, reason="STREAMMERGE_MERGEKIT (mergekit's Python) is not set")
MODELS = ("a", "b", "c")
FILTERS = ("self_attn", "mlp", "q_proj", "embed_tokens", "lm_head", "norm", "layers.1.", "model.layers.3", "*", "none")
RANGES = {  # what each parameter may be without being nonsense
    "weight": (0.1, 2), "density": (0.3, 0.7), "gamma": (0, 0.2), "epsilon": (0, 0.2), "t": (0, 1), "lambda": (0, 2),
    "tol": (1e-6, 1e-3), "select_topk": (0, 1), "scale": (-2, 2),
}  # fmt: skip


def oracle(texts: list[str], directory: Path) -> list[dict]:
    """What mergekit plans for each configuration."""
    script = Path(__file__).with_name("mergekit_plans.py")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet.pop("PYTHONPATH", None)
    done = subprocess.run([MERGEKIT, str(script)], input=json.dumps(texts), cwd=directory, env=quiet, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


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


def ours(text: str, folder: Path) -> dict:
    """Our plan in the oracle's form."""
    config = parse_config(text, "config.yml", folder)
    plan = make_tensor_plan(config)
    roles = {c.path: str(r) for r, c in zip(config.references, plan.inputs, strict=True)}
    found = {}
    for job in plan.jobs:
        inputs = [(roles[s.checkpoint.path], s.key, dict(s.parameters)) for s in job.sources]
        base = (roles[job.base.checkpoint.path], job.base.key) if job.base else None
        found[job.out.name] = {"inputs": inputs, "base": base, "parameters": dict(job.parameters), "dtype": job.dtype,
                               "out": job.out.dtype}  # fmt: skip
    return {"tensors": found, "layers": plan.config["num_hidden_layers"], "config": config}


def compare(text: str, mine: dict, theirs: dict) -> None:
    """Every tensor, every input, every value."""
    assert mine["layers"] == theirs["layers"], text
    assert list(mine["tensors"]) != [] and sorted(mine["tensors"]) == sorted(theirs["tensors"]), text
    config = mine["config"]
    bases = {base_of(config, part) for _, part in parts(config)}
    for name, job in mine["tensors"].items():
        wanted = theirs["tensors"][name]
        base = wanted["base"] if config.spec.needs_base is not False else None
        assert (base is None) == (job["base"] is None) and (base is None or base in map(str, bases)), (text, name)
        expected = [tuple(i) for i in wanted["inputs"]]
        assert [i[:2] for i in job["inputs"]] == [i for i in expected if i[0] != base], (text, name)
        assert job["base"] is None or job["base"] in expected, (text, name)
        assert job["parameters"] == wanted["parameters"], (text, name)
        for model, _, values in job["inputs"]:
            assert values == wanted["input_parameters"][model], (text, name, model)
        assert job["dtype"] == DTYPES.get(wanted["dtype"], ""), (text, name)
        assert job["out"] == DTYPES[wanted["out_dtype"] or wanted["dtype"] or "float32"], (text, name)


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


if __name__ == "__main__":
    print(yaml.safe_dump(random_config(int(sys.argv[1])), sort_keys=False))
