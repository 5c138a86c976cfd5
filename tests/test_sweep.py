"""The single sweep against the stage-by-stage form: the same bases, α and weights, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from builders import recipe_text
from reference_rain import stage_by_stage
from safetensors import safe_open

from streammerge import merge, parse_recipe, pipeline
from streammerge.estimate import predict
from streammerge.pipeline import calibrate
from streammerge.planned import make_plan
from streammerge.progress import Progress

VARIANTS = {
    "layer scope": {"coefficients": {"scope": "layer"}},
    "model scope": {"coefficients": {"scope": "model"}},
    "exact, narrow": {
        "basis": {"rank": "exact"}, "coefficients": {"scope": "layer"},
        "thinking": {"random": 0, "attended_values": False},
    },
    "randomized, λ 0.7": {"basis": {"rank": "fixed", "size": 5, "method": "randomized"}, "lambda": 0.7},
    "covariance": {"basis": {"method": "covariance"}, "coefficients": {"rows": "token", "rho": 0.5, "scope": "layer"}},
}


def read_all(out: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return tensors


def with_workers(monkeypatch, count: int) -> None:
    """Merges carry `count` batches side by side."""
    plain = pipeline.predict

    def predict(*args):
        found = plain(*args)
        return dataclasses.replace(found, choice=dataclasses.replace(found.choice, workers=count))

    monkeypatch.setattr(pipeline, "predict", predict)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bit_equal_to_stage_by_stage(make_recipe, tmp_path, variant, workers, one_thread, monkeypatch):
    """Whatever the number of batches that pass side by side, the read-ahead and the order in which they finish."""
    with_workers(monkeypatch, workers)
    recipe = make_recipe(**VARIANTS[variant])
    report = merge(recipe, tmp_path / "out")
    plan = make_plan(recipe)
    data = calibrate(plan, Progress("quiet"))
    tokens = predict(plan, data, torch.device("cpu"), torch.float32).tokens_per_batch
    bases, alpha, wanted = stage_by_stage(plan, data, tokens)
    written = read_all(tmp_path / "out")
    for name, tensor in wanted.items():
        assert torch.equal(written[name], tensor), name
    heads = [[round(v, 6) for v in a.heads.tolist()] for a in alpha]
    assert report["alpha"]["heads"] == heads
    for name, job in plan.merged.items():
        widest = max(b.u.shape[1] for b in bases[job.layer].of(job.module))
        assert report["per_tensor"][name]["rank"] == widest > 0


def test_every_family_merges_and_loads_in_transformers(any_trio, sets, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family, paths = any_trio
    out = tmp_path / "out"
    report = merge(parse_recipe(recipe_text(paths, sets), "test.yml"), out)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], family
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<think>", return_tensors="pt", add_special_tokens=False).input_ids
    assert torch.isfinite(model(ids).logits).all()
    lrm = read_all(paths["lrm"])
    merged = read_all(out)
    assert lrm.keys() == merged.keys()
    changed = {n for n in lrm if not torch.equal(lrm[n], merged[n])}
    assert changed == {n for n in lrm if n.split(".")[-2].endswith("_proj") and n.endswith(".weight")}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (paths["lrm"] / name).read_bytes()
    assert json.loads((out / "streammerge_report.json").read_text())["verified"] == report["verified"]


def test_null_space_holds_for_every_module(make_recipe, tmp_path):
    """‖Δ⊥ U‖ <= 1e-5 ‖Δ U‖ in fp32 before the cast, for every module, with per-head α (method.md, section 2)."""
    report = merge(make_recipe(), tmp_path / "out")
    assert {m["module"] for m in report["modules"]} == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, told in report["per_tensor"].items():
        assert told["inside"] > 0 and told["leak"] <= 1e-5, name


def test_l_think_equals_the_resident_models(make_recipe, trio, tmp_path):
    """The streamed L_think against logits of two resident transformers models."""
    from transformers import AutoModelForCausalLM

    recipe = make_recipe(calibration={"holdout": 0.4})
    report = merge(recipe, tmp_path / "out")
    data = calibrate(make_plan(recipe), Progress("quiet"))
    assert len(data.heldout) == report["calibration"]["heldout"] >= 4
    sums = {"opener": [], "predecessor": [], "closer": []}
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (trio["lrm"], tmp_path / "out")]
    for sample in data.heldout:
        with torch.no_grad():
            log_r, log_m = (m(torch.tensor([sample.ids])).logits[0].double().log_softmax(-1) for m in models)
        kl = (log_r.exp() * (log_r - log_m)).sum(-1)
        for name, values in sums.items():
            values.append(float(kl[getattr(sample, name)]))
    for name, values in sums.items():
        assert report["l_think"][name] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-9)
        assert report["l_think"][name] > 0


def test_same_bytes_twice(make_recipe, tmp_path):
    for n in (0, 1):
        merge(make_recipe(), tmp_path / str(n))
    files = sorted(f.name for f in (tmp_path / "0").glob("*.safetensors*"))
    assert files
    for name in files:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_subset_of_layers_and_modules(make_recipe, trio, tmp_path):
    report = merge(make_recipe(layers="1", modules=["q", "down"]), tmp_path / "out")
    assert sorted(report["per_tensor"]) == [
        "model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight",
    ]  # fmt: skip
    lrm, merged = read_all(trio["lrm"]), read_all(tmp_path / "out")
    assert {n for n in lrm if not torch.equal(lrm[n], merged[n])} == set(report["per_tensor"])


def test_task_arithmetic_is_the_formula(trio, tmp_path):
    """θ_R + λ (θ_I − θ_B) on the linear modules, with no calibration at all."""
    text = recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": 0.3})
    report = merge(parse_recipe(text, "test.yml"), tmp_path / "out")
    lrm, itm, base, merged = (read_all(p) for p in (trio["lrm"], trio["itm"], trio["base"], tmp_path / "out"))
    assert report["calibration"]["heldout"] == 0 and len(report["per_tensor"]) == 21
    for name in lrm:
        wanted = lrm[name] + (0.3 * (itm[name] - base[name]) if name in report["per_tensor"] else 0)
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-7)


def test_unmeasured_l_think_is_said(trio, tmp_path):
    text = recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": 0.3})
    report = merge(parse_recipe(text, "test.yml"), tmp_path / "out")
    assert report["l_think"] == {} and any("L_think was not measured" in w for w in report["warnings"])


def test_bases_only_where_something_is_merged(make_recipe, tmp_path, monkeypatch):
    """A merge of one module of one layer needs the bases of one site."""
    from streammerge import sweep

    built, plain = [], sweep.build_bases

    def noting(capture, *rest):
        built.append(set(capture.sites))
        return plain(capture, *rest)

    monkeypatch.setattr(sweep, "build_bases", noting)
    merge(make_recipe(layers="1", modules=["down"]), tmp_path / "out")
    assert built == [set(), {"mlp_mid"}, set()]


def test_proxy_base(make_recipe, trio, sets, tmp_path):
    """Without a published base the LRM stands in for it: Δ = θ_I − θ_R, and λ = 1 with no basis gives the ITM."""
    import dataclasses

    recipe = dataclasses.replace(
        make_recipe(basis={"rank": "none"}, coefficients={"rule": "uniform"}), base_model="", proxy_base=True
    )
    merge(recipe, tmp_path / "out")
    itm, merged = read_all(trio["itm"]), read_all(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name], itm[name], rtol=1e-6, atol=1e-7)
