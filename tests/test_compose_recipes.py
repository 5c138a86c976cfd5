"""What RAIN composes with: sparsified task vectors, λ by layer and by name; against float64 and mergekit's meaning."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from builders import recipe_text
from safetensors.torch import load_file, save_file
from test_sweep import read_all

from streammerge import merge, parse_recipe
from streammerge.arch import SITE_OF
from streammerge.cli import main
from streammerge.errors import InputError, RecipeError, UnchangedError
from streammerge.io.checkpoint import open_checkpoint
from streammerge.planned import make_plan
from streammerge.sparsify import _key
from streammerge.task_vector import task_vector

BY_NAME = [{"filter": "mlp", "value": [0.5, 1.5]}, {"filter": "layers.2.", "value": 0.25}, {"value": 0.7}]
FIXED = {"coefficients": {"rule": "uniform", "value": 1.0}}  # α = 1 exactly: the report rounds it


def lam_of(name: str) -> float:
    """BY_NAME over three layers, by hand."""
    layer = int(name.split(".")[2])
    return [0.5, 1.0, 1.5][layer] if "mlp" in name else 0.25 if layer == 2 else 0.7


def sparse(method: str, delta: torch.Tensor, density: float, name: str) -> torch.Tensor:
    """S(Δ) by its definition, in float64; the mask of dare from its counter."""
    flat = delta.double().numpy().ravel()
    if method == "magnitude":
        kept = np.zeros(flat.size, bool)
        kept[np.argsort(-np.abs(delta.numpy().ravel()), kind="stable")[: int(density * flat.size)]] = True
        return torch.from_numpy(np.where(kept, flat, 0)).reshape(delta.shape)
    words = np.random.Philox(key=_key(0, name)).random_raw(-(-flat.size // 2)).view("<u4")[: flat.size]
    return torch.from_numpy(np.where(words < round(density * 2**32), flat / density, 0)).reshape(delta.shape)


def bases_of(folder, layer: int, module: str) -> list[torch.Tensor]:
    """Of a module, in float64, from what --artifacts kept."""
    found = load_file(next(folder.glob("bases-*")) / f"bases-{layer:05d}.safetensors")
    values = sorted(key for key in found if key.startswith("value/") and key.endswith("/u"))
    keys = values if module == "v" else [f"site/{SITE_OF[module]}/u"]
    return [found[key].double() for key in keys]


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("method", ["magnitude", "dare"])
def test_sparse_rain_is_its_formula(make_recipe, trio, tmp_path, method, scope):
    """W* = W_R + λ S(Δ)(I − U Uᵀ) in float64 from the stored models and bases; what is protected stays."""
    rule = {"sparsify": {"method": method, "density": [{"filter": "q_proj", "value": 0.5}, {"value": [0.1, 0.9]}]}}
    twice = {"coefficients": {"scope": "layer", "kappa": 0.0}}  # α = 1, found by a probe
    recipe = make_recipe(**rule, **(FIXED if scope == "model" else twice), **{"lambda": BY_NAME})
    report = merge(recipe, tmp_path / "out", artifacts=tmp_path / "kept")
    models = [read_all(path) for path in (trio["lrm"], trio["itm"], trio["base"])]
    merged = read_all(tmp_path / "out")
    jobs = make_plan(recipe).merged
    assert len(jobs) == 21 == len(report["per_tensor"])
    for name, told in report["per_tensor"].items():
        lrm, itm, base = (m[name] for m in models)
        layer, module = jobs[name].layer, jobs[name].module
        density = 0.5 if module == "q" else [0.1, 0.5, 0.9][layer]
        delta = sparse(method, itm - base, density, name)
        bases = bases_of(tmp_path / "kept", layer, module)
        kept = torch.cat([d - (d @ u) @ u.T for d, u in zip(delta.chunk(len(bases)), bases, strict=True)])
        wanted = lrm.double() + lam_of(name) * kept
        atol = 2e-6 * float(wanted.abs().max())
        torch.testing.assert_close(merged[name].double(), wanted, rtol=0, atol=atol, msg=name)
        assert told["leak"] <= 1e-5 and told["inside"] > 0, name
        assert told["delta"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert told["dense"] == pytest.approx(float((itm - base).double().norm()), rel=1e-5)
        assert (told["lambda"], told["density"]) == pytest.approx((lam_of(name), density))


def plain_recipe(trio, **extra):
    return parse_recipe(recipe_text(trio, None, merge_method="task_arithmetic", **extra), "test.yml")


@pytest.mark.parametrize("method", ["magnitude", "dare"])
def test_sparse_task_arithmetic_is_its_formula(trio, tmp_path, method):
    """θ_R + λ S(Δ), to a rounding in fp32; where S is zero, the LRM's bits."""
    report = merge(plain_recipe(trio, sparsify={"method": method, "density": 0.3}, **{"lambda": 0.5}), tmp_path / "out")
    lrm, itm, base, merged = (read_all(p) for p in (trio["lrm"], trio["itm"], trio["base"], tmp_path / "out"))
    for name in report["per_tensor"]:
        delta = sparse(method, itm[name] - base[name], 0.3, name)
        assert torch.equal(merged[name][delta == 0], lrm[name][delta == 0])
        torch.testing.assert_close(merged[name].double(), lrm[name].double() + 0.5 * delta, rtol=2e-7, atol=1e-7)


