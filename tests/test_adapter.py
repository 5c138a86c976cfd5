"""LoRA adapters as ITM: peft's own file and peft's own merge of it (tests/adapter/make.py), float64, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import recipe_text
from safetensors.torch import load_file, save_file
from test_compose_recipes import FIXED, bases_of, sparse
from test_hub import cache, hub  # noqa: F401
from test_sweep import read_all

from streammerge import merge, parse_recipe
from streammerge.adapter import open_adapter
from streammerge.cli import main
from streammerge.errors import InputError, RecipeError, UnchangedError
from streammerge.planned import make_plan
from streammerge.task_vector import task_vector

PEFT = Path(__file__).parent / "adapter"
TOUCHED = [f"model.layers.{i}.{m}.weight" for i in (0, 2) for m in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.fixture()
def adapter(tmp_path):
    """A private copy of peft's adapter."""
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(PEFT / name, tmp_path / "adapter")
    return tmp_path / "adapter"


def text_of(trio, sets, adapter, **extra) -> str:
    """A recipe with the adapter as ITM and no base."""
    data = yaml.safe_load(recipe_text(trio, sets, **extra)) | {"instruct_model": str(adapter)}
    del data["base_model"]
    return yaml.safe_dump(data, allow_unicode=True)


def recipe_of(trio, sets, adapter, **extra):
    return parse_recipe(text_of(trio, sets, adapter, **extra), "r.yml")


def configure(adapter: Path, **changes) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def retouch(adapter: Path, change) -> None:
    """Save the adapter's tensors as `change` returns them."""
    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_delta_is_pefts(trio, adapter, dtype):
    """s·B·A in fp32 from the factors as they are stored: with patterns and rsLoRA, as peft merges them."""
    deltas = load_file(PEFT / "delta.safetensors")
    retouch(adapter, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    plan = make_plan(recipe_of(trio, None, adapter, merge_method="task_arithmetic"))
    assert sorted(plan.merged) == sorted(deltas) == TOUCHED
    for name, delta in deltas.items():
        read = [checkpoint.read(key) for checkpoint, key in plan.sources(name)]
        vector = task_vector(plan, name, read)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert vector.itm.dtype == wide and not vector.base.any() and vector.base.shape == delta.shape
        exact = plan.adapter.factors[name.removesuffix(".weight")].scale * (read[1].double() @ read[0].double())
        assert float((vector.itm.double() - exact).norm() / exact.norm()) < (1e-15 if wide == torch.float64 else 2e-7)
        rounding = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-7)
        assert float((exact - delta.double()).norm() / exact.norm()) < rounding


