"""Checkpoints that a merge must refuse, through the real command line: an exit code, one screen of text that names
everything that is wrong, no traceback, and nothing left behind."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders import make_model, save_trio
from damage import bench  # noqa: F401
from safetensors.torch import load_file, save_file


def test_missing_model_directories_are_all_named(bench):
    bench.models |= {"base": bench.root / "nowhere", "itm": bench.root / "elsewhere"}
    bench.sets["instruction"] = bench.root / "absent.jsonl"
    bench.refused(3, "base_model", bench.root / "nowhere", "instruct_model", bench.root / "elsewhere",
                  "calibration.instruction", bench.root / "absent.jsonl")  # fmt: skip


def test_a_missing_calibration_file(bench):
    bench.sets["reasoning"].unlink()
    bench.refused(3, "calibration.reasoning", bench.sets["reasoning"])


def test_wrong_family(bench):
    for role in bench.models:
        bench.edit_config(role, model_type="gpt2", hidden_size=..., num_attention_heads=...)
    told = bench.refused(3, "gpt2", "qwen3", *(p / "config.json" for p in bench.models.values()))
    assert told.count("model_type is 'gpt2'") == 3


def test_mixed_families(bench, tmp_path_factory):
    other = save_trio(tmp_path_factory.mktemp("q"), "qwen2")
    shutil.rmtree(bench.models["itm"])
    shutil.copytree(other["itm"], bench.models["itm"])
    bench.refused(3, "instruct_model", "model_type is 'qwen2'", "'llama'", bench.models["itm"])


def test_shapes_that_differ(bench):
    for role, sizes in (("itm", {"hidden": 32}), ("base", {"layers": 2, "intermediate_size": 40})):
        shutil.rmtree(bench.models[role])
        make_model("llama", **sizes).save_pretrained(bench.models[role])
    bench.refused(3, "hidden_size is 32", "instruct_model", "num_hidden_layers is 2", "intermediate_size is 40",
                  "base_model", bench.models["base"] / "config.json")  # fmt: skip


def test_shapes_that_differ_from_their_own_config(bench):
    shutil.rmtree(bench.models["base"])
    make_model("llama", intermediate_size=40).save_pretrained(bench.models["base"])
    bench.edit_config("base", intermediate_size=96)
    told = bench.refused(3, "base_model", "model.layers.2.mlp.down_proj.weight", "[48, 40]", "[48, 96]")
    assert told.count("has shape") == 9


@pytest.mark.parametrize("changes, named", [
    ({"vocab_size": 300}, ("model.embed_tokens.weight", "[400, 48]", "[300, 48]")),
    ({"num_hidden_layers": 2}, ("model.layers.2.mlp.down_proj.weight", "no such tensor")),
    ({"tie_word_embeddings": False}, ("lm_head.weight", "no such tensor", "[400, 48]")),
])  # fmt: skip
def test_an_lrm_whose_config_is_anothers(bench, changes, named):
    """Such an output would not load in transformers."""
    for role in bench.models:
        bench.edit_config(role, **changes)
    bench.refused(3, "reasoning_model", bench.models["lrm"], *named)


def test_an_lrm_that_lacks_norms(bench):
    file = bench.models["lrm"] / "model.safetensors"
    model = make_model("llama")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for layer in (0, 2):
        del tensors[f"model.layers.{layer}.input_layernorm.weight"]
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(48)
    for old in bench.models["lrm"].glob("model*"):
        old.unlink()
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "reasoning_model", "model.layers.0.input_layernorm.weight", "layers.2.input_layernorm",
                  "model.layers.1.self_attn.q_proj.bias")  # fmt: skip


@pytest.mark.parametrize("change, key", [
    ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ({"num_attention_heads": 0}, "num_attention_heads is '0'"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"intermediate_size": None}, "intermediate_size is 'None'"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"model_type": ["llama"]}, "model_type is ['llama']"),
    ({"hidden_act": "no_such_activation"}, "no_such_activation"),
    ({"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}}, "no_such_rope"),
])  # fmt: skip
def test_corrupted_config(bench, change, key):
    bench.edit_config("lrm", **change)
    bench.refused(3, key, bench.models["lrm"])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null", b"[" * 5000])
def test_config_that_is_no_json_object(bench, content):
    for role in bench.models:
        (bench.models[role] / "config.json").write_bytes(content)
    bench.refused(3, "config.json", "base_model", "instruct_model", "reasoning_model")


def test_quantized(bench):
    bench.edit_config("itm", quantization_config={"quant_method": "gptq", "bits": 4})
    bench.refused(3, "instruct_model", bench.models["itm"], "gptq", "base_model in its card")


def test_truncated_shards_are_all_named(bench):
    cut = []
    for role in ("base", "lrm"):
        file = sorted(bench.models[role].glob("*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-100])
        cut.append(file)
    bench.refused(3, "base_model", "reasoning_model", *(f.name for f in cut), *(f.parent for f in cut), "download")


def test_three_broken_checkpoints_fit_one_screen(bench):
    for path in bench.models.values():
        for file in path.glob("*.safetensors"):
            file.write_bytes(b"no safetensors")
    bench.refused(3, *bench.models.values(), "model-00001-of-")


def test_nan_in_several_files(bench):
    key = "model.layers.{}.mlp.up_proj.weight"
    files = [bench.edit_tensor("itm", key.format(2), float("nan"))]
    files.append(bench.edit_tensor("base", key.format(1), float("inf")))
    files.append(bench.edit_tensor("lrm", "model.layers.0.input_layernorm.weight", float("nan")))
    bench.refused(3, *files, key.format(2), key.format(1), "input_layernorm", "itm", "base_model")


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_in_an_untouched_tensor(bench, tensor, value):
    file = bench.edit_tensor("lrm", tensor, value)
    bench.refused(3, tensor, file.parent, "reasoning_model")


def test_infinity_in_an_embedding_row_that_is_used(bench):
    file = bench.models["lrm"] / json.loads(
        (bench.models["lrm"] / "model.safetensors.index.json").read_text())["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][:, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "model.embed_tokens.weight", file, "reasoning_model")


def test_activations_that_overflow(bench):
    key = "model.layers.0.input_layernorm.weight"
    file = bench.edit_tensor("lrm", key, 1.0)
    tensors = load_file(file)
    tensors[key] *= 1e7
    save_file(tensors, file, {"format": "pt"})
    bench.refused(3, "compute_dtype", compute_dtype="float16")
