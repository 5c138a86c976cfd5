"""The ten defects of the authors' released code (method.md, section 5): for each a test that fails if we had it."""

from __future__ import annotations

import json
import pickle
import shutil
import weakref
from collections import Counter

import pytest
import torch
from builders import recipe_text
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from streammerge import forward, merge, parse_recipe, run, sweep
from streammerge.attention import AttentionMass
from streammerge.batches import make_batches
from streammerge.capture import FeatureCapture
from streammerge.cli import main
from streammerge.errors import InputError, UnchangedError
from streammerge.forward import Stream, StreamedModel
from streammerge.io.checkpoint import Checkpoint
from streammerge.markers import load_tokenizer
from streammerge.pipeline import calibrate
from streammerge.planned import make_plan
from streammerge.progress import Progress
from streammerge.recipe import MODULES

CPU = torch.device("cpu")
PLAIN = {"basis": {"rank": "none"}}  # no projection: W* − W_R is λ α Δ, to be compared number by number


def read_all(path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return tensors


def moves(trio, out, module: str, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(W* − W_R, W_I − W_B) of one weight, in float64."""
    name = next(n for n in read_all(out) if n.startswith(f"model.layers.{layer}.") and f".{module}_proj.weight" in n)
    lrm, itm, base, merged = (read_all(p)[name].double() for p in (trio["lrm"], trio["itm"], trio["base"], out))
    return merged - lrm, itm - base


def masses_of(recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Alignment and leakage [layers, heads] of the LRM's own attention."""
    plan = make_plan(recipe)
    data = calibrate(plan, Progress("quiet"))
    model = StreamedModel(plan.lrm, plan.family, CPU, torch.float32)
    stream = Stream(make_batches(data.instruction, 512), CPU)
    model.embed(stream)
    found = []
    for layer in range(plan.layers):
        observer = AttentionMass(data.instruction, stream.batches, plan.layout.heads, "predicting")
        weights = {n.removeprefix(f"model.layers.{layer}."): plan.lrm.read(n) for n in plan.layer_tensors(layer)}
        model.advance(layer, weights, stream, observer=observer)
        found.append(observer.result())
    return torch.stack([m.alignment for m in found]), torch.stack([m.leakage for m in found])


# ---- 1: rows and columns of the attention exchanged


def test_defect_1_leakage_counts_and_rows_come_after_columns(make_recipe, tmp_path):
    """With rows I and columns U, causality makes every leakage exactly zero."""
    recipe = make_recipe()
    data = calibrate(make_plan(recipe), Progress("quiet"))
    for sample in data.instruction:
        for one in sample.instructions:
            assert max(one.columns) < min(one.aligned) - 1 and max(one.columns) < min(one.unrelated) - 1
    report = merge(recipe, tmp_path / "out")
    for told in report["attention"].values():
        assert min(told["leakage"]) > 0 and min(told["alignment"]) > 0
    free = merge(make_recipe(coefficients={"rho": 0.0}), tmp_path / "free")
    assert free["alpha"]["heads"] != report["alpha"]["heads"]


# ---- 2: query heads paired with the wrong key/value head


def test_defect_2_kv_heads_take_the_heads_they_serve(make_recipe, trio, tmp_path):
    """4 query heads on 2: kv head 0 serves 0 and 1, not 0 and 2."""
    report = merge(make_recipe(**PLAIN, coefficients={"kappa": 1.0}), tmp_path / "out")
    heads = torch.tensor(report["alpha"]["heads"][1])
    right, wrong = heads.view(2, 2).mean(1), heads.view(2, 2).mean(0)
    assert float((right - wrong).abs().min()) > 0.01, "this trio cannot tell the two apart"
    for module in ("k", "v"):
        moved, delta = moves(trio, tmp_path / "out", module)
        for head, (a, b) in enumerate(zip(moved.chunk(2), delta.chunk(2), strict=True)):
            assert float((a * b).sum() / b.square().sum()) == pytest.approx(float(right[head]), rel=1e-4)
    for module, dim in (("q", 0), ("o", 1)):
        moved, delta = moves(trio, tmp_path / "out", module)
        for head, (a, b) in enumerate(zip(moved.chunk(4, dim), delta.chunk(4, dim), strict=True)):
            assert float((a * b).sum() / b.square().sum()) == pytest.approx(float(heads[head]), rel=1e-4)


# ---- 3: the delta of k and v added once per query head


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_defect_3_every_module_moves_once(make_recipe, trio, tmp_path, lam):
    merge(make_recipe(**PLAIN, coefficients={"rule": "uniform"}, **{"lambda": lam}), tmp_path / "out")
    for module in MODULES:
        moved, delta = moves(trio, tmp_path / "out", module)
        assert float(moved.norm()) == pytest.approx(lam * float(delta.norm()), rel=1e-5), module
        torch.testing.assert_close(moved, lam * delta, rtol=0, atol=1e-6)


# ---- 4: attention without rotary embedding


def test_defect_4_masses_know_the_rotary_embedding(make_recipe, trio, sets, tmp_path):
    turned = {**trio, "lrm": tmp_path / "lrm"}
    shutil.copytree(trio["lrm"], turned["lrm"])
    config = json.loads((turned["lrm"] / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 2.0}
    (turned["lrm"] / "config.json").write_text(json.dumps(config))
    other = masses_of(parse_recipe(recipe_text(turned, sets), "r.yml"))
    for before, after in zip(masses_of(make_recipe()), other, strict=True):
        assert float(((after[0] - before[0]) / before[0]).abs().min()) > 1e-4  # layer 0: nothing else differs there


def test_defect_4_attended_values_equal_eager_attention(make_recipe):
    """A_h[t] X of v_proj's constraints with transformers' own attention weights, in every layer."""
    plan = make_plan(make_recipe())
    data = calibrate(plan, Progress("quiet"))
    samples = data.reasoning[:3]
    batches = make_batches(samples, 512)
    model, stream = StreamedModel(plan.lrm, plan.family, CPU, torch.float32), Stream(batches, CPU)
    model.embed(stream)
    resident = AutoModelForCausalLM.from_pretrained(plan.lrm.path, dtype=torch.float32, attn_implementation="eager")
    inputs: dict[int, torch.Tensor] = {}
    for n, layer in enumerate(resident.model.layers):
        layer.input_layernorm.register_forward_hook(lambda m, a, out, n=n: inputs.__setitem__(n, out[0]))
    for layer in range(plan.layers):
        capture = FeatureCapture(samples, batches, plan.layout, True, lambda width, rows: "rows")
        weights = {n.removeprefix(f"model.layers.{layer}."): plan.lrm.read(n) for n in plan.layer_tensors(layer)}
        model.advance(layer, weights, stream, observer=capture, sites=("attn_in",))
        for kv, features in enumerate(capture.values):
            wanted = []
            for sample in (samples[i] for b in batches for i in b.samples):
                with torch.no_grad():
                    attention = resident(torch.tensor([sample.ids]), output_attentions=True).attentions[layer][0]
                at = list(sample.omega)
                wanted += [inputs[layer][at], *(attention[h, at] @ inputs[layer] for h in (2 * kv, 2 * kv + 1))]
            rows, wanted = torch.cat(features.rows), torch.cat(wanted)
            assert rows.shape == wanted.shape and features.count == len(rows)
            torch.testing.assert_close(rows.T @ rows, wanted.T @ wanted, rtol=1e-4, atol=1e-4)


# ---- 5: hooks that see nothing, and a merge that does nothing reported as success


def test_defect_5_something_is_captured_under_sdpa(make_recipe, tmp_path):
    report = merge(make_recipe(), tmp_path / "out")
    for told in report["attention"].values():
        assert min(told["alignment"]) > 1e-4
    heads = torch.tensor(report["alpha"]["heads"])
    assert float(heads.std()) > 0.05 and float(heads.mean()) == pytest.approx(1.0, abs=0.05)
    assert report["totals"]["applied_over_delta"] > 0.1


def test_defect_5_a_merge_that_does_nothing_is_an_error(make_recipe, trio, sets, tmp_path, capsys):
    with pytest.raises(UnchangedError, match="literal rule"):
        merge(make_recipe(coefficients={"rule": "literal"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = tmp_path / "r.yml"
    recipe.write_text(recipe_text(trio, sets, coefficients={"rule": "literal"}))
    assert main(["merge", str(recipe), str(tmp_path / "out")]) == 6
    assert "changed nothing" in capsys.readouterr().err and not (tmp_path / "out").exists()
    report = merge(make_recipe(coefficients={"rule": "literal"}, allow_unchanged=True), tmp_path / "out")
    assert report["alpha"]["max"] < 0.05 and report["totals"]["applied_over_delta"] < 0.01


# ---- 6: constraints along random directions instead of the feature span


def test_defect_6_nothing_changes_at_the_markers(make_recipe, trio, tmp_path):
    """(W* − W_R) h_t = 0 for every module, layer and t ∈ Ω_think of θ_R's own features, seen by a resident model."""
    recipe = make_recipe(
        basis={"rank": "exact"}, thinking={"random": 0}, calibration={"limit_reasoning": 3, "holdout": 0.0}
    )
    report = merge(recipe, tmp_path / "out")
    data = calibrate(make_plan(recipe), Progress("quiet"))
    assert len(data.reasoning) == 3 and all(len(s.omega) == 4 for s in data.reasoning)
    resident = AutoModelForCausalLM.from_pretrained(trio["lrm"], dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, linear in resident.named_modules():
        if name.endswith("_proj"):
            linear.register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__(n + ".weight", args[0][0]))
    merged, lrm, itm, base = (read_all(p) for p in (tmp_path / "out", trio["lrm"], trio["itm"], trio["base"]))
    for sample in data.reasoning:
        with torch.no_grad():
            resident(torch.tensor([sample.ids]))
        assert len(seen) == 21
        for name, inputs in seen.items():
            rows = inputs[list(sample.omega)].double()
            before = (rows @ (itm[name] - base[name]).double().T).norm()
            left = (rows @ (merged[name].double() - lrm[name].double()).T).norm()
            assert float(left / before) < 1e-4, name
            elsewhere = inputs[:3].double() @ (merged[name].double() - lrm[name].double()).T
            assert float(elsewhere.norm()) > 1e-2, f"{name}: everything is protected, nothing is shown"
    assert min(m["kept_over_delta"] for m in report["modules"]) > 0.2


def test_defect_6_the_first_layer_says_the_same_at_the_markers(make_recipe, trio, tmp_path):
    """θ_R and θ* side by side: the attention of layer 0 is unchanged where it was calibrated, values included."""
    recipe = make_recipe(
        basis={"rank": "exact"}, thinking={"random": 0}, calibration={"limit_reasoning": 3, "holdout": 0.0}
    )
    merge(recipe, tmp_path / "out")
    data = calibrate(make_plan(recipe), Progress("quiet"))
    outputs = []
    for path in (trio["lrm"], tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        found = {}
        for name in ("q_proj", "v_proj"):
            linear = model.model.layers[0].self_attn.get_submodule(name)
            linear.register_forward_hook(lambda m, args, out, n=name, f=found: f.setdefault(n, []).append(out[0]))
        with torch.no_grad():
            for sample in data.reasoning:
                model(torch.tensor([sample.ids]))
        outputs.append(found)
    for name, ours in outputs[0].items():
        for sample, a, b in zip(data.reasoning, ours, outputs[1][name], strict=True):
            at = list(sample.omega)
            assert float((a[at] - b[at]).norm() / a[at].norm()) < 1e-5
            assert float((a - b).norm() / a.norm()) > 1e-2


# ---- 7: a forward of the whole model for every layer and sample


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_defect_7_every_token_passes_every_layer_once(make_recipe, tmp_path, monkeypatch, scope):
    passed: Counter = Counter()
    plain = StreamedModel.advance

    def counting(self, layer, weights, stream, *args, **kwargs):
        passed[layer, id(stream)] += 1
        return plain(self, layer, weights, stream, *args, **kwargs)

    tokens: Counter = Counter()
    call = forward.functional_call

    def weighing(module, weights, args, *rest, **kwargs):
        if hasattr(module, "self_attn"):
            tokens[module.self_attn.layer_idx] += args[0].shape[0] * args[0].shape[1]
        return call(module, weights, args, *rest, **kwargs)

    monkeypatch.setattr(StreamedModel, "advance", counting)
    monkeypatch.setattr(forward, "functional_call", weighing)
    opened = []
    streams = run.Streams.open
    monkeypatch.setattr(run.Streams, "open", staticmethod(
        lambda *a, **k: opened.append(streams(*a, **k)) or opened[-1]))  # fmt: skip
    merge(make_recipe(coefficients={"scope": scope}), tmp_path / "out")
    four = opened[0].all()
    assert len(opened) == 1 and len(four) == 4
    assert passed == {(layer, id(stream)): 1 for layer in range(3) for stream in four}
    once = sum(batch.ids.numel() for stream in four for batch in stream.batches)
    assert tokens == {0: once, 1: once, 2: once}


# ---- 8: everything in memory at once, pickles between the stages


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_defect_8_one_layer_in_hand_and_no_pickles(make_recipe, tmp_path, monkeypatch, scope):
    order: list[tuple[str, int]] = []
    alive: dict[int, weakref.ref] = {}
    most = 0
    plain = Checkpoint.read

    def reading(self, name):
        nonlocal most
        tensor = plain(self, name)
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            order.append((self.role, layer))
            alive[len(alive)] = (layer, weakref.ref(tensor))
            most = max(most, len({n for n, ref in alive.values() if ref() is not None}))
        return tensor

    def no_pickle(*args, **kwargs):
        raise AssertionError("a pickle is written")

    monkeypatch.setattr(Checkpoint, "read", reading)
    monkeypatch.setattr(torch, "save", no_pickle)
    monkeypatch.setattr(pickle, "dump", no_pickle)
    merge(make_recipe(coefficients={"scope": scope}), tmp_path / "out")
    layers = [layer for _, layer in order]
    passes = [layers] if scope == "layer" else [layers[: layers.index(2) + 9], layers[layers.index(2) + 9 :]]
    assert all(p == sorted(p) and set(p) == {0, 1, 2} for p in passes), "layers come one after the other"
    assert Counter(order) == {("reasoning_model", n): 9 * len(passes) for n in range(3)} | {
        (role, n): 7 for role in ("instruct_model", "base_model") for n in range(3)
    }
    assert most <= 2, f"weights of {most} layers were held at once: one in hand, one read ahead"
    assert {f.suffix for f in (tmp_path / "out").rglob("*")} <= {".json", ".safetensors", ".jinja", ".md", ".yml", ""}


# ---- 9: Stage 2 measures a model without the delta of down_proj


def test_defect_9_stage_2_measures_every_module(make_recipe, tmp_path, monkeypatch):
    composed: Counter = Counter()
    plain = sweep.compose
    monkeypatch.setattr(sweep, "compose", lambda module, *a: composed.update([module]) or plain(module, *a))
    layer_scope = {"coefficients": {"scope": "layer"}}  # measures the probe; model scope measures the LRM alone
    whole = merge(make_recipe(**layer_scope), tmp_path / "whole")["attention"]
    assert composed == dict.fromkeys(MODULES, 2 * 3), "once for the probe, once to be written, in each layer"
    for left_out in ("down", "up", "o"):
        modules = [m for m in MODULES if m != left_out]
        without = merge(make_recipe(modules=modules, **layer_scope), tmp_path / left_out)["attention"]
        assert without["0"] == whole["0"], "layer 0's attention comes before its FFN and output"
        for layer in ("1", "2"):
            gap = torch.tensor(without[layer]["alignment"]) - torch.tensor(whole[layer]["alignment"])
            assert float(gap.abs().max()) > 1e-6, f"{left_out} is not in the model that Stage 2 measures"


# ---- 10: samples dropped silently, spans matched on another tokenisation


def test_defect_10_long_samples_are_listed_or_counted(make_recipe, tmp_path):
    lengths = calibrate(make_plan(make_recipe()), Progress("quiet"))
    samples = {s.sample_id: len(s.ids) for s in (*lengths.reasoning, *lengths.heldout)}
    limit = sorted(samples.values())[6]
    long = {name for name, n in samples.items() if n > limit}
    asked = {"limit_instruction": 1, "max_tokens": limit}
    with pytest.raises(InputError) as caught:
        calibrate(make_plan(make_recipe(calibration=asked)), Progress("quiet"))
    assert 0 < len(long) < 12 and all(f"sample {name}: {samples[name]} tokens" in str(caught.value) for name in long)
    dropped = {"max_tokens": limit, "on_long": "drop", "instruction": ""}  # instruction samples are longer: without
    recipe = make_recipe(calibration=dropped, coefficients={"rule": "uniform"})
    report = merge(recipe, tmp_path / "out")
    told = report["calibration"]["reasoning"]
    assert {one["id"] for one in told["dropped_long"]} == long
    assert told["used"] + report["calibration"]["heldout"] + len(long) == told["samples"] == 12


def test_defect_10_spans_lie_on_the_ids_that_are_run(make_recipe, trio, sets, monkeypatch, tmp_path):
    run = []
    plain = StreamedModel.embed
    monkeypatch.setattr(StreamedModel, "embed", lambda self, stream: run.append(stream) or plain(self, stream))
    recipe = make_recipe()
    merge(recipe, tmp_path / "out")
    data = calibrate(make_plan(recipe), Progress("quiet"))
    instruction = next(s for s in run if len([i for b in s.batches for i in b.samples]) == len(data.instruction))
    ids = {i: b.ids[row, : b.lengths[row]].tolist() for b in instruction.batches for row, i in enumerate(b.samples)}
    tokenizer = load_tokenizer(trio["lrm"])
    records = [json.loads(line) for line in sets["instruction"].read_text().splitlines()]
    assert len(data.instruction) == len(records) == len(ids)
    for n, (sample, record) in enumerate(zip(data.instruction, records, strict=True)):
        for one, spans in zip(sample.instructions, record["related_prompt_list"], strict=True):
            for positions, texts in ((one.columns, spans["prompt_spans"]), (one.aligned, spans["response_spans"]),
                                     (one.unrelated, record["unrelated_response_spans"])):  # fmt: skip
                read = tokenizer.decode([ids[n][t] for t in positions])
                assert texts[0] in read and len(read) < len(texts[0]) + 12, (read, texts)
