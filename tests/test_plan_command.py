"""`streammerge plan`: the merge's own refusals, its own numbers, and no trace of having looked."""

# ruff: noqa: F811 (a fixture is imported, then named as an argument)
from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import recipe_text
from damage import Bench, bench, screen, snapshot  # noqa: F401
from safetensors.torch import load_file, save_file

from streammerge import load_recipe
from streammerge.cli import main
from streammerge.fingerprint import fingerprint
from streammerge.io.checkpoint import open_checkpoint
from streammerge.journal import Journal
from streammerge.planned import make_plan
from streammerge.planning import disk, plain_time, sweep_time
from streammerge.planning.disk import DiskSpeed
from streammerge.planning.sweep_time import Speeds, sweep_parts
from streammerge.planning.tensors import spans

PLAIN = {"merge_method": "task_arithmetic"}
STAGE = {"coefficients": {"rule": "uniform"}}


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr(sweep_time, "_PROBE", 0.005)
    monkeypatch.setattr(plain_time, "_PROBE", 0.005)
    monkeypatch.setattr(disk, "WRITE", 8 << 20)


def traces(root: Path) -> dict[str, tuple]:
    """Every path below root, and root: its content, and every time but that of the last reading."""
    stats = {str(p): p.lstat() for p in (root, *sorted(root.rglob("*")))}
    contents = snapshot(root)
    return {p: (s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino, contents.get(p)) for p, s in stats.items()}


def plain_recipe(bench: Bench, **keys) -> Path:
    return bench.recipe(text=recipe_text(bench.models, None, **(PLAIN | keys)))


def planned(bench: Bench, recipe: Path, *flags: object, command: str = "plan") -> dict:
    """The plan as JSON; nothing but one object on stdout."""
    bench.capfd.readouterr()
    assert main([command, str(recipe), *map(str, flags), "--json", "--quiet"]) == 0
    told = bench.capfd.readouterr()
    assert told.err == ""
    return json.loads(told.out)


def without_layernorm(bench: Bench) -> None:
    for file in bench.models["lrm"].glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"] = torch.ones(7)
            save_file(tensors, file, {"format": "pt"})


