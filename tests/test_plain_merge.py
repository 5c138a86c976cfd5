"""Merges without calibration: the sweep's bytes whatever the threads, in memory that does not know the model."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import recipe_text, save_trio
from damage import snapshot
from safetensors.torch import load_file, save_file
from test_memory import merged_by_command

from streammerge import arithmetic, codec, merge, parse_recipe, pipeline, plain, scan
from streammerge.cli import main
from streammerge.errors import InputError, ResourceError, UnchangedError, VerificationError
from streammerge.io.checkpoint import Checkpoint
from streammerge.io.writer import CheckpointWriter
from streammerge.planned import make_plan
from streammerge.progress import Progress
from streammerge.threads import in_parallel

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def recipe_of(paths, **keys):
    return parse_recipe(recipe_text(paths, None, **{"merge_method": "task_arithmetic", "lambda": 0.3} | keys), "t.yml")


# what tells of the command and its budget, and the hashes of these
OF_THE_RUN = ("README.md", "streammerge_config.yml", "streammerge_manifest.json", "SHA256SUMS")


def assert_same_bytes(a: Path, b: Path, but: tuple[str, ...] = ()) -> None:
    """Every file but the report, and those of `but`."""
    one, other = (
        {p.name: p.read_bytes() for p in path.iterdir() if p.name not in ("streammerge_report.json", *but)}
        for path in (a, b)
    )
    assert one.keys() == other.keys() and len(one) > 1
    assert [name for name in one if one[name] != other[name]] == []


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces far smaller than the test models' tensors, and dividing none of them."""
    monkeypatch.setattr(scan, "PIECE", 824)
    monkeypatch.setattr(arithmetic, "_ROW", 100)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A trio whose tensors have four float dtypes, differently in each model; an untied head, odd sizes, shards."""
    paths = save_trio(tmp_path_factory.mktemp("mixed"), "mistral", hidden=36, intermediate_size=52, layers=2)
    for shift, path in enumerate(paths.values()):
        for file in path.glob("*.safetensors"):
            named = load_file(file)
            kinds = [list(DTYPES.values())[(sum(map(ord, name)) + shift * (len(name) % 3)) % 4] for name in named]
            changed = {n: t.to(kind) for (n, t), kind in zip(named.items(), kinds, strict=True)}
            save_file(changed, file, metadata={"format": "pt"})
    return paths


# ---- the same bytes


@pytest.mark.parametrize("keys", [
    {}, {"lambda": 1.0}, {"lambda": -1.7}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float16"},
    {"shard_size": "40KB"}, {"layers": "1", "modules": ["q", "down"]},
    {"merge_method": "rain", "basis": {"rank": "none"}, "coefficients": {"rule": "uniform"}},
], ids=str)  # fmt: skip
def test_the_sweeps_bytes(mixed, tmp_path, keys):
    recipe = recipe_of(mixed, **keys)
    assert plain.is_plain(recipe)
    told = merge(recipe, tmp_path / "plain")
    swept = pipeline.merge(recipe, tmp_path / "swept")
    assert_same_bytes(tmp_path / "plain", tmp_path / "swept", OF_THE_RUN)
    assert told["kernels"] == "numpy" and told["per_tensor"].keys() == swept["per_tensor"].keys()
    for name, found in told["per_tensor"].items():
        wanted = swept["per_tensor"][name]
        assert found["changed"] == wanted["changed"] > 0 and found["finite"] and found["width"] == wanted["width"]
        for norm in ("delta", "kept", "applied", "weight"):
            assert found[norm] == pytest.approx(wanted[norm], rel=1e-5), (name, norm)
    assert told["alpha"] == swept["alpha"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_formula_in_float32(tmp_path, family, dtype):
    """Tied heads, biases; each factor and the sum rounded once, then once to the output's dtype."""
    paths = save_trio(tmp_path, family, dtype=getattr(torch, dtype), layers=2)
    report = merge(recipe_of(paths), tmp_path / "out")
    lrm, itm, base, merged = (weights(p) for p in (*(paths[r] for r in ("lrm", "itm", "base")), tmp_path / "out"))
    assert len(report["per_tensor"]) == 14
    for name in lrm:
        wanted = lrm[name]
        if name in report["per_tensor"]:
            product = torch.tensor(0.3) * (itm[name].float() - base[name].float())
            wanted = (lrm[name].float() + product).to(lrm[name].dtype)
        assert torch.equal(merged[name], wanted), name


