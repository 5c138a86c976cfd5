"""The checkpoint reader: equal to safetensors on good files, one complete error on bad ones."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import InputError
from streammerge.io.checkpoint import TORCH_DTYPES, open_checkpoint

INDEX = "model.safetensors.index.json"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def samples() -> dict[str, torch.Tensor]:
    """One tensor of every dtype that both sides know, plus the awkward shapes."""
    torch.manual_seed(0)
    out = {
        f"t.{code}": torch.randint(0, 2, (3, 5), dtype=torch.uint8).to(dtype)
        for code, dtype in TORCH_DTYPES.items()
        if code != "F8_E8M0"
    }
    out |= {"bf16": torch.randn(7, 9).bfloat16(), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4).half()}
    return out | {"ünïcode": torch.randn(2, 3, 4), "odd": torch.arange(3, dtype=torch.uint8)}


def folder(path: Path, tensors=None, config="{}") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(config)
    if tensors is not None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def sharded(path: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder(path)
    for name, tensors in shards.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    weight_map = {t: name for name, tensors in shards.items() for t in tensors}
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, "base_model")
    assert str(path) in str(caught.value) and "base_model" in str(caught.value)
    return str(caught.value)


def test_reads_what_safetensors_writes(tmp_path):
    wanted = samples()
    with open_checkpoint(folder(tmp_path, wanted, '{"model_type": "llama"}'), "base_model") as ckpt:
        assert ckpt.config == {"model_type": "llama"} and ckpt.role == "base_model" and ckpt.path == tmp_path
        assert list(ckpt.tensors) == sorted(wanted)
        for name, tensor in wanted.items():
            got = ckpt.read(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape, name
            assert torch.equal(bits(got), bits(tensor)), name
            assert b"".join(bytes(c) for c in ckpt.chunks(name, 7)) == bytes(bits(tensor).numpy()), name
        assert ckpt.read("bf16").add_(1).sum().isfinite()  # ours to write into


def test_reads_shards_and_a_single_file_of_another_name(tmp_path):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    path = sharded(tmp_path / "s", {first: {"b": torch.ones(2)}, second: {"a": torch.ones(3)}})
    ckpt = open_checkpoint(path, "base_model")
    assert list(ckpt.tensors) == ["a", "b"] and ckpt.read("a").shape == (3,)
    ckpt.close()
    assert ckpt.read("b").tolist() == [1, 1]  # close is not the end
    other = folder(tmp_path / "o")
    save_file({"x": torch.ones(1)}, other / "weights.safetensors")
    assert list(open_checkpoint(other, "base_model").tensors) == ["x"]


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 2, 9], [9, 0, 9, 4, 5], list(range(10)), list(range(9, -1, -1))])
def test_read_rows(tmp_path, rows):
    table = torch.randn(10, 6).bfloat16()
    ckpt = open_checkpoint(folder(tmp_path, {"pad": torch.ones(3), "e": table}), "base_model")
    got = ckpt.read_rows("e", torch.tensor(rows, dtype=torch.int64))
    assert got.dtype == torch.bfloat16 and torch.equal(got, table[rows].reshape(len(rows), 6))


def test_read_rows_reads_neighbours_at_once_and_refuses_rows_outside(tmp_path, monkeypatch):
    ckpt = open_checkpoint(folder(tmp_path, {"e": torch.randn(100, 6)}), "base_model")
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: calls.append(len(b[0])) or preadv(fd, b, o))
    ckpt.read_rows("e", torch.tensor([7, 5, 6, 50]))
    assert sorted(calls) == [24, 72]
    for rows in ([100], [-1]):
        with pytest.raises(InputError, match=rf"base_model.*row {rows[0]} of 'e'.*100 rows.*tokenizer"):
            ckpt.read_rows("e", torch.tensor(rows))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    wanted, preadv = torch.randn(100), os.preadv
    ckpt = open_checkpoint(folder(tmp_path, {"e": wanted}), "base_model")
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: preadv(fd, [b[0][:13]], o))
    assert torch.equal(ckpt.read("e"), wanted)


def test_a_file_that_changes_after_opening(tmp_path):
    ckpt = open_checkpoint(folder(tmp_path, {"a": torch.ones(4), "z": torch.ones(1000)}), "base_model")
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(InputError, match="model.safetensors: tensor 'z': the file ends at byte 1000"):
        ckpt.read("z")
    ckpt.close()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: tensor 'a': the file cannot be opened"):
        ckpt.read("a")


def test_all_problems_in_one_message(tmp_path):
    parts = [{"a": torch.ones(4), "extra": torch.ones(1)}, {"b": torch.ones(9)}, {"c": torch.ones(2)}]
    path = sharded(tmp_path, {f"{i}.safetensors": part for i, part in enumerate(parts, 1)})
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"]["extra"]
    index["weight_map"] |= {"ghost": "1.safetensors", "lost": "4.safetensors", "x": "../x.safetensors"}
    (path / INDEX).write_text(json.dumps(index))
    os.truncate(path / "2.safetensors", 60)
    (path / "config.json").write_text("{")
    message = error_of(path)
    for wanted in (
        "config.json: is not valid JSON",
        "1.safetensors: tensor 'extra' is missing from " + INDEX,
        f"{INDEX}: tensor 'ghost' is not in 1.safetensors",
        "2.safetensors: ends after 60 bytes",
        "4.safetensors: is missing",
        "'../x.safetensors': the name leaves the directory",
    ):
        assert wanted in message, message
    assert "3.safetensors" not in message and message.count("\n") == 7


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/../../x", ""])
def test_index_entries_stay_in_the_directory(tmp_path, name):
    folder(tmp_path / "other", {"a": torch.ones(1)})
    path = folder(tmp_path / "m")
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "leaves the directory" in error_of(path)


def test_links_stay_in_the_directory(tmp_path):
    other = folder(tmp_path / "other", {"a": torch.ones(1)})
    path = folder(tmp_path / "m")
    (path / "model.safetensors").symlink_to(other / "model.safetensors")
    assert "is a link that leaves the directory" in error_of(path)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("nowhere")
    assert "model.safetensors: is missing" in error_of(path)
    (path / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, path / "real.bytes")
    (path / "model.safetensors").symlink_to("real.bytes")
    assert open_checkpoint(path, "base_model").read("a").tolist() == [1]
    (tmp_path / "alias").symlink_to(path)  # a link to the whole directory is the user's own choice
    assert open_checkpoint(tmp_path / "alias", "base_model").read("a").tolist() == [1]


def test_duplicate_tensor_in_two_shards(tmp_path):
    path = sharded(tmp_path, {"1.safetensors": {"a": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}})
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, path / "2.safetensors")
    assert "2.safetensors: tensor 'a' is also in 1.safetensors" in error_of(path)


def test_pickles_are_refused_with_a_way_out(tmp_path):
    (folder(tmp_path) / "pytorch_model.bin").write_bytes(b"\x80")
    message = error_of(tmp_path)
    assert "only pickled weights (pytorch_model.bin)" in message and "safe_serialization=True" in message


@pytest.mark.parametrize(
    "index, wanted",
    [("[]", "not an object"), ("{", "not valid JSON"), ("{}", "must map"), ('{"weight_map": {"a": 1}}', "must map")],
)
def test_bad_index(tmp_path, index, wanted):
    (folder(tmp_path) / INDEX).write_text(index)
    assert wanted in error_of(tmp_path)


def test_missing_pieces(tmp_path):
    assert "no such directory" in error_of(tmp_path / "nowhere")
    empty = folder(tmp_path / "e", None, None)
    message = error_of(empty)
    assert "config.json: is missing" in message and "no .safetensors file in it" in message
    assert "not an object" in error_of(folder(tmp_path / "l", {"a": torch.ones(1)}, "[]"))
    part = folder(tmp_path / "p")
    save_file({"a": torch.ones(1)}, part / "model-00001-of-00002.safetensors")
    assert f"{INDEX}: is missing" in error_of(part)  # one shard of two is not the model
    fifo = folder(tmp_path / "f")
    os.mkfifo(fifo / "model.safetensors")
    assert "is not a regular file" in error_of(fifo)


def test_reading_holds_one_tensor(tmp_path):
    """256 MB in 16 tensors: reading all of them one by one, and all of their chunks, stays near one tensor."""
    folder(tmp_path, {f"t{i}": torch.zeros(8 << 20).bfloat16() for i in range(16)})
    code = """
        import sys
        from pathlib import Path
        from streammerge import memory
        from streammerge.io.checkpoint import open_checkpoint
        ckpt = open_checkpoint(Path(sys.argv[1]), "base_model")
        ckpt.read("t0").sum()
        assert memory.reset_host_peak()
        start = memory.host_now()
        for name in ckpt.tensors:
            ckpt.read(name).view(-1)[::1000].sum()
            for piece in ckpt.chunks(name):
                pass
        print(memory.host_peak() - start)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64e6
