"""A merge once more in nf4 or int8: what transformers itself would have saved, bit for bit, and loaded by it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import make_model, recipe_text, save_tokenizer, save_trio
from safetensors.torch import load_file, save_file

from streammerge import also, parse_recipe
from streammerge.cli import main
from streammerge.errors import InputError, RecipeError, ResourceError
from streammerge.merging import merge

FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes():
    pytest.importorskip("bitsandbytes")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[k].dtype and t.shape == b[k].shape and torch.equal(t.view(torch.uint8), b[k].view(torch.uint8))
        for k, t in a.items()
    )


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


@pytest.fixture(scope="module")
def trio64(tmp_path_factory):
    """A bf16 Llama trio with tied embeddings; rows are whole blocks, which bitsandbytes' CPU kernel needs (see
    test_encoded.py)."""
    return save_trio(tmp_path_factory.mktemp("trio64"), "llama", dtype=torch.bfloat16, hidden=64)


def recipe(trio):
    return parse_recipe(recipe_text(trio, None, merge_method="task_arithmetic"), "r.yml")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family, hidden, dtype", [
    ("llama", 64, torch.bfloat16), ("qwen2", 40, torch.bfloat16), ("qwen3", 48, torch.float32),
    ("mistral", 48, torch.float16),
])  # fmt: skip
def test_what_transformers_itself_saves(tmp_path, monkeypatch, family, hidden, dtype, form):
    """Tied and untied heads, biases, q/k norms, rows and tensors that are no whole blocks; by small pieces on three
    threads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = tmp_path / "full"
    make_model(family, hidden=hidden, dtype=dtype).save_pretrained(source, max_shard_size="60KB")
    told = FORMS[form] | ({"bnb_4bit_compute_dtype": dtype} if form == "nf4" else {})
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**told), dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(also, "_PIECE", 1 << 9)
    found = also.quantize(source, tmp_path / "ours", form, shard_size="40KB", threads=3)
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    assert found["quantized"] == 21 and (tmp_path / "ours" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_it_as_it_is(trio64, tmp_path, form):
    """No missing and no unexpected keys; it generates; its weights are bitsandbytes' own of OUT's, bit for bit."""
    import bitsandbytes.functional as library
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = merge(recipe(trio64), tmp_path / "out", also=(form,))
    path = tmp_path / f"out-{form}"
    assert report["also"][form]["path"] == str(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    full = weights(tmp_path / "out")
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        weight = full[f"{name}.weight"]
        if form == "nf4":
            wanted = library.dequantize_4bit(*library.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
            found = library.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            wanted = library.int8_vectorwise_dequant(*library.int8_vectorwise_quant(weight.half())[:2])
            found = library.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    assert torch.equal(model.get_input_embeddings().weight, full["model.embed_tokens.weight"])
    # last: a forward on the CPU packs the weights anew
    ids = AutoTokenizer.from_pretrained(path)("the sum of two", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids.shape[1] + 4


def files(path: Path) -> dict[str, bytes]:
    unequal = ("streammerge_report.json",)
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name not in unequal}


def test_the_command_line(trio64, tmp_path, capsys, monkeypatch):
    """OUT is what it is without --also; the copies have every side file, a card, and checksums that hold."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    file = tmp_path / "r.yml"
    file.write_text(recipe_text(trio64, None, merge_method="task_arithmetic"))
    assert main(["merge", str(file), str(tmp_path / "a" / "out"), "--also", "nf4,int8", "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["also"]
    assert main(["merge", str(file), str(tmp_path / "b" / "out"), "--quiet"]) == 0
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["out", "out-int8", "out-nf4"]
    for form, tag in (("nf4", "4-bit"), ("int8", "8-bit")):
        path = tmp_path / "a" / f"out-{form}"
        assert told[form]["path"] == str(path)
        assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=path).returncode == 0
        listed = {line.split("  ")[1] for line in (path / "SHA256SUMS").read_text().splitlines()}
        assert listed == {p.name for p in path.iterdir()} - {"SHA256SUMS"}
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= listed
        assert not {"streammerge_manifest.json", "streammerge_report.json"} & listed
        head = yaml.safe_load((path / "README.md").read_text().split("---\n")[1])
        assert tag in head["tags"] and "merge" in head["tags"] and head["base_model_relation"] == "merge"
    again = tmp_path / "again"
    assert main(["quantize", str(tmp_path / "a" / "out"), str(again), "--to", "nf4", "--quiet"]) == 0
    assert files(again) == files(tmp_path / "a" / "out-nf4")


@pytest.mark.parametrize("given", ["nf3", "nf4,nf3", ""])
def test_a_form_that_is_none(tmp_path, capsys, given):
    with pytest.raises(SystemExit) as stop:
        main(["merge", "r.yml", str(tmp_path / "out"), f"--also={given}"])
    assert stop.value.code == 2 and "choose nf4, int8" in capsys.readouterr().err


def test_without_bitsandbytes_nothing_begins(trio64, tmp_path, monkeypatch):
    from streammerge import quantized

    quantized._library.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(RecipeError, match=r"--also nf4 needs bitsandbytes.*streammerge\[quantized\]"):
        merge(recipe(trio64), tmp_path / "out", also=("nf4",))
    assert not list(tmp_path.iterdir())
    quantized._library.cache_clear()


def test_a_target_that_is_taken(trio64, tmp_path):
    (tmp_path / "out-nf4").mkdir()
    (tmp_path / "out-nf4" / "mine").write_text("x")
    (tmp_path / "out-int8").write_text("y")
    with pytest.raises(InputError) as error:
        merge(recipe(trio64), tmp_path / "out", also=("nf4", "int8"))
    assert "out-nf4: is there" in str(error.value) and "out-int8: is there" in str(error.value)
    assert not (tmp_path / "out").exists() and (tmp_path / "out-nf4" / "mine").read_text() == "x"


def test_out_survives_a_copy_that_fails(trio64, tmp_path, monkeypatch):
    """OUT is complete, nothing is left of the copy, and the error says what makes it."""
    real, seen = also._round_piece, []

    def fails(*args):
        seen.append(1)
        if len(seen) > 3:
            raise ResourceError("the disk is full")
        return real(*args)

    monkeypatch.setattr(also, "_round_piece", fails)
    with pytest.raises(ResourceError) as error:
        merge(recipe(trio64), tmp_path / "out", also=("nf4",))
    told = str(error.value).splitlines()[-1]
    assert "the disk is full" in str(error.value) and not (tmp_path / "out-nf4").exists()
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    monkeypatch.setattr(also, "_round_piece", real)
    command = told.partition("streammerge ")[2].split()
    assert main([*command, "--quiet"]) == 0 and (tmp_path / "out-nf4" / "model.safetensors").exists()


@pytest.mark.parametrize("value, form", [("nan", "nf4"), ("inf", "int8"), (1e6, "int8")])
def test_weights_that_cannot_be_rounded(trio64, tmp_path, value, form):
    shutil.copytree(trio64["lrm"], tmp_path / "m")
    file = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    stored = load_file(file)
    name = next(k for k in stored if "_proj" in k)
    stored[name][1, 1] = float(value)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(InputError, match=name):
        also.quantize(tmp_path / "m", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_taken(trio64, tmp_path):
    also.quantize(trio64["lrm"], tmp_path / "q", "int8")
    with pytest.raises(InputError, match="is quantised already"):
        also.quantize(tmp_path / "q", tmp_path / "out", "nf4")
    shutil.copytree(trio64["lrm"], tmp_path / "m")
    config = config_of(tmp_path / "m") | {"num_hidden_layers": 4}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no tensor model.layers.3.mlp.down_proj.weight"):
        also.quantize(tmp_path / "m", tmp_path / "out", "nf4")
    with pytest.raises(InputError, match="nothing is written"):
        also.quantize(trio64["lrm"], trio64["lrm"] / "x", "nf4")


def test_what_is_written_is_read_as_an_input(trio64, tmp_path):
    """Our copies and our decoder agree: a merge of them is one of what they stand for."""
    from streammerge.io.encoded import open_model

    also.quantize(trio64["lrm"], tmp_path / "q", "nf4")
    found = open_model(tmp_path / "q", "lrm")
    assert found.tensors.keys() == weights(trio64["lrm"]).keys() and len(found.encoded) == 21


def test_a_card_without_metadata_is_left_out(tmp_path):
    for text in ("no front matter", "---\n[1, 2\n---\nx", "---\n3\n---\nx"):
        (tmp_path / "README.md").write_text(text)
        assert also.card(tmp_path, "nf4") == {}
    save_tokenizer(tmp_path)
    assert also.card(tmp_path / "none", "nf4") == {}