@pytest.mark.parametrize("threads", [2, 5])
def test_bytes_and_report_do_not_know_the_threads(mixed, tmp_path, threads):
    one = merge(recipe_of(mixed), tmp_path / "one", threads=1)
    many = merge(recipe_of(mixed), tmp_path / "many", threads=threads)
    assert_same_bytes(tmp_path / "one", tmp_path / "many")
    assert one["per_tensor"] == many["per_tensor"] and one["totals"] == many["totals"]


def test_a_proxy_base(mixed, tmp_path):
    recipe = dataclasses.replace(recipe_of(mixed), base_model="", proxy_base=True)
    merge(recipe, tmp_path / "plain")
    pipeline.merge(recipe, tmp_path / "swept")
    assert_same_bytes(tmp_path / "plain", tmp_path / "swept", OF_THE_RUN)


def test_norms_of_weights_that_fp32_cannot_square(tmp_path):
    """1e-25 and 1e25 are fp32 numbers; their squares are not."""
    paths = save_trio(tmp_path, "llama", layers=1)
    for path in paths.values():
        for file in path.glob("*.safetensors"):
            save_file({n: t * (1e-25 if "q_proj" in n else 1e25 if "k_proj" in n else 1)
                       for n, t in load_file(file).items()}, file, metadata={"format": "pt"})  # fmt: skip
    found = merge(recipe_of(paths), tmp_path / "out")["per_tensor"]
    lrm = weights(paths["lrm"])
    for name in (n for n in lrm if "q_proj" in n or "k_proj" in n):
        assert found[name]["weight"] == pytest.approx(float(lrm[name].double().norm()), rel=1e-6, abs=0)


def test_with_samples_or_an_alpha_it_is_the_sweep(make_recipe, mixed):
    """L_think needs streams: a task arithmetic that has samples to measure it on goes layer by layer."""
    assert not plain.is_plain(make_recipe(merge_method="task_arithmetic"))
    scaled = {"basis": {"rank": "none"}, "coefficients": {"rule": "uniform", "value": 0.7}}
    assert not plain.is_plain(recipe_of(mixed, merge_method="rain", **scaled))
    assert not plain.is_plain(make_recipe(basis={"rank": "none"}, coefficients={"rule": "uniform"}))


