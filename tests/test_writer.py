"""The checkpoint writer: what safetensors and transformers read back, and all or nothing at any moment."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge.errors import InputError, ResourceError
from streammerge.io.checkpoint import TORCH_DTYPES, open_checkpoint
from streammerge.io.writer import CheckpointWriter, OutTensor

CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
INDEX = "model.safetensors.index.json"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "flag": torch.tensor([True, False, True]),
        "layer.weight": torch.randn(16, 8).bfloat16(),
        "layer.norm": torch.randn(8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "ünïcode": torch.randint(-9, 9, (5,)),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn),
    }


def plan(tensors: dict[str, torch.Tensor]) -> list[OutTensor]:
    return [OutTensor(n, CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]


def write_all(out: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 1 << 20, order=None) -> CheckpointWriter:
    with CheckpointWriter(out, plan(tensors), shard_bytes) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
        writer.add_file("config.json", b"{}")
        writer.finish()
    return writer


@pytest.mark.parametrize("shard_bytes", [1 << 20, 64, 1])
def test_round_trip(tmp_path, shard_bytes):
    tensors, out = model(), tmp_path / "a" / "out"
    writer = write_all(out, tensors, shard_bytes, order=reversed(tensors))
    assert sorted(writer.files) == sorted(os.listdir(out))  # no lock, no state, no partial file stays
    assert writer.bytes_written == sum(f.stat().st_size for f in out.iterdir())
    got = {}
    for name in writer.files:
        if name.endswith(".safetensors"):
            with safe_open(out / name, "pt") as stream:
                assert stream.metadata() == {"format": "pt"}
            got |= load_file(out / name)
    ckpt = open_checkpoint(out, "merged")
    assert got.keys() == tensors.keys() == ckpt.tensors.keys()
    for name, tensor in tensors.items():
        for other in (got[name], ckpt.read(name)):
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            assert torch.equal(bits(other), bits(tensor))


def test_shards_are_greedy_and_indexed_like_transformers_does(tmp_path):
    tensors = {n: torch.full((k,), float(k)) for n, k in (("d", 10), ("c", 10), ("b", 100), ("a", 5))}
    writer = write_all(tmp_path / "out", tensors, 80)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert writer.files == ["config.json", *names, INDEX]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    weight_map = {"a": names[2], "b": names[1], "c": names[0], "d": names[0]}
    assert index == {"metadata": {"total_size": 500}, "weight_map": weight_map}
    assert list(index["weight_map"]) == sorted(tensors)


def test_header_is_aligned_and_wide_dtypes_come_first(tmp_path):
    write_all(tmp_path / "out", model())
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert list(header)[:3] == ["__metadata__", "scalar", "ünïcode"]
    for name, tensor in model().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_transformers_loads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    wanted = transformers.LlamaForCausalLM(config)
    wanted.save_pretrained(tmp_path / "in")
    with open_checkpoint(tmp_path / "in", "base_model") as source:
        infos = [OutTensor(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        with CheckpointWriter(tmp_path / "out", infos, 4000) as writer:
            for info in infos:
                writer.copy(info.name, source)
            writer.add_file("config.json", tmp_path / "in" / "config.json")
            writer.finish()
    assert (tmp_path / "out" / INDEX).exists()
    got = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.state_dict().items())


@pytest.mark.parametrize("error", [None, errno.EXDEV, errno.ENOSYS])
def test_copy_is_bit_equal_with_and_without_the_kernel(tmp_path, monkeypatch, error):
    tensors = model() | {"large": torch.randn(3000, 1000).bfloat16()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    kernel, calls = os.copy_file_range, []

    def copy_file_range(source, target, count, at, to):
        calls.append(count)
        if error and len(calls) % 2 == 0:
            raise OSError(error, "no")
        return kernel(source, target, min(count, 1 << 20), at, to)  # short, as it may be

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with open_checkpoint(tmp_path / "in", "base_model") as source:
        with CheckpointWriter(tmp_path / "out", plan(tensors), 1 << 30) as writer:
            for name in tensors:
                writer.copy(name, source)
            writer.add_file("config.json", b"{}")
            writer.finish()
    assert calls and writer.bytes_written == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(bits(got[n]), bits(t)) for n, t in tensors.items())


def test_any_contiguity_and_gradients(tmp_path):
    base = torch.randn(6, 8)
    tensors = {"t": base.T, "s": base[::2, 1::3], "e": torch.ones(1, 4).expand(5, 4)}
    tensors["g"] = torch.ones(3, requires_grad=True)
    write_all(tmp_path / "out", tensors)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[n], t) for n, t in tensors.items())


def test_same_bytes_twice_and_in_any_order(tmp_path):
    for out, order in (("a", list(model())), ("b", sorted(model()))):
        write_all(tmp_path / out, model(), 100, order)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_no_final_name_before_finish_and_the_index_last(tmp_path, monkeypatch):
    tensors, out = model(), tmp_path / "out"
    renamed, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: renamed.append(Path(b).name) or rename(a, b))
    with CheckpointWriter(out, plan(tensors), 64) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
            assert all(f == ".streammerge" or f.endswith(".partial") for f in os.listdir(out))
        writer.add_file("config.json", b"{}")
        assert all(f == ".streammerge" or f.endswith(".partial") for f in os.listdir(out)) and not renamed
        writer.finish()
        writer.abort()  # too late to change anything
    assert renamed == writer.files and renamed[-1] == INDEX and sorted(os.listdir(out)) == sorted(renamed)


@pytest.mark.parametrize("existing", [False, True])
def test_abort_removes_what_it_created_and_nothing_else(tmp_path, existing):
    out = tmp_path / "deep" / "out"
    if existing:
        (out / ".streammerge").mkdir(parents=True)
        (out / ".streammerge" / "bases").write_text("x")
    with pytest.raises(KeyboardInterrupt):
        with CheckpointWriter(out, plan(model()), 64) as writer:
            writer.write("scalar", model()["scalar"])
            writer.add_file("config.json", b"{}")
            raise KeyboardInterrupt
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (
        ["deep", "deep/out", "deep/out/.streammerge", "deep/out/.streammerge/bases"] if existing else []
    )


def test_leaving_without_finish_is_an_abort(tmp_path):
    with CheckpointWriter(tmp_path / "out", plan(model()), 64):
        pass
    assert not (tmp_path / "out").exists()


def test_a_failure_in_finish_leaves_nothing(tmp_path, monkeypatch):
    rename, calls = os.rename, []

    def failing(a, b):
        calls.append(b)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ResourceError, match="cannot be written: Input/output error. Check the disk"):
        write_all(tmp_path / "out", model(), 64)
    assert not (tmp_path / "out").exists()


def test_misuse_is_a_bug_not_a_user_error(tmp_path):
    tensors = model()
    with CheckpointWriter(tmp_path / "out", plan(tensors), 1 << 20) as writer:
        writer.write("layer.norm", tensors["layer.norm"])
        for name, tensor, wanted in (
            ("layer.norm", tensors["layer.norm"], "written twice"),
            ("nobody", torch.ones(1), "planned is None"),
            ("scalar", torch.tensor(2.5), "planned is .*F64.*got F32"),
            ("layer.weight", torch.zeros(8, 16).bfloat16(), r"got BF16 \[8, 16\]"),
            ("layer.weight", torch.zeros(16, 8, dtype=torch.bfloat16, device="meta"), "on meta"),
        ):
            with pytest.raises(ValueError, match=wanted):
                writer.write(name, tensor)
        for name in ("", "..", "a/b", "/a", "model.safetensors", "model.safetensors.partial", ".streammerge", INDEX):
            with pytest.raises(ValueError, match="no plain file name"):
                writer.add_file(name, b"")
        with pytest.raises(ValueError, match="6 planned tensors were never written:\n  - flag\n"):
            writer.finish()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="closed"):
        writer.write("scalar", tensors["scalar"])
    for bad in ([OutTensor("a", "F32", ())] * 2, [OutTensor("__metadata__", "F32", ())]):
        with pytest.raises(ValueError, match="unique"):
            CheckpointWriter(tmp_path / "out", bad, 10)


def test_side_files(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with CheckpointWriter(tmp_path / "out", [], 10) as writer:
        writer.add_file("tokenizer.json", tmp_path / "tokenizer.json")
        with pytest.raises(InputError, match="gone.json: cannot be read"):
            writer.add_file("vocab.json", tmp_path / "gone.json")
        writer.abort()
    assert not (tmp_path / "out").exists()
    with CheckpointWriter(tmp_path / "out", [], 10) as writer:
        writer.add_file("tokenizer.json", tmp_path / "tokenizer.json")
        writer.finish()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("kernel", [True, False])
def test_copy_holds_no_tensor(tmp_path, kernel):
    """256 MB in 4 tensors: a copy needs one small buffer at most, whatever the size of the tensors."""
    (tmp_path / "in").mkdir()
    save_file({f"t{i}": torch.zeros(32 << 20).bfloat16() for i in range(4)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    code = """
        import os, sys
        from pathlib import Path
        from streammerge import memory
        from streammerge.io.checkpoint import open_checkpoint
        from streammerge.io.writer import CheckpointWriter, OutTensor
        if sys.argv[2] == "False":
            del os.copy_file_range
        folder = Path(sys.argv[1])
        assert memory.reset_host_peak()
        start = memory.host_now()
        source = open_checkpoint(folder / "in", "base_model")
        plan = [OutTensor(t.name, t.dtype, t.shape) for t in source.tensors.values()]
        with CheckpointWriter(folder / "out", plan, 1 << 27) as writer:
            for tensor in plan:
                writer.copy(tensor.name, source)
            writer.finish()
        print(memory.host_peak() - start)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64e6
    shutil.rmtree(tmp_path)  # half a gigabyte
