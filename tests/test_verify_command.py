"""`streammerge verify`: one flipped byte anywhere is found and named, and so is what no hash tells; nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from builders import recipe_text
from safetensors.torch import load_file, save_file

from streammerge import manifest, memory, merge, parse_recipe, probes, scan
from streammerge.checking import check
from streammerge.cli import main
from streammerge.errors import InputError

INDEX, MANIFEST, SUMS = "model.safetensors.index.json", "streammerge_manifest.json", "SHA256SUMS"
REPORT = "streammerge_report.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def merged(trio, sets, tmp_path_factory):
    """A merge with calibration, in shards; not to be changed."""
    out = tmp_path_factory.mktemp("verify") / "merged"
    merge(parse_recipe(recipe_text(trio, sets, shard_size="60KB"), "t.yml"), out)
    return out


@pytest.fixture()
def out(merged, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture()
def verify(capfd):
    """Run the command -> (exit code, stdout, stderr)."""

    def run(*args: object):
        capfd.readouterr()
        code = main(["verify", *map(str, args)])
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return code, told.out, told.err

    return run


def stamps(root: Path) -> dict[str, tuple]:
    """Everything that a write would change, of every path and of the directory itself."""
    paths = [root, *sorted(root.rglob("*"))]
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_ctime_ns, p.lstat().st_size, p.lstat().st_ino) for p in paths}


def flip(file: Path, at: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def rehash(out: Path, **changes) -> None:
    """A manifest and SHA256SUMS that fit the files as they are now: what only a look inside can tell from a merge."""
    content = json.loads((out / MANIFEST).read_text())
    content["files"] = {
        f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "size": f.stat().st_size}
        for f in sorted(out.iterdir())
        if f.name not in (MANIFEST, SUMS, "streammerge_report.json")
    }
    raw = json.dumps(content | changes, indent=1, sort_keys=True).encode()
    (out / MANIFEST).write_bytes(raw)
    (out / SUMS).write_bytes(manifest.sums(content["files"], raw))


def shard_of(out: Path, tensor: str) -> Path:
    return out / json.loads((out / INDEX).read_text())["weight_map"][tensor]


def edit(out: Path, tensor: str, change) -> str:
    """Change a stored tensor; returns the shard's name."""
    file = shard_of(out, tensor)
    named = load_file(file)
    named[tensor] = change(named[tensor])
    save_file({n: t for n, t in named.items() if t is not None}, file, {"format": "pt"})
    return file.name


# ---- what is in order


def test_a_merge_is_verified_and_nothing_is_written(merged, verify):
    for path in (merged, *merged.iterdir()):
        path.chmod(path.stat().st_mode & ~0o222)
    before = stamps(merged)
    code, told, log = verify(merged)
    assert (code, told) == (0, "") and "as merged" in log and "note" not in log
    assert stamps(merged) == before
    merged.chmod(0o755)


def test_coreutils_agree(out):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=out, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    files = {p.name for p in out.iterdir()} - {SUMS, "streammerge_report.json"}
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == files
    assert {INDEX, MANIFEST, "config.json", "tokenizer.json", "chat_template.jinja"} < files


def test_json_says_all(merged, verify):
    code, told, log = verify(merged, "--json", "--quiet")
    found = json.loads(told)
    assert code == 0 and log == "" and found["ok"] and found["problems"] == [] == found["notes"]
    listed = json.loads((merged / MANIFEST).read_text())["files"]
    assert found["files"] == len(listed) and found["nbytes"] == sum(f["size"] for f in listed.values())
    assert found["tensors"] == len(json.loads((merged / INDEX).read_text())["weight_map"])


def test_the_manifest_is_the_same_in_every_run(trio, sets, merged, tmp_path):
    again = tmp_path / "elsewhere" / "under another name"
    merge(parse_recipe(recipe_text(trio, sets, shard_size="60KB"), "other.yml"), again)
    for name in (MANIFEST, SUMS):
        assert (again / name).read_bytes() == (merged / name).read_bytes()
    plain = {"merge_method": "task_arithmetic"}
    for threads in (1, 3):
        recipe = parse_recipe(recipe_text(trio, None, **plain, budget={"host_memory": f"{threads}GiB"}), "t.yml")
        merge(recipe, tmp_path / f"{threads}", threads=threads)
    one, other = ((tmp_path / n / MANIFEST).read_bytes() for n in "13")
    assert one == other and json.loads(one)["markers"] == json.loads((merged / MANIFEST).read_text())["markers"]


