"""A merge once more in 4 or 8 bits: a bitsandbytes checkpoint that transformers loads as it is.

Made from the finished, verified checkpoint, in pieces of about a million weights, rounded by bitsandbytes itself: the
codes and scales are those that transformers would make of the same weights when it loads them. Which weights are
quantised is transformers' choice, too (every linear module but the output embedding); the rest is copied byte for byte.
4-bit scales are stored in fp32 (no double quantisation, as transformers' default): 4.5 bits a weight.

Memory: some 40 MB a thread, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from . import __version__, manifest, quantized
from .errors import InputError, RecipeError, StreamMergeError, listed
from .io.checkpoint import Checkpoint, open_checkpoint
from .io.claim import STATE, refuse_inside
from .io.header import ITEM_BYTES, TORCH_DTYPES, tensor_bytes
from .io.shards import OutTensor
from .io.writer import CheckpointWriter
from .markers import answered
from .memory import parse_size
from .output import Output
from .progress import Progress
from .threads import in_parallel, usable_cores
from .verified import verify_output

METHODS = ("nf4", "int8")
FACTS = "streammerge_quantized.json"
_PIECE = 1 << 20  # weights that are rounded at a time
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class _Piece(NamedTuple):
    """`count` weights of a tensor from the one at `start` on: whole blocks, or whole rows."""

    name: str
    start: int
    count: int


def beside(out: Path, method: str) -> Path:
    """Where a merge's quantised twin lies: OUT-nf4 beside OUT."""
    whole = Path(os.path.abspath(out))
    return whole.with_name(f"{whole.name}-{method}")


def check(out: Path, methods: Sequence[str]) -> None:
    """Before the merge: RecipeError where bitsandbytes is missing, InputError where a target is taken."""
    for method in methods:
        if method not in METHODS:
            raise RecipeError(f"also: {method!r} is no form of a quantised copy; choose {' or '.join(METHODS)}")
        quantized.require(method, torch.device("cpu"), f"--also {method}", "or leave it out")
    taken = []
    for target in (beside(out, method) for method in methods):
        held = os.listdir(target) if target.is_dir() else [target.name] if os.path.lexists(target) else []
        if held and not (target / STATE / "lock").exists():
            taken.append(f"{target}: is there already and is not empty")
    if taken:
        raise InputError(listed("--also writes beside OUT:", taken, "Move it away, or choose another OUT."))


