"""Rounded weights in the calibration forwards: the same arithmetic as a model that was rounded, a cache that is never
wrong, and merged weights that are as stored but for the bases and α."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from builders import recipe_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge import capture_cache, merge, parse_recipe, pipeline, quantized, sweep
from streammerge.capture_cache import Quantized, checksum
from streammerge.errors import InputError, RecipeError
from streammerge.io.checkpoint import Checkpoint
from streammerge.planned import make_plan

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install streammerge[quantized]")

METHODS = ("int8", "nf4")
CPU = torch.device("cpu")
NF4 = torch.tensor([  # the sixteen values of the QLoRA paper (appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def by_hand(method: str, weight: torch.Tensor) -> torch.Tensor:
    """The fp32 weight nearest to `weight` that the method can hold, without bitsandbytes."""
    weight = weight.float()
    if method == "int8":
        scale = weight.abs().amax(1, keepdim=True)
        return torch.round(weight * (127 / scale)) * scale / 127
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = ((flat / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)


def read_all(path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return tensors


def same_bytes(a, b) -> bool:
    files = sorted(p.name for p in a.glob("*.safetensors"))
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files) and bool(files)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture()
def own(trio, tmp_path):
    """The trio with an LRM that a test may damage."""
    return {**trio, "lrm": shutil.copytree(trio["lrm"], tmp_path / "lrm")}


@pytest.fixture()
def run_merge(own, sets, tmp_path):
    """A function of (name, paths, recipe keys) that merges with a cache of the test's own and returns the report."""

    def run(name: str, method: str = "nf4", paths: dict | None = None, **keys) -> dict:
        if method != "native" and keys.get("coefficients", {}).get("scope", "model") == "model":
            keys.setdefault("capture_cache", str(tmp_path / "cache"))
        text = recipe_text(paths or own, sets, capture_weights=method, **keys)
        return merge(parse_recipe(text, "test.yml"), tmp_path / name)

    return run


@pytest.fixture()
def seen(monkeypatch):
    """The bases of every layer that is swept."""
    found, plain = [], sweep.build_bases

    def record(*args):
        found.append(plain(*args))
        return found[-1]

    monkeypatch.setattr(sweep, "build_bases", record)
    return found


def equal_bases(a, b) -> bool:
    pairs = [(a.sites[s], b.sites[s]) for s in a.sites] + list(zip(a.values, b.values, strict=True))
    return a.sites.keys() == b.sites.keys() and all(torch.equal(x.u, y.u) for x, y in pairs)