# ---- the codec


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_16_bit_word_is_decoded_as_torch_does(code):
    words = np.arange(1 << 16, dtype=np.uint16)
    wanted = torch.from_numpy(words.view(np.int16)).view(DTYPES[code])
    for wide in (torch.float32, torch.float64):
        out = torch.empty(1 << 16, dtype=wide).numpy()
        with np.errstate(invalid="ignore"):  # signalling NaNs
            codec.decode(words.view(codec.WORDS[code]), code, out)
        assert np.array_equal(out, wanted.to(wide).numpy(), equal_nan=True)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_rounding_is_torchs(code, wide):
    """Ties, carries into the exponent, subnormals, the largest finite values, random bits."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bits[:50_000] = bits[:50_000] & 0xFFFF0000 | 0x8000  # ties of bf16
    bits[50_000:100_000] = bits[50_000:100_000] & 0xFFFFE000 | 0x1000  # ties of fp16
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([3.4e38, -3.39e38, 65519, 65520, 0.0, -0.0])])
    values = values.astype(wide) * (1 + 2**-40 if wide is np.float64 else 1)
    out = np.empty(len(values), codec.WORDS[code])
    with np.errstate(all="ignore"):
        codec.encode(values, code, out, np.empty(len(values), np.float32))
    wanted = torch.from_numpy(values).to(DTYPES[code])
    assert out.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


def test_pairs_are_what_single_words_are():
    """Every word in both places of a pair; ties and random bits; several rows at a time."""
    rng = np.random.default_rng(1)
    words = np.arange(1 << 16, dtype=np.uint16)
    words = np.stack([words, np.roll(words, 1), rng.permutation(words)])
    wide, wanted = np.empty((3, 2, 1 << 15), np.float32), np.empty((3, 1 << 16), np.float32)
    codec.decode_pairs(words, wide)
    for row, out in zip(words, wanted, strict=True):
        codec.decode(row, "BF16", out)
    assert np.array_equal(wide.view(np.uint32), np.stack([wanted[:, ::2], wanted[:, 1::2]], 1).view(np.uint32))
    bits = rng.integers(0, 1 << 32, (2, 100_000), dtype=np.uint32)
    bits[:, :30_000] = bits[:, :30_000] & 0xFFFF0000 | 0x8000  # ties
    values, pairs, single = bits.view(np.float32), np.empty(200_000, np.uint16), np.empty(200_000, np.uint16)
    codec.encode_pairs(values, pairs, np.empty_like(values))
    codec.encode(np.ascontiguousarray(values.T).reshape(-1), "BF16", single, np.empty(200_000, np.float32))
    assert np.array_equal(pairs, single)


@pytest.mark.parametrize("count", [1, 2, 7, 4001])
def test_chunks_of_bf16_with_and_without_a_last_pair(count):
    generator = torch.Generator().manual_seed(count)
    lrm, itm, base = (torch.randn(count, generator=generator).bfloat16() for _ in range(3))
    chunk = arithmetic.Chunk({"BF16"}, {"BF16"}, 8002)
    for row, tensor in zip(chunk.stored, (lrm, itm, base), strict=False):
        row[: 2 * count] = tensor.view(torch.uint8).numpy()
    told = chunk.merge(["BF16"] * 3, "BF16", count, 0.3)
    wanted = (lrm.float() + torch.tensor(0.3) * (itm.float() - base.float())).bfloat16()
    assert chunk.stored[3, : 2 * count].tobytes() == wanted.view(torch.uint8).numpy().tobytes()
    assert told.changed == int((wanted != lrm).sum()) > 0
    assert told.delta == pytest.approx(float((itm.double() - base.double()).square().sum()), rel=1e-5)
    assert told.weight == pytest.approx(float(lrm.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("code", DTYPES)
def test_what_holds_is_finite(code):
    """The largest bound that passes without a look is stored as a finite number, and no more than 1 % is given away."""
    largest = torch.finfo(DTYPES[code]).max
    bounds = [b for b in (largest * (1 + k / 4096) for k in range(-41, 42)) if codec.holds(code, b)]
    assert codec.holds(code, 0.99 * largest) and not codec.holds(code, float("inf"))
    wide = torch.tensor(bounds, dtype=torch.float64)
    assert torch.isfinite((wide if code == "F64" else wide.float()).to(DTYPES[code])).all()


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
], ids=str)  # fmt: skip
def test_finite_is_what_torch_calls_finite(dtype):
    from streammerge.io.header import TORCH_DTYPES

    code = next(c for c, d in TORCH_DTYPES.items() if d == dtype)
    size = dtype.itemsize
    top = np.arange(1 << min(16, 8 * size), dtype=np.uint64) << (8 * size - min(16, 8 * size))
    words = top.astype(f"u{size}")  # every sign and exponent, and all of a narrow dtype
    found = [codec.all_finite(words[i : i + 1].view(np.uint8), code) for i in range(len(words))]
    assert found == torch.isfinite(torch.from_numpy(words.view(f"i{size}")).view(dtype).float()
                                   if size < 8 else torch.from_numpy(words.view(np.float64))).tolist()  # fmt: skip
    assert codec.all_finite(words[:0], code) and codec.all_finite(np.full(9, 255, np.uint8), "U8")


# ---- errors


class Damaged:
    """A private trio, to be damaged."""

    def __init__(self, root: Path):
        self.root, self.paths = root, save_trio(root, "llama", layers=2)

    def edit(self, role: str, part: str, value: float) -> tuple[str, Path]:
        for file in sorted(self.paths[role].glob("*.safetensors")):
            named = load_file(file)
            for name in sorted(n for n in named if part in n):
                named[name].view(-1)[-1] = value
                save_file(named, file, metadata={"format": "pt"})
                return name, file
        raise AssertionError(part)

    def refused(self, kind, match: str, **keys) -> str:
        before = snapshot(self.root)
        with pytest.raises(kind, match=match) as error:
            merge(recipe_of(self.paths, **keys), self.root / "deep" / "out", threads=2)
        assert snapshot(self.root) == before, "something was left behind"
        return str(error.value)


@pytest.fixture()
def damaged(tmp_path):
    return Damaged(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_all_named(damaged, value):
    places = [damaged.edit(*p, value) for p in (("itm", "1.mlp.up_proj"), ("base", "0.mlp.up_proj"), ("lrm", "k_proj"))]
    told = damaged.refused(InputError, "NaN or infinite")
    assert all(name in told and str(file) in told for name, file in places)


@pytest.mark.parametrize("role", ["base", "itm", "lrm"])
def test_a_nan_whose_bits_would_round_to_zero(damaged, role):
    """All bits set, as unwritten flash reads: adding half an ulp carries out of the sign."""
    name, file = damaged.edit(role, "1.mlp.up_proj", torch.tensor(-1, dtype=torch.int32).view(torch.float32).item())
    named = load_file(file)
    named[name].view(torch.int32).view(-1)[-1] = -1
    save_file(named, file, metadata={"format": "pt"})
    assert name in damaged.refused(InputError, "NaN or infinite", dtype="bfloat16")


@pytest.mark.parametrize("part", ["input_layernorm", "embed_tokens"])
def test_a_non_finite_weight_that_is_only_copied(damaged, part):
    name, file = damaged.edit("lrm", part, float("nan"))
    told = damaged.refused(InputError, "NaN or infinite")
    assert name in told and str(file.parent) in told and file.name in told


@pytest.mark.parametrize("keys", [
    {"lambda": 1e39}, {"lambda": 3e38}, *({"dtype": "float16", "lambda": x} for x in (1e9, -1e9, 1e-3)),
], ids=str)  # fmt: skip
def test_overflow(damaged, keys):
    """λ of either sign, λ beyond fp32 itself, Δ, and a weight of the LRM's own: each alone is too much."""
    if keys["lambda"] == 3e38:
        damaged.edit("itm", "q_proj", 1e3)
    if keys["lambda"] == 1e-3:
        damaged.edit("lrm", "q_proj", 1e5)
    damaged.refused(InputError, "overflow float.*lower lambda", **keys)