def test_masks_know_no_layers_batches_and_threads(trio, make_recipe, tmp_path):
    """One mask a tensor, whatever else is merged, by which path and in which batches; another one for another seed."""
    none = {"basis": {"rank": "none"}, **FIXED, "sparsify": {"method": "dare", "density": 0.5}}
    name = "model.layers.1.mlp.up_proj.weight"
    variants = {
        "all": make_recipe(**none, budget={"tokens_per_batch": 64}),
        "one layer": make_recipe(**none, layers="1"),
        "arithmetic": plain_recipe(trio, sparsify=none["sparsify"]),
        "other seed": make_recipe(**none, seed=1),
    }
    found = {}
    for key, recipe in variants.items():
        merge(recipe, tmp_path / key)
        found[key] = open_checkpoint(tmp_path / key, "out").read(name)
    assert torch.equal(found["all"], found["one layer"]) and torch.equal(found["all"], found["arithmetic"])
    assert not torch.equal(found["all"], found["other seed"])


def test_the_kernel_gets_the_vector_itself(trio):
    """W_I − W_B as the projection forms it is S(Δ) bit for bit, which W_B + S(Δ) in place of W_I would not be."""
    plan = make_plan(plain_recipe(trio, sparsify={"method": "dare", "density": 0.3}))
    for name in plan.merged:
        itm, base = (checkpoint.read(key) for checkpoint, key in plan.sources(name))
        vector = task_vector(plan, name, [itm, base])
        delta = itm - base
        wanted = torch.where(sparse("dare", delta, 0.3, name) != 0, delta / 0.3, 0)
        assert torch.equal(vector.itm - vector.base, wanted)


def test_density_one_is_the_plain_merge(make_recipe, tmp_path):
    merge(make_recipe(), tmp_path / "plain")
    merge(make_recipe(sparsify={"method": "magnitude", "density": 1}), tmp_path / "whole")
    one, other = read_all(tmp_path / "plain"), read_all(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["rain", "task_arithmetic"])
def test_lambda_by_layer_and_name(trio, sets, tmp_path, method):
    """Each tensor is the scalar recipe's with its own λ; λ = 0 leaves the LRM's bytes."""
    zero = [{"filter": "v_proj", "value": [0, 0, 1]}, {"filter": "o_proj", "value": 0}, *BY_NAME]
    text = recipe_text(trio, sets if method == "rain" else None, merge_method=method, **{"lambda": zero})
    report = merge(parse_recipe(text, "test.yml"), tmp_path / "out")
    merged, lrm = read_all(tmp_path / "out"), read_all(trio["lrm"])
    assert len(report["per_tensor"]) == 21 - 2 - 3
    assert any("lambda is 0 for 5 tensors" in w for w in report["warnings"])
    assert report["tensors"]["merged"] == 16
    scalars = {}
    for value in {told["lambda"] for told in report["per_tensor"].values()}:
        text = recipe_text(trio, sets if method == "rain" else None, merge_method=method, **{"lambda": value})
        merge(parse_recipe(text, "test.yml"), tmp_path / f"{value}")
        scalars[value] = read_all(tmp_path / f"{value}")
    assert sorted(scalars) == [0.25, 0.5, 0.7, 1.0, 1.5]
    for name, told in report["per_tensor"].items():
        wanted = 1.0 if "v_proj" in name else lam_of(name)
        assert told["lambda"] == pytest.approx(wanted)
        if method == "task_arithmetic":
            assert told["applied"] == pytest.approx(wanted * told["delta"])
        assert torch.equal(merged[name], scalars[told["lambda"]][name]), name
    assert all(torch.equal(merged[n], lrm[n]) for n in lrm if n not in report["per_tensor"])