def test_the_manifest_tells_where_the_output_came_from(merged, trio, sets):
    told = json.loads((merged / MANIFEST).read_text())
    assert told["markers"] == {"<think>": [305], "</think>": [306]}
    assert told["recipe"]["lambda"] == 1.0 and told["device"] == "cpu"
    assert told["unhashed"] == ["streammerge_report.json"]
    digest = hashlib.sha256(sets["reasoning"].read_bytes()).hexdigest()
    assert told["calibration"]["reasoning"] == {"name": sets["reasoning"].name, "sha256": digest}
    lrm = told["inputs"]["reasoning_model"]
    assert lrm["name"] == trio["lrm"].name and "path" not in lrm
    assert lrm["files"].keys() == {f.name for f in trio["lrm"].glob("*.safetensors")}
    name, entry = next(iter(lrm["files"].items()))
    raw = (trio["lrm"] / name).read_bytes()
    assert entry["size"] == len(raw)
    assert entry["header_sha256"] == hashlib.sha256(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
    cached = Path("/c/models--org--a-model/snapshots/0123abcd")
    assert manifest.origin(cached) == {"repo": "org/a-model", "revision": "0123abcd"}
    for part in ("inputs", "recipe", "calibration"):
        assert str(trio["lrm"].parent) not in json.dumps(told[part])


def test_a_download_through_the_hub_cache(out, tmp_path, verify):
    """Files are links to the model's blobs there, and a card and .gitattributes lie beside them."""
    home = tmp_path / "models--org--merged"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    snapshot.mkdir(parents=True)
    shutil.move(out, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot / ".gitattributes").write_text("x")
    (snapshot / "LICENSE.md").write_text("A text.")
    code, _, log = verify(snapshot)
    assert code == 0 and "note: LICENSE.md is not part of the merge" in log and "gitattributes" not in log


# ---- one byte


@pytest.mark.parametrize("name, at", [
    ("shard", -1), ("shard", -4000), ("shard", 3), ("shard", 40), (INDEX, 100), (INDEX, -2), ("config.json", 50),
    ("generation_config.json", 5), ("tokenizer.json", 900), ("tokenizer_config.json", 20), ("chat_template.jinja", 12),
    ("README.md", 5), ("README.md", -1), ("streammerge_config.yml", 70), ("streammerge_sbom.cdx.json", -3),
    (SUMS, 10), (SUMS, 70), (SUMS, -1), (MANIFEST, 0), (MANIFEST, 30), (MANIFEST, -40),
])  # fmt: skip
def test_a_flipped_byte_is_found_and_named(out, verify, name, at):
    file = shard_of(out, WEIGHT) if name == "shard" else out / name
    flip(file, at)
    code, told, log = verify(out, "--json")
    assert code == 5 and f"  - {file.name}:" in log, log
    assert file.name in {p["file"] for p in json.loads(told)["problems"]}


def test_any_byte_of_any_file(out):
    chance = random.Random(7)
    files = [f for f in sorted(out.iterdir()) if f.name != "streammerge_report.json"]
    for n in range(60):
        file = files[n % len(files)]
        raw = file.read_bytes()
        flip(file, chance.randrange(len(raw)), chance.randrange(8))
        assert file.name in {p.file for p in check(out, quick=file.suffix != ".safetensors").problems}, file
        file.write_bytes(raw)
    assert check(out).problems == []


def test_a_changed_hash_in_the_manifest_is_the_manifests_fault(out, verify):
    text = (out / MANIFEST).read_text()
    digest = json.loads(text)["files"]["config.json"]["sha256"]
    (out / MANIFEST).write_text(text.replace(digest, digest[::-1]))
    code, _, log = verify(out)
    assert code == 5 and f"- {MANIFEST}: SHA256" in log and f"{SUMS}: for config.json it says {digest}" in log


def test_a_damaged_manifest_does_not_hide_the_rest(out, verify):
    (out / MANIFEST).write_bytes((out / MANIFEST).read_bytes()[:-30])
    flip(out / "config.json", 60)
    code, _, log = verify(out)
    assert code == 5 and f"{MANIFEST}: is damaged" in log and "- config.json: SHA256" in log


# ---- files


def test_truncated_longer_missing_and_replaced_files_all_in_one_answer(out, verify, tmp_path):
    shards = sorted(out.glob("*.safetensors"))
    size = shards[0].stat().st_size
    os.truncate(shards[0], size - 100)
    with shards[1].open("ab") as f:
        f.write(b"more")
    shards[2].unlink()
    (out / "tokenizer.json").unlink()
    (out / "generation_config.json").unlink()
    (out / "generation_config.json").mkdir()
    (tmp_path / "private").write_text("secret")
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.jinja").symlink_to(tmp_path / "private")
    code, _, log = verify(out)
    assert code == 5 and f"{shards[0].name}: holds {size - 100} bytes; wanted {size}" in log
    for name, what in ((shards[0].name, "shard ends after"), (shards[1].name, "holds"), (shards[2].name, "is missing"),
                       ("tokenizer.json", "is missing"), ("generation_config.json", "is not a regular file"),
                       ("chat_template.jinja", "is a link that leaves the directory")):  # fmt: skip
        assert f"- {name}: {what}" in log, (name, log)
    assert hashlib.sha256(b"secret").hexdigest() not in log, "a file outside was read"


def test_quick_reads_no_weights_and_still_sees_a_cut(out, verify):
    shard = shard_of(out, WEIGHT)
    flip(shard, -1)
    code, told, _ = verify(out, "--quick", "--json")
    found = json.loads(told)
    assert code == 0 and found["nbytes"] == sum(
        f.stat().st_size for f in out.iterdir() if f.suffix != ".safetensors" and f.name not in (MANIFEST, SUMS, REPORT)
    )
    os.truncate(shard, shard.stat().st_size - 1)
    assert verify(out, "--quick")[0] == 5


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.bin", "modeling.py", "vocab.json"])
def test_a_strange_file_that_loaders_may_read(out, verify, name):
    shutil.copy(shard_of(out, WEIGHT), out / name)
    code, _, log = verify(out)
    assert code == 5 and f"- {name}: is not part of the merge; wanted no such file: remove it" in log


def test_other_strange_files_are_told(out, verify):
    (out / "LICENSE.txt").write_text("free")
    (out / "plots").mkdir()
    (out / "streammerge_report.json").unlink()
    code, _, log = verify(out)
    assert code == 0
    for name in ("LICENSE.txt is not part", "plots is not part", "streammerge_report.json is gone"):
        assert f"note: {name}" in log


def test_a_line_too_many_among_the_sums(out, verify):
    with (out / SUMS).open("a") as f:
        f.write("# a remark\n")
    code, _, log = verify(out)
    assert code == 5 and f"- {SUMS}: has other bytes than the merge wrote" in log and log.count("  - ") == 1


def test_a_missing_list_of_sums(out, verify):
    (out / SUMS).unlink()
    code, _, log = verify(out)
    assert code == 5 and f"- {SUMS}: is missing" in log


def test_no_output_of_ours(trio, tmp_path, verify):
    for path in (trio["lrm"], tmp_path, tmp_path / "nowhere", trio["lrm"] / "config.json"):
        code, told, log = verify(path, "--json")
        assert (code, told) == (3, "") and MANIFEST in log and str(path) in log


def test_no_manifest_was_wanted(trio, tmp_path, verify):
    recipe = parse_recipe(recipe_text(trio, None, merge_method="task_arithmetic", manifest="none"), "t.yml")
    report = merge(recipe, tmp_path / "out")
    assert not {MANIFEST, SUMS} & {p.name for p in (tmp_path / "out").iterdir()}
    assert all("sha256" not in entry for entry in report["verified"]["files"].values())
    assert verify(tmp_path / "out")[0] == 3


@pytest.mark.parametrize("change", [
    {"schema": 2}, {"files": {}}, {"files": []}, {"files": {"../lrm/config.json": {"sha256": "0" * 64, "size": 1}}},
    {"files": {"/etc/hostname": {"sha256": "0" * 64, "size": 1}}},
    {"files": {"config.json": {"sha256": "x", "size": 1}}},
    {"files": {"config.json": {"sha256": "0" * 64, "size": -1}}}, {"markers": {"<think>": "1"}}, {"markers": 3},
    {"unhashed": [".."]}, {"inputs": {"base_model": 1}}, {"inputs": {"base_model": {"files": {"a": 1}}}}, {"recipe": 5},
], ids=str)  # fmt: skip
def test_a_hostile_manifest_is_damaged(out, verify, change):
    raw = json.dumps(json.loads((out / MANIFEST).read_text()) | change).encode()
    (out / MANIFEST).write_bytes(raw)
    code, _, log = verify(out)
    assert code == 5 and f"- {MANIFEST}: is damaged" in log


def test_a_recipe_that_is_none(out, verify):
    rehash(out, recipe={"merge_method": "magic"})
    code, _, log = verify(out)
    assert code == 5 and f"- {MANIFEST}: its recipe cannot be read" in log


# ---- inside: the hashes fit


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(out, verify, value):
    def spoil(tensor):
        tensor.view(-1)[-1] = value
        return tensor

    name = edit(out, WEIGHT, spoil)
    rehash(out)
    code, told, log = verify(out, "--json")
    assert code == 5 and f"- {name}: tensor '{WEIGHT}': has NaN or infinite values" in log
    assert [(p["file"], p["tensor"]) for p in json.loads(told)["problems"]] == [(name, WEIGHT)]


def test_shapes_against_the_config(out, verify):
    name = edit(out, WEIGHT, lambda t: t[:-1].contiguous())
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and f"- {name}: tensor '{WEIGHT}': has shape [95, 48]; wanted [96, 48]" in log
    assert log.count("  - ") == 1


def test_tensors_that_the_config_implies(out, verify):
    """A tied head need not be stored; without the tie it is missed, as is anything else."""
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] and "lm_head.weight" not in json.loads((out / INDEX).read_text())["weight_map"]
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "num_hidden_layers": 2}))
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and "tensor 'lm_head.weight': the model wants a tensor that no shard holds" in log
    assert log.count("  - ") == 1 and "note: 9 tensors that the model of config.json does not use" in log


