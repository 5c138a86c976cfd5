"""The strict safetensors header parser: every lie of a header is an error that says which."""

import json
import os
import struct
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import InputError
from streammerge.io.checkpoint import open_checkpoint
from streammerge.io.header import HEADER_LIMIT


@pytest.fixture(autouse=True)
def config(tmp_path):
    (tmp_path / "config.json").write_text("{}")


def raw_file(file: Path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, "base_model")
    return str(caught.value)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {  # name: (header, data bytes, what the message must say)
    "not json": (b"{oops", 0, "header is not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', 0, "header is not valid JSON"),
    "not an object": ([1], 0, "holds a list, not an object"),
    "too deep": (b"[" * 100_000, 0, "nested too deep"),
    "duplicate": (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1, "the key 'a' appears twice"),
    "duplicate inside": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[]}}', 1, "the key 'dtype' appears twice"),
    "metadata": ({"__metadata__": {"n": 1}}, 0, "__metadata__ must map strings to strings"),
    "metadata list": ({"__metadata__": []}, 0, "__metadata__ must map strings to strings"),
    "entry type": ({"a": 5}, 0, "tensor 'a': wants the keys dtype, shape and data_offsets"),
    "entry keys": ({"a": {"dtype": "F32"}}, 0, "tensor 'a': wants the keys dtype, shape and data_offsets"),
    "dtype": ({"a": entry("F4")}, 8, "unknown dtype 'F4', known are F64"),
    "dtype type": ({"a": entry(["F32"])}, 8, "unknown dtype"),
    "shape negative": ({"a": entry(shape=[-2])}, 8, "shape must be a list of integers >= 0, found [-2]"),
    "shape bool": ({"a": entry(shape=[True])}, 8, "shape must be a list of integers"),
    "shape float": ({"a": entry(shape=[2.0])}, 8, "shape must be a list of integers"),
    "shape huge": ({"a": entry(shape=[2**62, 4])}, 8, "F32 [4611686018427387904, 4] is larger than any file"),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, 8, "data_offsets begin at 8, after their end 0"),
    "offsets count": ({"a": entry(offsets=[0, 8, 9])}, 8, "data_offsets must be two integers"),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, 8, "data_offsets must be two integers"),
    "size": ({"a": entry(shape=[3])}, 8, "F32 [3] takes 12 bytes, its data_offsets span 8"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "tensor 'b' overlaps tensor 'a' by 4 bytes"),
    "same place": ({"a": entry(), "b": entry()}, 8, "overlaps tensor 'a' by 8 bytes"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, "a hole of 4 bytes before tensor 'b'"),
    "hole at start": ({"a": entry(offsets=[8, 16])}, 16, "a hole of 8 bytes before tensor 'a'"),
    "truncated": ({"a": entry()}, 5, "download it again"),
    "out of bounds": ({"a": entry(shape=[2000], offsets=[0, 8000])}, 8, "its header promises"),
    "too long": ({"a": entry()}, 9, "its header accounts for"),
    "shape huge beside a zero": ({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}, 0, "larger than any file"),
    "shape beyond 64 bits": ({"a": entry(shape=[2**63])}, 8, "shape must be a list of integers >= 0, found [9223372"),
    "shape of 4000 digits": ({"a": entry(shape=[10**4000])}, 8, "shape must be a list of integers >= 0, found [1000"),
    "shape of a million dimensions": ({"a": entry(shape=[1] * 10**6)}, 8, "1000000 dimensions, torch knows at most 64"),
    "offsets float": ({"a": entry(offsets=[0, 8.0])}, 8, "data_offsets must be two integers"),
    "offsets bool": ({"a": entry(shape=[], dtype="U8", offsets=[False, True])}, 1, "data_offsets must be two integers"),
    "offsets beyond 64 bits": ({"a": entry(offsets=[0, 2**64 + 8])}, 8, "data_offsets must be two integers"),
    "infinity": (b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,1]}}', 1, "Infinity is no JSON number"),
    "a number of 5000 digits": (b'{"a":{"dtype":"U8","shape":[1' + b"0" * 5000 + b"]}}", 1, "header is not valid JSON"),
    "begins with a space": (b' {"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "it begins with"),
    "empty name": ({"": entry()}, 8, "its name is 0 characters long"),
    "long name": ({"n" * 1001: entry()}, 8, "its name is 1001 characters long"),
    "escape in a name": ({"a\x1b[2J": entry()}, 8, "characters that cannot be printed"),
    "empty tensor inside another": ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, 8, "overlaps tensor 'a'"),
    "surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, "its name is not valid Unicode"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_corrupt_header(tmp_path, case):
    header, size, wanted = HEADERS[case]
    raw_file(tmp_path / "model.safetensors", header, bytes(size))
    message = error_of(tmp_path)
    assert wanted in message and "model.safetensors" in message


def test_a_million_lies_are_counted_not_listed(tmp_path):
    raw_file(tmp_path / "model.safetensors", {f"t{i}": 5 for i in range(200_000)})
    message = error_of(tmp_path)
    assert message.count("\n") < 25 and "… and 80 more of the same kind" in message


def test_a_header_of_many_duplicates_is_refused_in_time(tmp_path):
    """Looking for the second of two equal keys among n must not take n² steps."""
    keys = ",".join(f'"{i}":1' for i in range(300_000))
    began = time.monotonic()
    raw_file(tmp_path / "model.safetensors", f'{{{keys},"299999":1}}'.encode())
    assert "'299999' appears twice" in error_of(tmp_path) and time.monotonic() - began < 10


def test_empty_tensors_and_odd_but_honest_names_pass(tmp_path):
    header = {"ünï.ço∂e 字": entry(shape=[0], offsets=[0, 0]), "x": entry(), "z": entry(shape=[3, 0], offsets=[8, 8])}
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with open_checkpoint(tmp_path, "base_model") as ckpt:
        assert {n: ckpt.read(n).shape for n in ckpt.tensors} == {"ünï.ço∂e 字": (0,), "x": (2,), "z": (3, 0)}


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "is 0 bytes long, too short"),
        (b"\x01\0\0", "is 3 bytes long, too short"),
        (struct.pack("<Q", 50) + b"{}", "ends after 10 bytes, within its header of 50 bytes: download it again"),
        (struct.pack("<Q", HEADER_LIMIT + 1), "more than the limit of 95.37 MiB"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensor"),
    ],
)
def test_not_a_safetensors_file(tmp_path, content, wanted):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert wanted in error_of(tmp_path)


def test_truncated_shard_says_how_much_is_there(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 40)
    assert f"shard ends after {size - 40} bytes, its header promises {size}: download it again" in error_of(tmp_path)


def test_random_damage_is_an_error_or_harmless(tmp_path):
    """300 files with one to three bytes of the header changed: our own error, or a layout that adds up."""
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2).bfloat16()}, tmp_path / "model.safetensors")
    good = (tmp_path / "model.safetensors").read_bytes()
    random, refused = Random(0), 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(random.randint(1, 3)):
            bad[random.randrange(len(good) - 20)] = random.choice(b'0123456789{}[]",:ab\xff\0')
        (tmp_path / "model.safetensors").write_bytes(bad)
        try:
            ckpt = open_checkpoint(tmp_path, "base_model")
        except InputError:
            refused += 1
        else:
            assert sum(ckpt.read(name).nbytes for name in ckpt.tensors) == 20
            ckpt.close()
    assert refused > 200