def test_task_arithmetic_is_pefts_merge(trio, adapter, tmp_path):
    """θ_R + λ s B A where the adapter is, the LRM's bytes elsewhere; and what is told of it."""
    recipe = recipe_of(trio, None, adapter, merge_method="task_arithmetic", **{"lambda": 0.5})
    report = merge(recipe, tmp_path / "out")
    lrm, merged, deltas = read_all(trio["lrm"]), read_all(tmp_path / "out"), load_file(PEFT / "delta.safetensors")
    for name, before in lrm.items():
        if name in deltas:
            torch.testing.assert_close(merged[name], before + 0.5 * deltas[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(merged[name], before)
        else:
            assert torch.equal(merged[name], before)
    assert report["tensors"] == {"merged": 4, "copied": len(lrm) - 4} and sorted(report["per_tensor"]) == TOUCHED
    told = next(w for w in report["warnings"] if "is an adapter" in w)
    assert "4 of the 21 tensors that may be merged" in told and "byte for byte" in told
    assert set(report["models"]) == {"reasoning_model", "instruct_model"}
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("rule", ["none", "magnitude"])
def test_rain_is_its_formula(trio, sets, adapter, tmp_path, rule):
    """W_R + λ S(s B A)(I − U Uᵀ) in float64; the null space is kept, and only the sites that it needs have bases."""
    extra = {} if rule == "none" else {"sparsify": {"method": rule, "density": 0.4}}
    recipe = recipe_of(trio, sets, adapter, **FIXED, **extra, **{"lambda": 0.8})
    report = merge(recipe, tmp_path / "out", artifacts=tmp_path / "kept")
    lrm, merged, deltas = read_all(trio["lrm"]), read_all(tmp_path / "out"), load_file(PEFT / "delta.safetensors")
    assert sorted(report["per_tensor"]) == TOUCHED
    for name, told in report["per_tensor"].items():
        module = "q" if "q_proj" in name else "down"
        (u,) = bases_of(tmp_path / "kept", int(name.split(".")[2]), module)
        delta = deltas[name].double() if rule == "none" else sparse(rule, deltas[name], 0.4, name)
        wanted = lrm[name].double() + 0.8 * (delta - (delta @ u) @ u.T)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
        assert told["leak"] <= 1e-5 and told["inside"] > 0
    assert all(torch.equal(merged[n], lrm[n]) for n in lrm if n not in TOUCHED)


def test_whole_rain_with_probe(trio, sets, adapter, tmp_path):
    """Both stages in one pass: the factors are read once and merged twice."""
    report = merge(recipe_of(trio, sets, adapter, coefficients={"scope": "layer"}), tmp_path / "out")
    assert report["l_think"]["predecessor"] > 0 and report["alpha"]["min"] < report["alpha"]["max"]
    assert max(told["leak"] for told in report["per_tensor"].values()) <= 1e-5


def test_plan_and_budget(trio, sets, adapter, tmp_path, capsys):
    (tmp_path / "r.yml").write_text(text_of(trio, sets, adapter))
    assert main(["plan", str(tmp_path / "r.yml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(n for n, facts in told["per_tensor"].items() if facts["action"] == "merged") == TOUCHED
    assert told["plan"]["host"]["task vectors"] == 4 * 48 * 96


def test_modules_outside_of_the_recipe_are_told(trio, adapter, tmp_path):
    recipe = recipe_of(trio, None, adapter, merge_method="task_arithmetic", modules=["q", "k"], layers="0-1")
    report = merge(recipe, tmp_path / "out")
    assert list(report["per_tensor"]) == ["model.layers.0.self_attn.q_proj.weight"]
    assert any(w.startswith("3 of the adapter's modules are outside of modules and layers") for w in report["warnings"])


def test_nothing_to_merge(trio, adapter):
    recipe = recipe_of(trio, None, adapter, merge_method="task_arithmetic", modules=["v"])
    with pytest.raises(InputError, match="adapts none of the modules and layers that are merged"):
        make_plan(recipe)


def test_an_untrained_adapter(trio, adapter, tmp_path):
    retouch(adapter, lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    with pytest.raises(UnchangedError, match="was not trained"):
        merge(recipe_of(trio, None, adapter, merge_method="task_arithmetic"), tmp_path / "out")


def test_not_finite(trio, adapter, tmp_path):
    def spoil(tensors):
        next(t for n, t in tensors.items() if "lora_A" in n)[0, 0] = float("nan")
        return tensors

    retouch(adapter, spoil)
    with pytest.raises(InputError, match=r"instruct_model: base_model\.model\.model\.layers\.0.*lora_A"):
        merge(recipe_of(trio, None, adapter, merge_method="task_arithmetic"), tmp_path / "out")


def test_a_base_is_refused(trio, adapter):
    text = text_of(trio, None, adapter, merge_method="task_arithmetic")
    for more in (f"base_model: {trio['base']}\n", "proxy_base: true\n"):
        with pytest.raises(InputError, match="is an adapter, whose task vector needs no base: drop base_model"):
            make_plan(parse_recipe(text + more, "r.yml"))
    without = recipe_text(trio, None, merge_method="task_arithmetic").replace(f"base_model: {trio['base']}\n", "")
    with pytest.raises(RecipeError, match="give base_model, or proxy_base: true"):
        parse_recipe(without, "r.yml")


def test_from_the_hub_cache(trio, adapter, cache, tmp_path):  # noqa: F811
    hub(cache, "me/adapter", "0" * 40, {p.name: p for p in adapter.iterdir()})
    recipe = recipe_of(trio, None, "me/adapter", merge_method="task_arithmetic")
    assert sorted(merge(recipe, tmp_path / "out")["per_tensor"]) == TOUCHED


CONFIGS = {  # what peft would do with it is no plain s·B·A
    "DoRA": ({"use_dora": True}, "use_dora is True: DoRA scales the rows"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only': trained biases would be left out"),
    "B's bias": ({"lora_bias": True}, "lora_bias is True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    "token rows": ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]: trained token embeddings"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': it may have"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is [1]"),
    "a new key": ({"use_warp": {"speed": 9}}, "use_warp is {'speed': 9}: this version does not know"),
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; wanted LORA"),
    "no rank": ({"r": None}, "r is None; wanted a number above 0"),
    "alpha": ({"lora_alpha": "16"}, "lora_alpha is '16'; wanted a number above 0"),
    "a pattern": ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern: '(a+)+b' is no simple pattern"),
    "a pattern's value": ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: 'q_proj' is -1; wanted a number"),
    "another rank": ({"r": 8}, "by adapter_config.json the rank is 8"),
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj."
TENSORS = {
    "DoRA's": ({Q0 + "lora_magnitude_vector": (48,)}, "lora_magnitude_vector: DoRA"),
    "an embedding's": ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 400)}, "an adapted embedding"),
    "a whole one": ({"base_model.model.lm_head.weight": (400, 48)}, "lm_head.weight: a whole tensor"),
    "a bias": ({Q0 + "bias": (48,)}, "q_proj.bias: a trained bias"),
    "a half": ({Q0.replace("q_", "k_") + "lora_A.weight": (4, 48)}, "k_proj.lora_B.weight is missing"),
    "an adapter's name": ({Q0 + "lora_A.default.weight": (3, 48)}, "not a name that peft saves"),
    "no prefix": ({"layers.0.q_proj.lora_A.weight": (3, 48)}, "layers.0.q_proj.lora_A.weight: not a name"),
    "a vector": ({Q0 + "lora_A.weight": (3,)}, "q_proj.lora_A.weight is F32 [3]; wanted a float matrix"),
    "another width": ({Q0 + "lora_A.weight": (3, 40)}, "q_proj: Δ = B·A is [48, 40]; the LRM's weight is [48, 48]"),
    "a head's": ({"base_model.model.lm_head.lora_A.weight": (4, 48),
                  "base_model.model.lm_head.lora_B.weight": (400, 4)},
                 "lm_head is adapted, and is no linear module of a decoder layer"),
    "another layer's": ({Q0.replace("0", "7") + "lora_A.weight": (4, 48),
                         Q0.replace("0", "7") + "lora_B.weight": (48, 4)},
                        "model.layers.7.self_attn.q_proj is adapted, and is no linear module"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*CONFIGS, *TENSORS])
def test_what_is_no_plain_lora_is_refused_by_name(trio, adapter, case):
    changes, wanted = (CONFIGS | TENSORS)[case]
    if case in CONFIGS:
        configure(adapter, **changes)
    else:
        retouch(adapter, lambda tensors: tensors | {name: torch.ones(shape) for name, shape in changes.items()})
    with pytest.raises(InputError) as error:
        make_plan(recipe_of(trio, None, adapter, merge_method="task_arithmetic"))
    assert wanted in str(error.value) and len(str(error.value).splitlines()) < 8
    assert "Traceback" not in str(error.value)


def test_all_that_is_wrong_at_once(adapter):
    configure(adapter, use_dora=True, bias="all")
    retouch(adapter, lambda tensors: tensors)
    with pytest.raises(InputError) as error:
        open_adapter(adapter, "instruct_model")
    assert "use_dora" in str(error.value) and "bias is 'all'" in str(error.value)


def test_files(trio, adapter):
    """Pickles, cut files, broken JSON, and a folder that is a model, too."""
    model, weights = adapter / "model.safetensors", adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    model.write_bytes(whole)
    with pytest.raises(InputError, match="the model or the adapter"):
        open_adapter(adapter, "instruct_model")
    model.unlink()
    weights.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        open_adapter(adapter, "instruct_model")
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin: is a pickle"):
        open_adapter(adapter, "instruct_model")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json: is not valid JSON"):
        open_adapter(adapter, "instruct_model")


def test_bases_of_fewer_modules_are_not_reused(trio, sets, adapter, make_recipe, tmp_path):
    """An adapter's merge leaves bases of its own sites alone: another λ takes them, another ITM does not."""
    reused = [merge(recipe, tmp_path / str(n), artifacts=tmp_path / "kept")["artifacts"]["reused"] for n, recipe in
              enumerate([recipe_of(trio, sets, adapter, **FIXED), make_recipe(**FIXED),
                         recipe_of(trio, sets, adapter, **FIXED, **{"lambda": 0.5})])]  # fmt: skip
    assert reused == [[], [], ["bases"]]