def test_plan_tells_every_lambda(trio, sets, tmp_path, capsys):
    (tmp_path / "r.yml").write_text(recipe_text(
        trio, sets, sparsify={"method": "dare", "density": [0.2, 0.4]},
        **{"lambda": [{"filter": "mpl", "value": 3}, *BY_NAME]}))  # fmt: skip
    assert main(["plan", str(tmp_path / "r.yml"), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    for name, facts in told["per_tensor"].items():
        assert ("lambda" in facts) == (facts["action"] == "merged")
        if "lambda" in facts:
            assert facts["lambda"] == pytest.approx(lam_of(name))
            assert facts["density"] == pytest.approx([0.2, 0.3, 0.4][facts["layer"]])
    groups = {g["module"]: g for g in told["groups"] if "module" in g}
    assert groups["up"]["lambda"] == [0.5, 1.0, 1.5] and groups["q"]["lambda"] == [0.7, 0.7, 0.25]
    assert "lambda: the filter 'mpl' decides for no tensor that may be merged" in told["warnings"]
    assert main(["plan", str(tmp_path / "r.yml")]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "λ of gate, up, down: by layer 0.5 1 1.5" in text and "λ of q, k, v, o: by layer 0.7 0.7 0.25" in text
    assert "density of q, k, v, o, gate, up, down: by layer 0.2 0.3 0.4" in text


def test_the_flag_replaces_it_by_a_scalar(trio, tmp_path):
    text = recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": BY_NAME})
    (tmp_path / "r.yml").write_text(text)
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--lambda", "0.5", "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "streammerge_report.json").read_text())
    assert {told["lambda"] for told in report["per_tensor"].values()} == {0.5}


def test_all_zero_is_nothing(trio, tmp_path):
    with pytest.raises(UnchangedError):
        merge(plain_recipe(trio, **{"lambda": [{"filter": "mlp", "value": [0, 0]}, {"value": 0}]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "lambda: []": "lambda is []; wanted a finite number, or a list that is not empty",
    "lambda: [{value: []}]": "or a list that is not empty",
    "lambda: [1, {value: 2}]": "wanted a value, a list of values (a gradient over the layers), or {filter: TEXT",
    "lambda: {filters: mlp, value: 1}": "found: unknown key 'filters'",
    "lambda: {filter: mlp}": "found: no value",
    "lambda: [true, 1]": "wanted a finite number",
    "sparsify: {method: dare, density: 0}": "sparsify.density is 0; wanted a number above 0, up to 1",
    "sparsify: {method: dare, density: [0.5, 1.5]}": "wanted a number above 0, up to 1",
    "sparsify: {method: ties}": "wanted one of none, magnitude, dare",
    "sparsify: {density: 0.5}": "have no effect with method: none",
    "sparsify: {method: magnitude, rescale: false}": "magnitude, which never rescales",
}


@pytest.mark.parametrize("key", MISTAKES)
def test_mistakes(trio, key):
    with pytest.raises(RecipeError) as error:
        parse_recipe(recipe_text(trio, None, merge_method="task_arithmetic") + key + "\n", "r.yml")
    assert MISTAKES[key] in str(error.value) and "r.yml" in str(error.value)


def test_damage_is_told_though_it_may_be_dropped(trio, tmp_path):
    """An infinite weight of the ITM is an error, whatever S would do to it."""
    broken, name = tmp_path / "itm", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(trio["itm"], broken)
    file = open_checkpoint(broken, "itm").tensors[name].file
    tensors = load_file(file)
    tensors[name].view(-1)[5] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    for method in ("magnitude", "dare"):
        recipe = plain_recipe({**trio, "itm": broken}, sparsify={"method": method, "density": 0.01})
        with pytest.raises(InputError, match="instruct_model: model.layers.1.mlp.up_proj.weight"):
            merge(recipe, tmp_path / method)