@pytest.mark.parametrize("changes, told", [
    ({"model_type": "nonsense"}, "cannot be built"), ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 4}, "model.layers.3."),
])  # fmt: skip
def test_a_config_of_another_model(out, verify, changes, told):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and "- config.json:" in log and told in log


@pytest.mark.parametrize("dtype, code", [(torch.int32, "I32"), (torch.float16, "F16")])
def test_dtypes_against_the_recipe(out, verify, dtype, code):
    recipe = json.loads((out / MANIFEST).read_text())["recipe"]
    name = edit(out, WEIGHT, lambda t: t.to(dtype))
    rehash(out, recipe=recipe | {"dtype": "float32"})
    exit_code, _, log = verify(out)
    assert exit_code == 5 and f"- {name}: tensor '{WEIGHT}': is {code}" in log
    assert "note: 1 tensors are not float32" in log


def test_an_index_that_leads_astray(out, verify):
    index = json.loads((out / INDEX).read_text())
    index["weight_map"][WEIGHT] = next(s for s in index["weight_map"].values() if s != index["weight_map"][WEIGHT])
    (out / INDEX).write_text(json.dumps(index))
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and f"- {INDEX}: tensor '{WEIGHT}' is not in" in log


def test_ids_of_the_markers(out, verify):
    text = (out / "tokenizer.json").read_text()
    data = json.loads(text)
    named = {t["content"]: t for t in data["added_tokens"]}
    named["<think>"]["content"], named["</think>"]["content"] = "</think>", "<think>"
    (out / "tokenizer.json").write_text(json.dumps(data))
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and "- tokenizer.json: the marker '<think>' has the ids [306]; wanted [305]" in log
    (out / "tokenizer.json").write_text(text[:-50])
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and "- tokenizer.json: the tokenizer cannot be loaded" in log
    for file in out.glob("tokenizer*"):
        file.unlink()
    rehash(out)
    code, _, log = verify(out)
    assert code == 5 and "- tokenizer.json: no tokenizer is here" in log