def write_also(
    out: Path, methods: Iterable[str], *, shard_size: str, threads: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The quantised twins of a finished merge -> {method: what `quantize` tells}. A StreamMergeError says that OUT is
    whole, and how to make what is missing."""
    told = {}
    for method in dict.fromkeys(methods):
        target = beside(out, method)
        try:
            told[method] = quantize(out, target, method, shard_size=shard_size, threads=threads, progress=progress)
        except StreamMergeError as error:
            again = f"{out} itself is complete. To go on: streammerge quantize {out} {target} --to {method}"
            raise type(error)(f"{error}\n{again}") from error
    return told


def quantize(
    source: Path,
    out: Path,
    method: str,
    *,
    shard_size: str = "5GB",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the full-precision checkpoint `source` to `out`, a directory that is new or empty, in nf4 or int8.

    All or nothing, verified, with SHA256SUMS. Returns path, counts, bytes and seconds. Raises InputError for a model
    that transformers or bitsandbytes cannot take so, RecipeError without bitsandbytes, and what the writer raises.
    """
    began, source, out = time.perf_counter(), Path(source), Path(out)
    quantized.require(method, torch.device("cpu"), f"--to {method}", "the copy is made by it")
    workers, progress = threads or usable_cores(), progress or Progress("quiet")
    with progress, open_checkpoint(source, "model") as checkpoint:
        refuse_inside(out, [checkpoint])
        linear = linear_weights(checkpoint, method)
        output = planned(checkpoint, linear, method)
        with CheckpointWriter(out, output.tensors, parse_size(shard_size)) as writer:
            for name in output.copies:
                writer.copy(name, checkpoint)
            _round(checkpoint, linear, method, writer, workers, progress)
            for name, content in output.sides.items():
                writer.add_file(name, content)
            writer.finish()
            files = verify_output(output, out, workers)["files"]
            facts = {
                "streammerge": __version__, "bitsandbytes": quantized.version(), "method": method,
                "quantized": len(linear), "copied": len(output.copies),
                "bytes": sum(tensor_bytes(t.dtype, t.shape) for t in output.tensors),
                "model": manifest.describe_input(checkpoint)["files"],
            }  # fmt: skip
            notes = {FACTS: json.dumps(facts, indent=1).encode() + b"\n"} | card(source, method)
            for name, raw in notes.items():
                manifest.place(writer.note, name, raw)
            hashes = {name: entry["sha256"] for name, entry in files.items()}
            hashes |= {name: hashlib.sha256(raw).hexdigest() for name, raw in notes.items()}
            manifest.place(writer.note, manifest.SUMS, manifest.checksums(hashes))
    return {k: facts[k] for k in ("method", "quantized", "copied", "bytes")} | {
        "path": str(out), "seconds": round(time.perf_counter() - began, 3)}  # fmt: skip


def linear_weights(checkpoint: Checkpoint, method: str) -> list[str]:
    """Names of the weights that transformers quantises in this model, in the checkpoint's order.

    transformers says so itself, on a model without memory. InputError for a model that it does not know, whose tensors
    have other names than its modules', or are no floats.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    path, config = checkpoint.path, bitsandbytes_config(checkpoint, method)
    if checkpoint.config.get("quantization_config") is not None:
        raise InputError(f"{checkpoint.role}: {path} is quantised already; give a full-precision checkpoint")
    with answered(f"{path}: transformers cannot build the model", ""):
        settings = AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        model = replace_with_bnb_linear(model, kept, config, pre_quantized=True)
    wanted = {name: type(module.weight).__name__ for name, module in model.named_modules() if hasattr(module, "weight")}
    chosen = {f"{name}.weight" for name, kind in wanted.items() if kind in ("Params4bit", "Int8Params")}
    problems = [f"{path}: there is no tensor {name}, which the model of config.json has quantised"
                for name in sorted(chosen - checkpoint.tensors.keys())]  # fmt: skip
    for name in sorted(chosen & checkpoint.tensors.keys()):
        info = checkpoint.tensors[name]
        if info.dtype not in _NAMES or len(info.shape) != 2:
            problems.append(f"{info.file}: {name} is {info.dtype} {list(info.shape)}; wanted a float matrix")
    if not chosen:
        problems.append(f"{path}: no linear module of the model can be quantised")
    if problems:
        raise InputError(listed(f"{method} cannot be made of this model:", problems))
    return [name for name in checkpoint.tensors if name in chosen]


def bitsandbytes_config(checkpoint: Checkpoint, method: str) -> Any:
    """transformers' BitsAndBytesConfig of what is written; it computes in the model's own dtype."""
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    stated = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    compute = stated if stated in _NAMES.values() else "bfloat16"
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def planned(checkpoint: Checkpoint, linear: Sequence[str], method: str) -> Output:
    """Every tensor and side file that is written, in the checkpoint's order."""
    tensors, chosen = [], set(linear)
    for name, info in checkpoint.tensors.items():
        if name not in chosen:
            tensors.append(OutTensor(name, info.dtype, info.shape))
        elif method == "int8":
            stem = name.removesuffix("weight")
            tensors += [OutTensor(name, "I8", info.shape), OutTensor(f"{stem}SCB", "F32", info.shape[:1]),
                        OutTensor(f"{stem}weight_format", "U8", ())]  # fmt: skip
        else:
            count = info.shape[0] * info.shape[1]
            sizes = {"absmax": ("F32", -(-count // quantized.BLOCK)), "quant_map": ("F32", 16),
                     _STATE: ("U8", len(_state(checkpoint, name)))}  # fmt: skip
            tensors.append(OutTensor(name, "U8", (-(-count // 2), 1)))
            tensors += [OutTensor(f"{name}.{end}", code, (size,)) for end, (code, size) in sizes.items()]
    config = checkpoint.config | {"quantization_config": bitsandbytes_config(checkpoint, method).to_dict()}
    raw = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return Output(
        method=method, recipe={}, source="", inputs={checkpoint.role: checkpoint}, donor=checkpoint,
        tensors=tuple(tensors), copies={n: (checkpoint, n) for n in checkpoint.tensors if n not in chosen},
        sides={file.name: file for file in checkpoint.sides} | {"config.json": raw},
    )  # fmt: skip


_STATE = "quant_state.bitsandbytes__nf4"


def _state(checkpoint: Checkpoint, name: str) -> bytes:
    """What bitsandbytes notes beside a weight of 4 bits."""
    info = checkpoint.tensors[name]
    facts = {"quant_type": "nf4", "blocksize": quantized.BLOCK, "dtype": _NAMES[info.dtype], "shape": list(info.shape)}
    return json.dumps(facts).encode()


def _round(
    checkpoint: Checkpoint, linear: Sequence[str], method: str, writer: CheckpointWriter, workers: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Round every linear weight, piece by piece on several threads, and put codes and scales in place."""
    small = {"quant_map": quantized.nf4_values()} if method == "nf4" else {}
    for name in linear:
        info = checkpoint.tensors[name]
        count, stem = info.shape[0] * info.shape[1], name.removesuffix("weight")
        if method == "int8":
            writer.begin(name, "I8", info.shape)
            writer.begin(f"{stem}SCB", "F32", info.shape[:1])
            writer.write(f"{stem}weight_format", torch.zeros((), dtype=torch.uint8))
        else:
            writer.begin(name, "U8", (-(-count // 2), 1))
            writer.begin(f"{name}.absmax", "F32", (-(-count // quantized.BLOCK),))
            writer.write(f"{name}.{_STATE}", torch.tensor(list(_state(checkpoint, name)), dtype=torch.uint8))
        for end, tensor in small.items():
            writer.write(f"{name}.{end}", tensor)
    progress.start(f"quantize to {method}", sum(checkpoint.tensors[n].nbytes for n in linear))

    def do(piece: _Piece) -> int:
        return _round_piece(checkpoint, piece, method, writer)

    pieces = (piece for name in linear for piece in _pieces(checkpoint, name, method))
    with _one_thread():
        in_parallel(pieces, lambda: do, workers, lambda n: progress.advance(n, nbytes=n))
    progress.stop()


def _pieces(checkpoint: Checkpoint, name: str, method: str) -> Iterable[_Piece]:
    rows, width = checkpoint.tensors[name].shape
    step = _PIECE if method == "nf4" else max(1, _PIECE // width) * width
    return (_Piece(name, at, min(step, rows * width - at)) for at in range(0, rows * width, step))


def _round_piece(checkpoint: Checkpoint, piece: _Piece, method: str, writer: CheckpointWriter) -> int:
    """One piece; returns the bytes that were read. InputError for weights that are not finite, or have no fp16."""
    name, info = piece.name, checkpoint.tensors[piece.name]
    item, width = ITEM_BYTES[info.dtype], info.shape[1]
    raw = torch.empty(piece.count * item, dtype=torch.uint8)
    checkpoint.read_into(name, memoryview(raw.numpy()), piece.start * item)
    weight = raw.view(TORCH_DTYPES[info.dtype])
    if method == "int8":  # as bitsandbytes itself rounds, from fp16
        codes, scales = quantized.pack("int8", weight.view(-1, width).half())
        row = piece.start // width
        places = {name: (codes, row * width), f"{name.removesuffix('weight')}SCB": (scales, 4 * row)}
    else:
        codes, scales = quantized.pack("nf4", weight.view(1, -1))
        codes = codes[: -(-piece.count // 2)]
        places = {name: (codes, piece.start // 2), f"{name}.absmax": (scales, 4 * (piece.start // quantized.BLOCK))}
    if not bool(torch.isfinite(scales).all()):
        what = "NaN, infinite, or too large for the fp16 that int8 goes by" if method == "int8" else "NaN or infinite"
        raise InputError(f"{checkpoint.role}: {name} in {info.file} has values that are {what}: it cannot be quantised")
    for target, (tensor, offset) in places.items():
        writer.put(target, _bytes(tensor), offset)
    return len(raw)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


@contextmanager
def _one_thread():
    """One thread for each of torch's operators: the pieces have their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def card(source: Path, method: str) -> dict[str, bytes]:
    """{README.md: the merge's card with what this copy of it is}, {} where it has none that can be read."""
    try:
        _, head, body = (source / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        facts = yaml.safe_load(head)
        facts["tags"] = [*facts.get("tags", ()), "bitsandbytes", "4-bit" if method == "nf4" else "8-bit"]
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
    told = f"> **A copy in {method}**, quantised with bitsandbytes; the hashes of its files are in {manifest.SUMS}.\n"
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    return {"README.md": f"---\n{head}---\n\n{told}{body}".encode()}