def without_tensor(bench: Bench) -> None:
    file = bench.models["itm"] / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = bench.models["itm"] / index["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    tensors = load_file(shard)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, shard, {"format": "pt"})
    file.write_text(json.dumps(index))


def fewer_markers(bench: Bench) -> None:
    bench.edit_samples("reasoning", lambda s: [{**x, "reasoning": "" if i < 4 else x["reasoning"]}
                                               for i, x in enumerate(s)])  # fmt: skip


def strange_link(bench: Bench) -> None:
    (bench.models["lrm"] / "merges.txt").symlink_to("/etc/hostname")


def occupied(bench: Bench) -> None:
    bench.out.mkdir(parents=True)
    for n in range(7):
        (bench.out / f"mine-{n}.txt").write_text("mine")


def a_file(bench: Bench) -> None:
    bench.out.parent.mkdir()
    bench.out.write_text("mine")


def below_a_file(bench: Bench) -> None:
    bench.out.parent.write_text("mine")


def nothing(bench: Bench) -> None:
    pass


REFUSALS = {
    "unknown key": (2, nothing, {"densty": 1}, ()),
    "no such device": (2, nothing, {}, ("--device", "cuda:7")),
    "missing tensor": (3, without_tensor, {}, ()),
    "LRM does not fit its config": (3, without_layernorm, {}, ()),
    "missing calibration file": (3, lambda bench: bench.sets["instruction"].unlink(), {}, ()),
    "a link out of the LRM": (3, strange_link, {}, ()),
    "a link out of the LRM of a plain merge": (3, strange_link, PLAIN, ()),
    "OUT is not empty": (3, occupied, {}, ()),
    "OUT is a file": (3, a_file, {}, ()),
    "OUT is below a file": (4, below_a_file, {}, ()),
    "budget": (4, nothing, {}, ("--host-memory", "50MB")),
    "budget of a plain merge": (4, nothing, PLAIN, ("--host-memory", "50KB")),
    "budget, then OUT": (4, occupied, PLAIN, ("--host-memory", "50KB", "--lambda", "0")),
    "OUT, then budget": (3, occupied, {}, ("--host-memory", "50MB", "--lambda", "0")),
    "budget, then lambda": (4, nothing, {}, ("--host-memory", "50MB", "--lambda", "0")),
    "lambda": (6, nothing, {}, ("--lambda", "0")),
    "markers": (7, fewer_markers, {}, ()),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_what_the_merge_refuses(bench, name):
    """In the same words, with the same exit code, and without a trace."""
    code, damage, keys, flags = REFUSALS[name]
    recipe = plain_recipe(bench) if keys == PLAIN else bench.recipe(**keys)
    damage(bench)
    before = traces(bench.root)
    bench.capfd.readouterr()
    assert main(["plan", str(recipe), str(bench.out), *flags, "--json"]) == code
    told = bench.capfd.readouterr()
    assert told.out == "" and traces(bench.root) == before
    screen(told.err)
    assert main(["merge", str(recipe), str(bench.out), *flags, "--quiet"]) == code
    mine, theirs = (text[text.index("streammerge: error:") :] for text in (told.err, bench.capfd.readouterr().err))
    assert mine == theirs


def test_an_output_inside_a_model_is_refused_as_by_the_merge(bench):
    recipe, told = bench.recipe(), []
    for command in ("plan", "merge"):
        assert main([command, str(recipe), str(bench.models["itm"] / "merged"), "--quiet"]) == 3
        told.append(bench.capfd.readouterr().err)
    assert told[0] == told[1] and "lies in instruct_model" in told[0]


def test_a_merge_that_must_change_nothing_does_not_begin(bench, monkeypatch):
    from streammerge import pipeline

    monkeypatch.setattr(pipeline, "sweep", lambda run: pytest.fail("the sweep began"))
    assert main(["merge", str(bench.recipe()), str(bench.out), "--lambda", "0", "--quiet"]) == 6
    assert not bench.out.exists()


def test_a_disk_that_is_too_small(bench, monkeypatch):
    recipe, told = bench.recipe(), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for command in ("plan", "merge"):
        assert main([command, str(recipe), str(bench.out), "--quiet"]) == 4
        told.append(bench.capfd.readouterr().err)
    assert told[0] == told[1] and "1000 bytes" in told[0]
    assert planned(bench, recipe)["disk"] == {  # without OUT there is no disk to be too small
        "output": planned(bench, recipe)["disk"]["output"], "free": None, "where": None, "unfinished": None,
    }  # fmt: skip


def test_another_merge_is_at_work(bench):
    recipe, lock = bench.recipe(), bench.out / ".streammerge" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("4711\n")
    before, told = traces(bench.root), []
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for command in ("plan", "merge"):
            assert main([command, str(recipe), str(bench.out), "--quiet"]) == 3
            told.append(bench.capfd.readouterr().err)
            assert command == "merge" or traces(bench.root) == before
    assert told[0] == told[1] and "pid 4711" in told[0]


def test_an_unfinished_merge_is_told_and_left(bench, monkeypatch):
    """What it recorded is no obstacle, whatever else is; its room counts as free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    recipe, lock = bench.recipe(), bench.out / ".streammerge" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("4711\nmodel.safetensors.partial\n../../large\n")
    (bench.root / "large").write_bytes(os.urandom(4 << 20))  # a record is a file: it may name anything
    (bench.out / "model.safetensors.partial").write_bytes(os.urandom(1 << 20))
    before = traces(bench.root)
    plan = planned(bench, recipe, bench.out)
    assert "anew" in plan["disk"]["unfinished"] and any("unfinished merge" in w for w in plan["warnings"])
    assert traces(bench.root) == before
    assert 1 << 20 <= plan["disk"]["free"] - (1 << 30) < 2 << 20
    (bench.out / "mine.txt").write_text("mine")
    assert main(["plan", str(recipe), str(bench.out), "--quiet"]) == 3
    assert "found mine.txt;" in bench.capfd.readouterr().err


@pytest.mark.parametrize("plain", [True, False])
def test_another_unfinished_merge_is_refused_as_the_merge_refuses_it(bench, monkeypatch, plain):
    recipe = plain_recipe(bench) if plain else bench.recipe()
    if plain:  # one that was saved before its first tensor
        (bench.out / ".streammerge").mkdir(parents=True)
        (bench.out / ".streammerge" / "lock").write_text("4711\nmodel.safetensors.partial\n")
        output = make_plan(load_recipe(recipe)).output
        journal = Journal(bench.out / ".streammerge", fingerprint(output, {"path": "without calibration"}))
        journal.save({"placed": [], "composed": {}}, time.monotonic())
    else:  # one that was stopped when all was merged and saved
        with monkeypatch.context() as patch:
            patch.setattr("streammerge.io.writer.CheckpointWriter.finish", stopped)
            assert main(["merge", str(recipe), str(bench.out), "--quiet", "--save-every", "0"]) in (75, 130)
    before = traces(bench.root)
    assert planned(bench, recipe, bench.out)["disk"]["unfinished"] == "is resumed"
    told = []
    for command in ("plan", "merge"):
        assert main([command, str(recipe), str(bench.out), "--lambda", "0.5", "--quiet"]) == 3
        told.append(bench.capfd.readouterr().err)
        assert traces(bench.root) == before or command == "merge"
    assert told[1].startswith(told[0]) and "recipe: lambda: was 1.0, is 0.5" in told[0]
    flags = (bench.out, "--lambda", "0.5", "--restart", "--dry-run")
    assert "anew" in planned(bench, recipe, *flags, command="merge")["disk"]["unfinished"]


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("out", ["deep/out", "out", ""])
@pytest.mark.parametrize("plain", [True, False])
def test_leaves_no_trace(bench, plain, out):
    """No folder, no lock, no changed time: not in OUT's place, not in the inputs."""
    recipe = plain_recipe(bench) if plain else bench.recipe()
    (bench.root / "out").mkdir()
    before = traces(bench.root)
    plan = planned(bench, recipe, *([bench.root / out] if out else []))
    assert traces(bench.root) == before
    assert (plan["disk"]["free"] is None) == (not out)
    measured = bool(out) and disk.write_speed(bench.root, 1 << 40) is not None  # a file system with nameless files
    assert plan["probe"]["write_assumed"] == (not measured)
    assert plan["disk"]["where"] == (None if not out else str(bench.root / out.replace("deep/out", "")).rstrip("/"))


def test_every_tensor_is_told(bench):
    plan = planned(bench, bench.recipe(modules=["q", "v", "down"], layers="0, 2", dtype="float16"))
    lrm = open_checkpoint(bench.models["lrm"], "lrm").tensors
    every = plan["per_tensor"]
    assert {n: (t["shape"], t["dtype"]) for n, t in every.items()} == {
        n: (list(t.shape), t.dtype) for n, t in lrm.items()
    }
    merged = {n: t for n, t in every.items() if t["action"] == "merged"}
    assert {(t["layer"], t["module"]) for t in merged.values()} == {(n, m) for n in (0, 2) for m in ("q", "v", "down")}
    assert plan["tensors"] == {"merged": 6, "copied": len(lrm) - 6}
    for name, t in every.items():
        wanted = "F16" if name in merged else t["dtype"]
        assert t["written_as"] == wanted and ("lambda" in t) == (name in merged)
        assert t["bytes"] == lrm[name].nbytes // (2 if name in merged else 1)
    v = merged["model.layers.2.self_attn.v_proj.weight"]
    rows = plan["calibration"]["reasoning"]["omega"]
    assert v["basis"] == {"site": "attn_in and attended", "rule": "energy 0.97", "count": 2, "rows": 3 * rows,
                          "width": 48, "rank_at_most": 48}  # fmt: skip
    assert "each key/value head" in v["alpha"] and v["lambda"] == 1.0
    groups = {g["tensors"]: g for g in plan["groups"]}
    q = groups["model.layers.*.self_attn.q_proj.weight"]
    assert Counter(g["action"] for g in plan["groups"] if g["tensors"] == q["tensors"]) == {"merged": 1, "copied": 1}
    assert [g["layers"] for g in plan["groups"] if g["tensors"] == q["tensors"]] == ["0, 2", "1"]
    assert sum(g["count"] for g in plan["groups"]) == len(lrm)
    assert sum(g["bytes"] for g in plan["groups"]) == sum(t["bytes"] for t in every.values())


def test_json_keys(bench):
    for recipe in (bench.recipe(), plain_recipe(bench)):
        plan = planned(bench, recipe, bench.out)
        assert plan.keys() == {
            "streammerge", "recipe", "models", "versions", "tensors", "out", "groups", "per_tensor", "warnings", "disk",
            "calibration", "device", "compute_dtype", "plan", "probe", "time", "seconds",
        }  # fmt: skip
        assert {"output", "free", "where", "unfinished"} <= plan["disk"].keys()
        assert {"read_rate", "read_bytes", "read_cached", "write_rate", "write_bytes", "write_assumed",
                "elements"} <= plan["probe"].keys()  # fmt: skip
        assert plan["time"]["total"] == pytest.approx(sum(plan["time"]["parts"].values())) and plan["time"]["estimate"]
        assert all(seconds >= 0 for seconds in plan["time"]["parts"].values())


@pytest.mark.parametrize("keys", [{"coefficients": {"scope": "layer"}}, {"basis": {"rank": "none"}}, STAGE, PLAIN],
                         ids=str)  # fmt: skip
def test_the_merge_then_reports_the_same_numbers(bench, keys):
    """Terms of the memory's sum, choice, tokens, tensors, and the very bytes of the output."""
    recipe = plain_recipe(bench) if keys == PLAIN else bench.recipe(**keys)
    flags = ("--host-memory", "3GiB", "--tokens-per-batch", "256", "--lambda", "0.7", "--threads", "2")
    before = torch.get_num_threads()
    try:
        plan = planned(bench, recipe, bench.out, *flags)
        report = planned(bench, recipe, bench.out, *flags, command="merge")
    finally:
        torch.set_num_threads(before)
    assert plan["plan"] == report["plan"]
    assert plan["plan"].get("workers", 2) == 2
    for key in ("recipe", "models", "versions", "tensors", "device", "compute_dtype"):
        assert plan[key] == report[key], key
    tokens = plan["calibration"].pop("tokens")
    twice = sum(tokens.values()) + tokens.get("heldout", 0)
    assert twice == report["throughput"]["calibration_tokens"]
    assert plan["calibration"] == report["calibration"]
    assert plan["disk"]["output"] == sum(f.stat().st_size for f in bench.out.glob("*.safetensors"))
    merged = {n for n, t in plan["per_tensor"].items() if t["action"] == "merged"}
    assert merged == report["per_tensor"].keys()
    for name, told in report["per_tensor"].items():
        basis = plan["per_tensor"][name]["basis"]
        assert (basis is None) == (keys == PLAIN or "basis" in keys)
        assert told["rank"] <= (basis["rank_at_most"] if basis else 0)
        assert told["rows"] == (basis["rows"] if basis else 0)


def test_dry_run_is_the_plan(bench):
    recipe = bench.recipe()
    plan = planned(bench, recipe, bench.out)
    before = traces(bench.root)
    dry = planned(bench, recipe, bench.out, "--dry-run", command="merge")
    assert traces(bench.root) == before
    for told in (plan, dry):
        assert [told.pop(k) for k in ("time", "probe", "seconds")] and told["disk"].pop("free")
    assert plan == dry


def test_what_a_terminal_shows(bench):
    assert main(["plan", str(bench.recipe()), str(bench.out)]) == 0
    told = bench.capfd.readouterr()
    assert told.out == ""
    for word in ("self_attn.q_proj", "0-2", "48x48", "merged", "copied", "model.norm", "calibration tokens:",
                 "predicted peak, host", "libraries", "free at", "estimated time:", "matmul", "writing",
                 "α of q, o", "projection of gate, up", "tokens a batch", "page cache"):  # fmt: skip
        assert word in told.err, word


def test_a_plain_plan_needs_no_torch(bench):
    code = (f"import sys; from streammerge.cli import main; code = main(['plan', {str(plain_recipe(bench))!r}, "
            f"{str(bench.out)!r}]); print(code, {{'torch', 'transformers'}} & sys.modules.keys())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 set()\n", done.stdout + done.stderr


def test_probes_are_bounded_and_tell_what_was_cached(bench, monkeypatch):
    lrm = open_checkpoint(bench.models["lrm"], "lrm")
    files = {t.file for t in lrm.tensors.values()}
    size = sum(f.stat().st_size for f in files)
    found = disk.read_speed((lrm, lrm))
    assert found.sample == size and found.rate > 0 and found.cached in (1.0, None)
    monkeypatch.setattr(disk, "PIECE", 1 << 10)
    monkeypatch.setattr(disk, "READ", 8 << 10)
    assert 4 << 10 <= disk.read_speed((lrm,)).sample <= 8 << 10 < size
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    assert disk.read_speed((lrm,)).cached != 1.0
    assert disk.write_speed(bench.root / "nowhere", 1 << 40) is None
    assert disk.write_speed(bench.root, 1 << 10) is None  # hardly any room: it is left alone
    written = disk.write_speed(bench.root, 1 << 40)
    assert written is None or written.sample == disk.WRITE


def test_the_estimate_follows_speeds_and_tokens(bench):
    """Deterministic in the speeds: what each part grows with."""
    from streammerge import pipeline
    from streammerge.estimate import predict
    from streammerge.progress import Progress

    plan = make_plan(load_recipe(bench.recipe(coefficients={"scope": "model"})))
    data = pipeline.calibrate(plan, Progress("quiet"))
    settings = predict(plan, data, torch.device("cpu"), torch.float32)

    def parts(read=1e9, write=1e9, **speeds) -> dict[str, float]:
        known = {"matmul": 1e9, "single": 1e9, "elements": 1e9, "operator": 0.0} | speeds
        return sweep_parts(plan, data, settings, Speeds(**known), read, write)

    usual, free = parts(), float("inf")
    only_matmul = parts(single=free, elements=free)
    layers = plan.layers * 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 96)  # operations of a token's linear modules
    padded = sum(len(s.ids) for s in data.instruction)
    assert layers * padded / 1e9 <= only_matmul["forwards: instruction"] <= 2 * layers * padded / 1e9
    twice = parts(single=free, elements=free, matmul=2e9)
    assert twice["forwards: instruction"] == pytest.approx(only_matmul["forwards: instruction"] / 2)
    assert usual["waiting for the disk"] < 1e-2 and sum(usual.values()) < sum(parts(operator=1e-5).values())
    slow = parts(read=1e5, write=free)  # an hour of disk is not hidden behind a second of work
    inside = [t for n, t in plan.lrm.tensors.items() if n.startswith("model.layers.")]
    read = 2 * sum(t.nbytes for t in inside) + 2 * sum(plan.lrm.tensors[n].nbytes for n in plan.merged)
    assert read / 1e5 - sum(usual.values()) < slow["waiting for the disk"] < 2 * read / 1e5
    some = make_plan(load_recipe(bench.recipe(coefficients={"scope": "model"}, layers="1")))
    third = sweep_parts(some, data, settings, Speeds(1e9, 1e9, 1e9, 0.0), 1e9, 1e9)
    for part in ("composing", "bases"):
        assert third[part] == pytest.approx(usual[part] / 3)
    assert third["forwards: reasoning"] == usual["forwards: reasoning"]
    work = plain_time.plain_parts(plan, 2, DiskSpeed(1e6, 1, 1.0), 1e12, 1e12)
    cold = plain_time.plain_parts(plan, 2, DiskSpeed(1e6, 1, 0.0), 1e12, 1e12)
    assert work["arithmetic"] == pytest.approx(cold["waiting for the disk"] / 2, rel=1e-3)


def test_spans():
    assert spans([3, 0, 1, 2, 7]) == "0-3, 7" and spans([]) == "" and spans([5]) == "5"