# ---- what it does


def test_generation(merged, verify, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, told, log = verify(merged, "--generate", "the sum of two and one?", "--tokens", 5, "--json")
    found = json.loads(told)["probes"]["generated"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = "<s><|user|>the sum of two and one?<|assistant|><think>\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(merged)
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert code == 0 and found == {"prompt": text, "text": tokenizer.decode(ids[0, -5:]), "tokens": 5}
    assert found["text"] in log
    monkeypatch.setattr(probes, "_SMALL", 1000)
    code, _, log = verify(merged, "--generate", "x")
    assert code == 4 and "--insist" in log
    assert verify(merged, "--generate", "x", "--tokens", 1, "--insist")[0] == 0


def test_generation_waits_for_the_rest_to_be_in_order(out, verify):
    flip(shard_of(out, WEIGHT), -4)  # the last bits of a mantissa: the model would load and write
    code, told, _ = verify(out, "--generate", "x", "--l-think", "--json")
    assert code == 5 and json.loads(told)["probes"] == {}


def test_l_think_is_measured_again(trio, sets, tmp_path, verify):
    lrm, reasoning = shutil.copytree(trio["lrm"], tmp_path / "lrm"), shutil.copy(sets["reasoning"], tmp_path / "r.json")
    keys = {"layers": "1", "calibration": {"holdout": 0.3}}
    text = recipe_text(trio | {"lrm": Path(lrm)}, sets | {"reasoning": Path(reasoning)}, **keys)
    out = tmp_path / "out"
    report = merge(parse_recipe(text, "t.yml"), out)
    code, told, log = verify(out, "--l-think", "--json")
    found = json.loads(told)["probes"]["l_think"]
    assert code == 0 and "L_think (nats, 4 held-out samples)" in log
    assert found["now"] == pytest.approx(report["l_think"], rel=1e-3) and found["report"] == report["l_think"]
    told = json.loads((out / "streammerge_report.json").read_text())
    told["l_think"]["closer"] *= 1.2
    (out / "streammerge_report.json").write_text(json.dumps(told))
    code, _, log = verify(out, "--l-think")
    assert code == 5 and "streammerge_report.json: L_think (closer)" in log and log.count("  - ") == 1
    samples = Path(reasoning).read_text()
    Path(reasoning).write_text(samples + "\n")
    code, _, log = verify(out, "--l-think")
    assert code == 3 and "calibration files are not those of the merge" in log
    Path(reasoning).write_text(samples)
    edit(Path(lrm), WEIGHT, lambda t: t.half())
    code, _, log = verify(out, "--l-think")
    assert code == 3 and "other sizes or headers" in log
    shutil.rmtree(lrm)
    assert verify(out, "--l-think")[0] == 3


def test_l_think_without_samples(trio, tmp_path, verify):
    merge(parse_recipe(recipe_text(trio, None, merge_method="task_arithmetic"), "t.yml"), tmp_path / "out")
    code, _, log = verify(tmp_path / "out", "--l-think")
    assert code == 3 and "calibration.holdout" in log


# ---- the one reading


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_hashes_do_not_know_pieces_and_threads(out, monkeypatch, threads):
    monkeypatch.setattr(scan, "PIECE", 1000)
    assert check(out, threads=threads).problems == []


def test_an_error_while_reading_is_told_and_nobody_waits_for_ever(out, monkeypatch):
    monkeypatch.setattr(scan, "PIECE", 1000)
    shard, read = shard_of(out, WEIGHT), scan.Digest.read

    def bad_sector(self, view, offset):
        if self.file == shard and offset == 5000:
            raise InputError(f"{self.file}: cannot be read: Input/output error")
        read(self, view, offset)

    monkeypatch.setattr(scan.Digest, "read", bad_sector)
    monkeypatch.setattr("streammerge.checking.file_pieces", _plain_pieces)
    found = []
    thread = threading.Thread(target=lambda: found.append(check(out, threads=4)), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it hangs"
    assert [p.found for p in found[0].problems] == ["cannot be read: Input/output error"]
    assert found[0].problems[0].file == shard.name


_PIECES = scan.file_pieces


def _plain_pieces(digest, tensors=()):
    return _PIECES(digest)  # cut at every thousandth byte, not at tensors


def test_memory_is_two_pieces_a_thread(out):
    with (out / "log.txt").open("wb") as f:
        f.truncate(300 << 20)
    zeros = hashlib.sha256()
    for _ in range(300):
        zeros.update(bytes(1 << 20))
    content = json.loads((out / MANIFEST).read_text())
    content["files"]["log.txt"] = {"sha256": zeros.hexdigest(), "size": 300 << 20}
    raw = json.dumps(content).encode()
    (out / MANIFEST).write_bytes(raw)
    (out / SUMS).write_bytes(manifest.sums(content["files"], raw))
    if not memory.reset_host_peak():
        pytest.skip("this kernel does not reset the peak")
    before = memory.host_now()
    found = check(out, threads=3)
    assert found.problems == [] and found.nbytes > 300 << 20
    assert memory.host_peak() - before < 60 << 20
