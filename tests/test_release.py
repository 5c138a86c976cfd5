"""What goes out with a merge: card, resolved recipe, SBOM, licence; the same bytes in every run, no path of ours."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from builders import recipe_text, save_trio, write_sets

from streammerge import load_recipe, merge, parse_recipe
from streammerge.errors import RecipeError
from streammerge.release.facts import published
from streammerge.release.licence import Stated, of_merge, stated

REPORT, MANIFEST = "streammerge_report.json", "streammerge_manifest.json"
CARD, CONFIG, SBOM = "README.md", "streammerge_config.yml", "streammerge_sbom.cdx.json"
PLAIN = {"merge_method": "task_arithmetic"}
MERGEKIT = """# kept as it is
merge_method: nuslerp
models:
- {model: lrm, parameters: {weight: 0.7}}
- {model: './itm/', parameters: {weight: [0.3, 0.1]}}
dtype: float32
"""
APACHE = "                              Apache License\n                        Version 2.0, January 2004\n   terms"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A machine: a trio whose recipe has relative paths, one model of it in a Hub cache, licences of several kinds."""
    root = tmp_path_factory.mktemp("alice")
    paths = save_trio(root, "llama")
    (paths["lrm"] / "LICENSE").write_text(APACHE)
    (paths["lrm"] / "NOTICE").write_text("made by somebody\n")
    (paths["lrm"] / "mergekit_config.yml").write_text("of the merge that made this model\n")
    (paths["lrm"] / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe card of another model.\n")
    (paths["itm"] / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n")
    cache = root / "hub" / "models--org--base" / "snapshots" / ("ab" * 20)
    blobs = cache.parent.parent / "blobs"
    cache.mkdir(parents=True)
    blobs.mkdir()
    for file in paths["base"].iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (cache / file.name).symlink_to(os.path.relpath(blobs / digest, cache))
    (cache / "LICENSE").write_text("MIT License\n\nCopyright")
    shutil.rmtree(paths["base"])
    write_sets(root)
    relative = {"base": cache.relative_to(root), "itm": Path("itm"), "lrm": Path("lrm")}
    sets = {"reasoning": Path("reasoning.json"), "instruction": Path("instruction.jsonl")}
    (root / "rain.yml").write_text(recipe_text(relative, sets, shard_size="60KB"))
    (root / "plain.yml").write_text(recipe_text(relative, None, **PLAIN))
    (root / "mergekit.yml").write_text(MERGEKIT)
    return root


@pytest.fixture(scope="module")
def merged(home):
    """{name: OUT}; not to be changed."""
    for name in ("rain", "plain", "mergekit"):
        merge(home / f"{name}.yml", home / name)
    return {name: home / name for name in ("rain", "plain", "mergekit")}


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


# ---- the same bytes


@pytest.mark.parametrize("name", ["rain", "plain", "mergekit"])
def test_two_runs_differ_in_the_report_alone(home, merged, tmp_path, name):
    """Another process, another seed of Python's hashes, another directory and name of OUT."""
    again = tmp_path / "under another name"
    code = f"import streammerge as s; s.merge({str(home / f'{name}.yml')!r}, {str(again)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=os.environ | {"PYTHONHASHSEED": "77"})
    one, other = files(merged[name]), files(again)
    assert one.keys() == other.keys() and len(one) >= 12
    assert [n for n in one if one[n] != other[n]] == [REPORT]


def test_what_is_written_makes_the_same_again(home, merged, tmp_path):
    shutil.copy(merged["rain"] / CONFIG, home / CONFIG)  # its relative paths are the recipe's
    recipe = load_recipe(home / CONFIG)
    first = load_recipe(home / "rain.yml")
    assert replace(recipe, source="", budget=first.budget) == replace(first, source="")
    merge(recipe, tmp_path / "again")
    one, other = files(merged["rain"]), files(tmp_path / "again")
    weights = [n for n in one if n.endswith(".safetensors")]
    assert len(weights) > 3 and all(one[n] == other[n] for n in weights)


def test_no_path_of_this_machine_goes_out(home, merged):
    for out in merged.values():
        leaks = [n for n, raw in files(out).items() if home.name.encode() in raw]
        assert leaks == [REPORT]


def test_absolute_paths_stay_in_the_recipe_that_has_them(home, tmp_path):
    text = (home / "plain.yml").read_text().replace("lrm", str(home / "lrm"))
    (home / "absolute.yml").write_text(text)
    merge(home / "absolute.yml", tmp_path / "out")
    leaks = [n for n, raw in files(tmp_path / "out").items() if home.name.encode() in raw]
    assert sorted(leaks) == [CONFIG, REPORT]
    assert yaml.safe_load((tmp_path / "out" / CONFIG).read_text())["reasoning_model"] == str(home / "lrm")


def test_a_mergekit_recipe_goes_out_as_it_came(merged, home):
    out = merged["mergekit"]
    assert (out / "mergekit_config.yml").read_text() == MERGEKIT
    assert yaml.safe_load((out / CONFIG).read_text()) == yaml.safe_load(MERGEKIT)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["recipe_kind"] == "mergekit" and manifest["recipe"]["models"][1]["model"] == "itm"
    assert list(manifest["inputs"]) and {told["name"] for told in manifest["inputs"].values()} == {"lrm", "itm"}


def test_every_kind_of_merge_is_verified(merged):
    from streammerge.api import verify

    for out in merged.values():
        found = verify(out)
        assert found.problems == [] and found.notes == []


def test_paths_of_a_mergekit_recipe_are_shown_short(home):
    output = load_output(home)
    recipe = {"models": [{"model": "./lrm"}, {"model": str(home / "itm")}, {"model": "lrm"}, {"model": "org/name"}],
              "base_model": "~/private/base", "merge_method": "linear", "dtype": ""}  # fmt: skip
    shown = published(replace(output, recipe=recipe, names={}))
    assert shown["models"] == [{"model": "lrm"}, {"model": "itm"}, {"model": "lrm"}, {"model": "org/name"}]
    assert (shown["base_model"], shown["merge_method"], shown["dtype"]) == ("base", "linear", "")


def load_output(home):
    from streammerge.planned import make_plan

    return make_plan(load_recipe(home / "plain.yml")).output


# ---- the card


def test_the_card_by_the_hubs_own_library(merged, home):
    from huggingface_hub import ModelCard, metadata_load
    from huggingface_hub.utils import validate_repo_id

    sets, rain = ["reasoning.json", "instruction.jsonl"], ["rain-merging", "arxiv:2602.22538"]
    cases = (("rain", rain, sets), ("plain", ["task-arithmetic"], None), ("mergekit", ["nuslerp"], None))
    for name, tags, data in cases:
        card = ModelCard.load(merged[name] / CARD)
        told = card.data.to_dict()
        assert told == metadata_load(merged[name] / CARD)
        assert told["base_model"] == ["lrm", "itm", "org/base"][: 2 if name == "mergekit" else 3]
        assert told["base_model_relation"] == "merge"
        assert (told["license"], told["library_name"]) == ("apache-2.0", "transformers")
        assert told["pipeline_tag"] == "text-generation" and told["tags"] == ["merge", "streammerge", *tags]
        assert told.get("datasets") == data
        for one in told["base_model"]:
            validate_repo_id(one)
        assert "The card of another model" not in card.content


def test_the_card_tells_what_was_done(merged):
    text, report = (merged["rain"] / CARD).read_text(), json.loads((merged["rain"] / REPORT).read_text())
    alpha = report["alpha"]
    assert f"{alpha['min']:.4f} to {alpha['max']:.4f}, mean {alpha['mean']:.4f}" in text
    assert f"closer {report['l_think']['closer']:.4e}" in text
    assert f"streammerge merge {CONFIG} OUT --device cpu --threads {report['threads']}" in text
    assert "ab" * 20 in text and "`reasoning.json`" in text and report["versions"]["torch"] in text
    recipe = text.split("```yaml\n")[1].split("```")[0]
    told = yaml.safe_load(recipe)
    assert told["lambda"] == 1.0 and told["base_model"] == "org/base@" + "ab" * 20
    plain = (merged["plain"] / CARD).read_text()
    assert "L_think" not in plain and "α" not in plain and "Calibration" not in plain


def test_names_of_folders_are_data(tmp_path):
    paths = save_trio(tmp_path, "llama")
    hostile = "a|b`c\n---\nlicense: mit [x](javascript:1) #"
    paths["lrm"] = paths["lrm"].rename(tmp_path / hostile.replace("\n", "").replace("/", ""))
    merge(parse_recipe(recipe_text(paths, None, **PLAIN), "t.yml"), tmp_path / "out")
    from huggingface_hub import ModelCard

    text = (tmp_path / "out" / CARD).read_text()
    told = ModelCard.load(tmp_path / "out" / CARD).data
    assert told.license == "unknown" and told.base_model[1:] == ["itm", "base"]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows} == {3}
    prose = re.sub(r"(?<!\\)`[^`]*`", "", text.split("```yaml")[0])
    assert "javascript" in prose and not re.search(r"(?<!\\)\]\(", prose)


# ---- the bill of materials


def test_the_sbom_by_the_schema(merged, home):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    for out in merged.values():
        raw = (out / SBOM).read_text()
        assert validator.validate_str(raw) is None
        bom = json.loads(raw)
        model = bom["metadata"]["component"]
        hashes = {c["name"]: c["hashes"] for c in bom["components"] if c["type"] == "file"}
        assert hashes == {p.name: [{"alg": "SHA-256", "content": hashlib.sha256(p.read_bytes()).hexdigest()}]
                          for p in out.glob("*.safetensors")}  # fmt: skip
        assert "timestamp" not in bom["metadata"] and model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
        validator_refuses(validator, bom)
        ancestors = {a["name"]: a for a in model["pedigree"]["ancestors"]}
        assert ancestors.keys() >= {"lrm", "itm"} and "version" not in ancestors["itm"]
        if out.name == "mergekit":
            continue
        base = ancestors["org/base"]
        assert base["version"] == "ab" * 20 and base["licenses"] == [{"license": {"id": "MIT"}}]
        cache = next((home / "hub").rglob("snapshots")) / ("ab" * 20)
        for file in base["components"]:
            assert file["hashes"][0]["content"] == hashlib.sha256((cache / file["name"]).read_bytes()).hexdigest()
    serials = {json.loads((out / SBOM).read_text())["serialNumber"] for out in merged.values()}
    assert len(serials) == 3


def validator_refuses(validator, bom):
    """The schema is looked at at all."""
    for change in ({"metadata": {"component": {"type": "merge", "name": "x"}}}, {"serialNumber": "1"}, {"what": 1}):
        assert validator.validate_str(json.dumps(bom | change)) is not None, change


# ---- dates, and what can be left out


def test_the_date_is_the_environments(home, merged, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    merge(home / "plain.yml", tmp_path / "dated")
    assert json.loads((tmp_path / "dated" / SBOM).read_text())["metadata"]["timestamp"] == "1970-01-02T00:00:00Z"
    assert "Date: 1970-01-02" in (tmp_path / "dated" / CARD).read_text()
    assert b"Date:" not in files(merged["plain"])[CARD]
    one, other = files(merged["plain"]), files(tmp_path / "dated")
    assert sorted(n for n in one if one[n] != other[n]) == sorted([CARD, SBOM, MANIFEST, "SHA256SUMS", REPORT])
    for wrong in ("yesterday", "-1", "1.5"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(RecipeError, match="SOURCE_DATE_EPOCH is"):
            merge(home / "plain.yml", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_whole_inputs_are_hashed_where_asked(home, merged, tmp_path):
    (home / "whole.yml").write_text((home / "plain.yml").read_text() + "hash_inputs: true\n")
    merge(home / "whole.yml", tmp_path / "out")
    told = json.loads((tmp_path / "out" / MANIFEST).read_text())["inputs"]
    without = json.loads((merged["plain"] / MANIFEST).read_text())["inputs"]
    for role, folder in (("reasoning_model", home / "lrm"), ("instruct_model", home / "itm")):
        shards = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
        assert {name: entry["sha256"] for name, entry in told[role]["files"].items()} == shards
        assert not any("sha256" in entry for entry in without[role]["files"].values())
    assert told["base_model"] == without["base_model"]  # of the Hub's cache, which knows them
    bom = json.loads((tmp_path / "out" / SBOM).read_text())
    parts = [c for a in bom["metadata"]["component"]["pedigree"]["ancestors"] for c in a["components"]]
    assert all(c["hashes"] for c in parts)
    (home / "whole.yml").unlink()


@pytest.mark.parametrize("name", ["plain", "mergekit"])
def test_inputs_are_hashed_by_flag(home, merged, tmp_path, name):
    from streammerge.cli import main

    out = tmp_path / "out"
    assert main(["plan", str(home / f"{name}.yml"), str(out), "--hash-inputs", "--quiet"]) == 0
    assert main(["merge", str(home / f"{name}.yml"), str(out), "--hash-inputs", "--quiet"]) == 0
    shards = [entry for told in json.loads((out / MANIFEST).read_text())["inputs"].values()
              for entry in told["files"].values()]  # fmt: skip
    assert shards and all("sha256" in entry for entry in shards)
    plain = json.loads((merged[name] / MANIFEST).read_text())["inputs"].values()
    assert not all("sha256" in entry for told in plain for entry in told["files"].values())


def test_the_flag_leaves_the_recipes_own_alone():
    from streammerge.api import with_budget
    from streammerge.flags import parser
    from streammerge.recipe import Recipe

    asked = Recipe(merge_method="task_arithmetic", instruct_model="i", reasoning_model="r", hash_inputs=True)
    given = parser().parse_args(["merge", "r.yml", "out"]).hash_inputs
    assert with_budget(asked, hash_inputs=given).hash_inputs


@pytest.mark.parametrize("keys, gone", [
    ({"card": False}, {CARD}), ({"sbom": False}, {SBOM}),
    ({"manifest": "none"}, {SBOM, MANIFEST, "SHA256SUMS"}),
])  # fmt: skip
def test_what_can_be_left_out(home, merged, tmp_path, keys, gone):
    from streammerge.api import verify

    (home / "less.yml").write_text((home / "plain.yml").read_text() + yaml.safe_dump(keys))
    merge(home / "less.yml", tmp_path / "out")
    assert files(merged["plain"]).keys() - files(tmp_path / "out").keys() == gone
    if MANIFEST not in gone:
        assert verify(tmp_path / "out").problems == []
    else:
        assert "SHA256SUMS" not in (tmp_path / "out" / CARD).read_text()


def test_a_plain_merge_imports_neither_torch_nor_the_hub(home, tmp_path):
    code = (f"import sys, streammerge as s; s.merge({str(home / 'plain.yml')!r}, {str(tmp_path / 'out')!r})\n"
            "print(sorted({'torch', 'transformers', 'huggingface_hub', 'jinja2'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"


def test_the_output_loads_and_writes(merged):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for out in merged.values():
        model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told.values()), told
        ids = AutoTokenizer.from_pretrained(out)("the sum of two", return_tensors="pt").input_ids
        assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape[1] > 4


def test_the_cards_command_is_one(merged):
    from streammerge.flags import parser

    for out in merged.values():
        command = (out / CARD).read_text().split("```bash\n")[1].split("\n")[0].split()
        assert command[0] == "streammerge" and parser().parse_args(command[1:]).recipe == Path(CONFIG)


@pytest.mark.parametrize("name", ["plain", "mergekit"])
def test_the_shard_size_by_flag(home, merged, tmp_path, capsys, name):
    from safetensors import safe_open

    from streammerge.cli import main

    out = tmp_path / "out"
    assert main(["merge", str(home / f"{name}.yml"), str(out), "--shard-size", "100KB", "--quiet"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert [p.name for p in shards] == [f"model-{n:05d}-of-{len(shards):05d}.safetensors"
                                        for n in range(1, len(shards) + 1)] and len(shards) > 2  # fmt: skip
    held = {}
    for file in shards:
        with safe_open(file, "pt") as stored:
            held |= {key: (file.name, stored.get_tensor(key).nbytes) for key in stored.keys()}  # noqa: SIM118
    assert index["weight_map"] == {key: file for key, (file, _) in held.items()}
    assert index["metadata"] == {"total_size": sum(nbytes for _, nbytes in held.values())}
    assert (merged[name] / "model.safetensors").exists()


# ---- licences


def test_licence_files_of_the_reasoning_model_are_byte_copies(home, merged):
    for out in merged.values():
        for name in ("LICENSE", "NOTICE"):
            assert (out / name).read_bytes() == (home / "lrm" / name).read_bytes()
    assert not (merged["plain"] / "mergekit_config.yml").exists()


@pytest.mark.parametrize("licences, wanted", [
    (["mit", "mit", "mit"], {"license": "mit"}),
    (["mit", "apache-2.0", "mit"], {"license": "apache-2.0"}),
    (["apache-2.0", "bsd-3-clause", "unlicense"], {"license": "apache-2.0"}),
    (["mit", "llama3.1", "llama3.1"], {"license": "llama3.1"}),
    (["llama3", "llama3.1", "mit"], {"license": "other", "license_name": "undetermined"}),
    (["mit", "", "mit"], {"license": "unknown"}),
    (["unknown", "llama3.1", "cc-by-nc-4.0"], {"license": "unknown"}),
    ([("other", "qwen"), ("other", "qwen"), "apache-2.0"], {"license": "other", "license_name": "qwen"}),
    ([("other", "qwen"), ("other", "falcon"), "mit"], {"license": "other", "license_name": "undetermined"}),
    ([("other", ""), ("other", ""), "mit"], {"license": "other", "license_name": "undetermined"}),
], ids=str)  # fmt: skip
def test_the_licence_of_a_merge(licences, wanted):
    says = [Stated(*((one, "") if isinstance(one, str) else one)) for one in licences]
    found = of_merge(dict(zip("abc", says, strict=True)), "a")
    assert dict(found.metadata) == wanted
    for name, one in zip("abc", says, strict=True):
        assert f"{name}: {one.told or 'not stated'}" in found.why


def test_the_licence_file_is_named_where_there_is_one():
    says = {"a": Stated("other", "qwen", "https://far/away", files=("LICENSE", "NOTICE")), "b": Stated("mit")}
    assert of_merge(says, "a").metadata["license_link"] == "LICENSE"
    assert of_merge(says, "b").metadata["license_link"] == "https://far/away"


@pytest.mark.parametrize("card, texts, wanted", [
    ("---\nlicense: Apache-2.0\n---\n", {}, "apache-2.0"),
    ("---\r\nlicense: [mit]\r\n---\r\nx", {}, "mit"),
    ("---\nlicense: other\nlicense_name: qwen\n---", {"LICENSE": "MIT License"}, "other (qwen)"),
    ("no metadata", {"LICENSE": APACHE}, "apache-2.0"),
    ("---\nlicense: [mit, apache-2.0]\n---\n", {}, ""),
    ('---\nlicense: "mit\\nbase_model: x"\n---\n', {}, ""), ("---\nlicense: mit or so\n---\n", {}, ""),
    ("---\nlicense: *a\n---\n", {"LICENSE.txt": "# MIT License\n"}, "mit"),
    ("---\nlicense: !!python/object:os.system x\n---\n", {}, ""),
    (None, {"LICENSE-CODE": "MIT License", "LICENSE-MODEL": "You may not"}, ""),
    (None, {"LICENSE": "Copyright of us. All rights reserved."}, ""),
    (None, {}, ""),
])  # fmt: skip
def test_what_an_input_says(tmp_path, card, texts, wanted):
    from streammerge.io.checkpoint import Checkpoint

    for name, text in ({"README.md": card} if card else {} | texts).items():
        (tmp_path / name).write_bytes(text.encode())
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert stated(Checkpoint(tmp_path, "x", {}, {})).told == wanted


def test_a_card_outside_of_the_model_is_not_read(tmp_path):
    from streammerge.io.checkpoint import Checkpoint

    (tmp_path / "secret.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "m").mkdir()
    for name in ("README.md", "LICENSE"):
        (tmp_path / "m" / name).symlink_to(tmp_path / "secret.md")
    assert stated(Checkpoint(tmp_path / "m", "x", {}, {})) == Stated()