# ---- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 64), (48, 96), (65, 129)])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_comes_back_as_the_nearest_that_the_method_holds(method, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, scales = quantized.pack(method, weight)
    found = quantized.unpack(method, codes, scales, shape, torch.float32)
    torch.testing.assert_close(found, by_hand(method, weight), rtol=2e-7, atol=0)
    assert torch.equal(quantized.unpack(method, codes, scales, shape, dtype), found.to(dtype))
    blocks = -(-weight.numel() // 64)
    sizes = (weight.numel(), shape[0]) if method == "int8" else (32 * blocks, blocks)
    assert (codes.numel(), scales.numel()) == sizes and codes.element_size() == 1


@pytest.mark.parametrize("method", METHODS)
def test_pieces_change_nothing(method, monkeypatch):
    weight = torch.randn(37, 40)
    whole = quantized.pack(method, weight)
    monkeypatch.setattr(quantized, "_PIECE", 128)
    for a, b in zip(whole, quantized.pack(method, weight), strict=True):
        assert torch.equal(a, b)
    parts = quantized.unpack(method, *whole, weight.shape, torch.float32)
    monkeypatch.setattr(quantized, "_PIECE", 1 << 20)
    assert torch.equal(parts, quantized.unpack(method, *whole, weight.shape, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_weight_shows(method, bad):
    weight = torch.randn(4, 64)
    weight[2, 5] = bad
    codes, scales = quantized.pack(method, weight)
    assert torch.isnan(scales).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(method, dtype):
    """A pruned row or block has the scale 0."""
    weight = torch.randn(4, 64).to(dtype)
    weight[1] = 0
    found = quantized.unpack(method, *quantized.pack(method, weight), weight.shape, dtype)
    assert found[1].eq(0).all() and found[0].ne(0).any() and torch.isfinite(found).all()


def test_checksums_see_every_bit():
    data = torch.randint(0, 256, (3001,), dtype=torch.uint8)
    before = checksum(data)
    assert torch.equal(before, checksum(data.clone())) and before != checksum(data.flip(0))
    for at in (0, 7, 8, 1500, 3000):
        for bit in (1, 128):
            changed = data.clone()
            changed[at] ^= bit
            assert checksum(changed) != before, (at, bit)


# ---- what a merge computes


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_capture_is_that_of_the_rounded_model(run_merge, own, tmp_path, seen, method, scope, one_thread):
    """Bit for bit the bases, and with scope `model` the attention and α, of a checkpoint that holds rounded weights."""
    rounded = {**own, "lrm": shutil.copytree(own["lrm"], tmp_path / "rounded")}
    for file in rounded["lrm"].glob("*.safetensors"):
        tensors = load_file(file)
        for name in filter(is_linear, tensors):
            w = tensors[name]
            tensors[name] = quantized.unpack(method, *quantized.pack(method, w), w.shape, w.dtype)
        save_file(tensors, file, {"format": "pt"})
    told = run_merge("a", method, coefficients={"scope": scope})
    mine = seen[:]
    seen.clear()
    wanted = run_merge("b", "native", rounded, coefficients={"scope": scope})
    assert len(mine) == len(seen) == 3 and all(map(equal_bases, mine, seen))
    seen.clear()
    plain = run_merge("c", "native", coefficients={"scope": scope})
    assert not any(map(equal_bases, mine, seen))  # it is not simply the LRM
    if scope == "model":
        assert told["attention"] == wanted["attention"] and told["alpha"] == wanted["alpha"] != plain["alpha"]
        assert told["capture"]["layers_cached"] == 3
    else:
        assert told["capture"]["cache"] is None and told["capture"]["bytes_saved"] == 0


@pytest.mark.parametrize("keys", [{"coefficients": {"rule": "uniform"}}, {"coefficients": {"scope": "layer"}}, {}])
def test_merged_weights_are_as_stored_but_for_bases_and_alpha(run_merge, seen, tmp_path, monkeypatch, keys, one_thread):
    """A native merge that is handed these bases (and with scope `model` this α) writes the same bytes: what is merged,
    the probe of scope `layer` and L_think never see a rounded weight."""
    if keys.get("coefficients", {}).get("rule") == "uniform":
        keys = {**keys, "capture_cache": "auto"}  # no cache is used
    found = []
    plain = sweep.alphas
    monkeypatch.setattr(sweep, "alphas", lambda *args: found.append(plain(*args)) or found[-1])
    told = run_merge("a", "nf4", **keys)
    bases, alpha = iter(seen[:]), iter(found[:])
    monkeypatch.setattr(sweep, "build_bases", lambda *args: next(bases))
    if keys == {}:
        monkeypatch.setattr(sweep, "alphas", lambda *args: next(alpha))
    keys.pop("capture_cache", None)
    wanted = run_merge("b", "native", **keys)
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert told["l_think"] == wanted["l_think"] and told["per_tensor"] == wanted["per_tensor"]
    if keys:
        assert told["attention"] == wanted["attention"]


# ---- the cache


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_reads_the_cache_and_writes_the_same_bytes(run_merge, tmp_path, method, monkeypatch):
    reads, plain = [], Checkpoint.read

    def counted(self, name):
        reads.append((self.role, name))
        return plain(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    first = run_merge("a", method)
    lrm_reads = [len([r for r in reads if r[0] == "reasoning_model" and is_linear(r[1])])]
    reads.clear()
    second = run_merge("b", method)
    lrm_reads.append(len([r for r in reads if r[0] == "reasoning_model" and is_linear(r[1])]))
    assert lrm_reads == [2 * 21, 21]  # once to be rounded, and once to be merged
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert (first["capture"]["layers_cached"], second["capture"]["layers_from_cache"]) == (3, 3)
    saved = first["throughput"]["bytes_read"] - second["throughput"]["bytes_read"]
    assert saved == second["capture"]["bytes_saved"] > 0 == first["capture"]["bytes_saved"]
    share = second["capture"]["bytes_from_cache"] / (saved + second["capture"]["bytes_from_cache"])
    assert share < (0.30 if method == "int8" else 0.17)  # of fp32
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == [f"layer-{i:05d}.safetensors" for i in range(3)]
    assert not [w for r in (first, second) for w in r["warnings"] if "capture" in w]


def test_methods_have_caches_of_their_own(run_merge):
    for method in METHODS:
        assert run_merge(method, method)["capture"]["layers_from_cache"] == 0


CHANGES = ("weights", "time", "version")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint_is_noticed(run_merge, own, tmp_path, change, monkeypatch):
    run_merge("a")
    file = sorted(own["lrm"].glob("*.safetensors"))[2]
    if change == "weights":
        tensors = load_file(file)
        save_file({n: t * 1.5 for n, t in tensors.items()}, file, {"format": "pt"})
    elif change == "time":
        os.utime(file, ns=(1, 1))
    else:
        monkeypatch.setattr(capture_cache, "version", lambda: "0.0")
    told = run_merge("b")
    assert told["capture"]["layers_from_cache"] == 0 and told["capture"]["layers_cached"] == 3
    assert [w for w in told["warnings"] if "3 layers were made from other files or by other versions; made again" in w]
    assert run_merge("fresh", capture_cache=str(tmp_path / "other"))["alpha"] == told["alpha"]
    assert same_bytes(tmp_path / "b", tmp_path / "fresh")
    again = run_merge("c")
    assert again["capture"]["layers_from_cache"] == 3 and again["capture"]["rebuilt"] == []


def damage_codes(file, other):
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 16
    file.write_bytes(raw)


def damage_first_tensor(file, other):
    raw = bytearray(file.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the checksums
    file.write_bytes(raw)


def rewrite(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def scale_of(tensors):
    return next(n for n in sorted(tensors) if n.endswith(".scale"))


DAMAGES = {
    "a bit of the codes": damage_codes,
    "a bit of the checksums": damage_first_tensor,
    "cut short": lambda file, other: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file, other: file.write_bytes(b""),
    "not safetensors": lambda file, other: file.write_bytes(b"<html>" * 100),
    "another layer's": lambda file, other: shutil.copy(other, file),
    "a tensor is missing": lambda file, other: rewrite(file, lambda t: t.pop(scale_of(t))),
    "a scale is infinite": lambda file, other: rewrite(file, lambda t: t[scale_of(t)].fill_(float("inf"))),
    "another dtype": lambda file, other: rewrite(file, lambda t: t.update({scale_of(t): t[scale_of(t)].double()})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_noticed(run_merge, tmp_path, damage):
    run_merge("a")
    file, other = (next((tmp_path / "cache").rglob(f"layer-0000{i}.safetensors")) for i in (1, 2))
    DAMAGES[damage](file, other)
    told = run_merge("b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert told["capture"]["layers_from_cache"] == 2 and told["capture"]["layers_cached"] == 1
    assert [w for w in told["warnings"] if "layer 1: " in w and w.endswith("made again")]
    again = run_merge("c")
    assert again["capture"]["layers_from_cache"] == 3 and again["capture"]["rebuilt"] == []


def test_a_cache_that_cannot_be_written_is_told(run_merge, tmp_path):
    (tmp_path / "file").write_text("")
    told = run_merge("a", capture_cache=str(tmp_path / "file"))
    assert [w for w in told["warnings"] if "cannot be written" in w and "the next run reads the LRM again" in w]
    assert told["capture"]["layers_cached"] == 0


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    file = tmp_path / "new" / "layer.safetensors"
    entries = [("a", "F32", (4,)), ("b", "U8", (3,))]
    with pytest.raises(OSError):
        capture_cache._write_file(file, entries, {"a": lambda: torch.ones(4), "b": full})
    assert list(file.parent.iterdir()) == []
    capture_cache._write_file(file, entries, {"a": lambda: torch.ones(4), "b": lambda: torch.ones(3).byte()})
    assert load_file(file)["b"].tolist() == [1, 1, 1] and len(list(file.parent.iterdir())) == 1


def test_layers_that_stay_on_the_device_are_not_read_twice(run_merge, own, sets, tmp_path):
    """Where the stored layer is kept for the second pass, the cache would only add to the reading."""
    run_merge("a")
    keys = {"capture_weights": "nf4", "capture_cache": str(tmp_path / "cache")}
    plan = make_plan(parse_recipe(recipe_text(own, sets, **keys), "test.yml"))
    room = sum(plan.lrm.tensors[n].nbytes for n in plan.layer_tensors(0))
    source = Quantized(plan, CPU, torch.float32, keep=room, survey=True)
    roles = [{checkpoint.role for checkpoint, _ in source.order(layer)} for layer in range(3)]
    assert roles == [{"reasoning_model"}, {"capture_cache"}, {"capture_cache"}]
    stored, rounded = source.survey(0, lambda checkpoint, name: checkpoint.read(name), None)  # nothing to write
    for name, tensor in stored.items():
        assert torch.equal(tensor, plan.lrm.read(name)) and torch.equal(tensor, rounded[name]) != is_linear(name)
    assert stored.keys() == set(plan.layer_tensors(0))
    assert source.survey(1, lambda checkpoint, name: checkpoint.read(name), None)[0] == {}


# ---- errors


def test_without_bitsandbytes_nothing_is_begun(run_merge, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    quantized._library.cache_clear()
    monkeypatch.setattr(pipeline, "make_plan", lambda recipe: pytest.fail("work was begun"))
    with pytest.raises(RecipeError, match=r"nf4 needs bitsandbytes.*pip install 'streammerge\[quantized\]'") as caught:
        run_merge("out")
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    run_merge("native", "native")  # nobody asked for it


def test_a_library_that_cannot_round_here_is_an_error(run_merge, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(quantized._library(), "quantize_4bit", broken)
    with pytest.raises(RecipeError, match="cannot run on cpu.*no kernel image"):
        run_merge("out")
    assert not (tmp_path / "out").exists()


WRONG = {
    "nothing is calibrated": {"merge_method": "task_arithmetic", "capture_weights": "nf4"},
    "no stage sees them": {"capture_weights": "nf4", "basis": {"rank": "none"}, "coefficients": {"scope": "layer"}},
    "a cache for nothing": {"capture_cache": "here"},
    "no second reading": {"capture_weights": "int8", "capture_cache": "x", "coefficients": {"scope": "layer"}},
    "no folder": {"capture_weights": "int8", "capture_cache": ""},
    "no such method": {"capture_weights": "fp4"},
}


@pytest.mark.parametrize("case", WRONG)
def test_keys_without_effect_are_mistakes(make_recipe, case):
    with pytest.raises(RecipeError, match="capture_(weights|cache)"):
        make_recipe(**WRONG[case])


def test_a_cache_beside_the_recipe(trio, sets, tmp_path):
    text = recipe_text(trio, sets, capture_weights="nf4", capture_cache="cache")
    assert parse_recipe(text, "r.yml", tmp_path).capture_cache == str(tmp_path / "cache")


def test_auto_is_the_users_cache(make_recipe, monkeypatch, tmp_path):
    recipe = make_recipe(capture_weights="nf4")
    plan = make_plan(recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = capture_cache.cache_folder(recipe, plan.lrm, CPU)
    assert folder.parent == tmp_path / "streammerge" / "capture" and folder.name.endswith("-nf4-cpu")
    other = capture_cache.cache_folder(recipe, dataclasses.replace(plan.lrm, path=tmp_path), CPU)
    assert other != folder


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_weights_are_named(run_merge, own, method):
    file = sorted(own["lrm"].glob("*.safetensors"))[2]
    tensors = load_file(file)
    name = next(filter(is_linear, sorted(tensors)))
    tensors[name][1, 1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=name):
        run_merge("out", method)
    with pytest.raises(InputError, match=name):  # nor does the cache hide it
        run_merge("again", method)


def test_the_import_fetches_nothing(tmp_path):
    """bitsandbytes downloads a kernel as it is imported, where Hugging Face's `kernels` is installed."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import sys; from streammerge import quantized; quantized._library(); assert 'kernels' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