def test_unchanged(damaged):
    damaged.refused(UnchangedError, "changed nothing", **{"lambda": 0.0})
    damaged.paths["itm"] = damaged.paths["base"]
    damaged.refused(UnchangedError, "hold the same weights")


@pytest.mark.parametrize("role", ["base", "itm", "lrm"])
def test_an_input_cut_off_after_planning(damaged, monkeypatch, role):
    """One worker fails; the others stop, and nothing is left."""
    file = sorted(damaged.paths[role].glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    begin = CheckpointWriter.begin
    monkeypatch.setattr(CheckpointWriter, "begin", lambda *a: file.write_bytes(whole[:-4000]) and begin(*a))
    with pytest.raises(InputError, match=f"{file.name}.*ends at byte"):
        merge(recipe_of(damaged.paths), damaged.root / "out", threads=3)
    assert not (damaged.root / "out").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("streammerge")]


def test_ctrl_c(damaged, monkeypatch):
    import _thread

    read = Checkpoint.read_into

    def slow(self, name, view, offset):
        _thread.interrupt_main()
        time.sleep(0.01)
        return read(self, name, view, offset)

    monkeypatch.setattr(Checkpoint, "read_into", slow)
    with pytest.raises(KeyboardInterrupt):
        merge(recipe_of(damaged.paths), damaged.root / "out", threads=2)
    assert not (damaged.root / "out").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("streammerge")]


def test_a_budget_that_one_thread_does_not_fit(damaged):
    damaged.refused(ResourceError, "memory budget", budget={"host_memory": "1KB"})


def test_a_small_budget_means_fewer_threads(mixed):
    plan = make_plan(recipe_of(mixed))
    one = plain.fit_threads(plan, 1, float("inf"))
    assert plain.fit_threads(plan, 8, 3.5 * one.nbytes) == plain.Threads(3, 3 * one.nbytes)


def test_the_first_error_ends_all_jobs():
    done = []

    def start():
        def work(job):
            if job == 3:
                raise ValueError("three")
            time.sleep(0.005)
            done.append(job)
            return 1
        return work

    with pytest.raises(ValueError, match="three"):
        in_parallel(range(1000), start, 3)
    assert len(done) < 10


# ---- the written checkpoint is looked at again


@pytest.mark.parametrize("size", [1, 7, 8, 100])
def test_the_sum_of_a_piece_hears_of_every_bit(size):
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    before = scan.word_sum(data)
    for at in range(size):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert scan.word_sum(data) != before
            data[at] ^= 1 << bit
    assert scan.word_sum(data) == before < 1 << 64


def test_a_piece_that_was_never_put_has_no_sum():
    """Then what a later reading finds there is not what was written, whatever it is."""
    shard = scan.Shard("file", b"header", {"a": 824}, hashed=False)
    shard.sum("a", 0, np.zeros(824, np.uint8))
    assert [shard.sum_of(*p) for p in (("a", 0), ("a", 824), ("b", 0))] == [0, -1, -1]
    assert shard.sum_of("file", 0) == int.from_bytes(b"header", "little")


@pytest.mark.parametrize("threads", [1, 3])
def test_hashes_taken_while_writing_are_the_files(mixed, tmp_path, threads):
    """Several shards at a time, pieces in any order of threads."""
    merge(recipe_of(mixed, shard_size="40KB"), tmp_path / "out", threads=threads)
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert sum("safetensors" in line for line in lines) > 2
    for line in lines:
        wanted, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == wanted, name


@pytest.mark.parametrize("part, kind, told", [
    ("norm", VerificationError, "not a byte copy of model.layers.1.input_layernorm"),
    ("up_proj", VerificationError, "NaN or infinite"),
    ("down_proj", VerificationError, "1.mlp.down_proj.weight: holds other bytes than were written"),
])  # fmt: skip
@pytest.mark.parametrize("at", [0, -1])
def test_a_disk_that_lies_is_caught(damaged, monkeypatch, part, kind, told, at):
    """The last of a tensor's elements as well as the first: no piece is left out."""
    finish = CheckpointWriter.finish

    def spoil(self):
        finish(self)
        for file in self.out.glob("*.safetensors"):
            named = load_file(file)
            for name in named:
                if f"1.mlp.{part}" in name or f"1.input_layer{part}" in name:
                    named[name].view(-1)[at] = float("inf") if part == "up_proj" else 3.0
            save_file(named, file, metadata={"format": "pt"})

    monkeypatch.setattr(CheckpointWriter, "finish", spoil)
    monkeypatch.setattr(scan, "PIECE", 512)
    damaged.refused(kind, told)


# ---- progress, imports, memory


def test_progress_counts_every_byte(mixed, tmp_path, capsys):
    progress = Progress("quiet")
    report = merge(recipe_of(mixed), tmp_path / "out", progress=progress)
    assert progress._done == progress._total == progress._bytes == report["plan"]["disk"]


def test_a_device_that_is_not_there_is_still_an_error(mixed, tmp_path, capsys):
    (tmp_path / "r.yml").write_text(recipe_text(mixed, None, merge_method="task_arithmetic"))
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--device", "tpu"]) == 2


def test_neither_torch_nor_transformers_is_imported(mixed, tmp_path):
    (tmp_path / "r.yml").write_text(recipe_text(mixed, None, merge_method="task_arithmetic"))
    script = f"""import sys
from streammerge.cli import main
assert main(["merge", r"{tmp_path / 'r.yml'}", r"{tmp_path / 'out'}"]) == 0
print(sorted({{"torch", "transformers", "safetensors"}} & sys.modules.keys()))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the meter reads Linux's /proc")
def test_memory_does_not_know_the_model(tmp_path):
    """Real peaks of real processes, chunks at their full size: 4 and 16 layers, 25 and 68 MB a model."""
    found = {}
    for layers in (4, 16):
        root = tmp_path / str(layers)
        paths = save_trio(root, "llama", hidden=512, intermediate_size=2048, layers=layers, shard="1GB")
        (root / "r.yml").write_text(recipe_text(paths, None, merge_method="task_arithmetic"))
        found[layers] = merged_by_command(root / "r.yml", root / "out")
    few, many = (found[n]["memory"]["host_beyond_imports"] for n in (4, 16))
    planned = found[16]["plan"]["host_total"]
    print(f"4 layers {few / 1e6:.1f} MB, 16 layers {many / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB")
    assert abs(many - few) <= max(0.1 * few, 3e6)
    assert 0.3 * planned <= many <= planned + 16e6, "buffers, and what the interpreter takes"
