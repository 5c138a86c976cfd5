"""One tensor through one method: checkpoints of a single tensor, written, merged and read back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from streammerge.io.checkpoint import open_checkpoint
from streammerge.io.header import TORCH_DTYPES
from streammerge.io.shards import OutTensor
from streammerge.io.writer import CheckpointWriter
from streammerge.jobs import Source, TensorJob
from streammerge.methods import METHODS
from streammerge.stream import CHUNK, Buffers, Merge
from streammerge.tensorwise import arguments

CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def checkpoint(root: Path, role: str, tensors: dict[str, torch.Tensor]):
    """A checkpoint of a few tensors."""
    path = root / role
    path.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return open_checkpoint(path, role)


def merged(root, method, sources, base=None, *, parameters=None, dtype="", out=None, threads=1, chunk=CHUNK, seed=0,
           name="w", **per_model):  # fmt: skip
    """The method's output for a tensor of each source: torch tensors -> a torch tensor of the dtype `out` (default: of
    the first source). `per_model`: lists, one value a source."""
    root = Path(root) / f"run{len(list(Path(root).iterdir()))}"
    made = [checkpoint(root, f"m{i}", {name: tensor}) for i, tensor in enumerate(sources)]
    given = [Source(c, name, {k: v[i] for k, v in per_model.items()}) for i, c in enumerate(made)]
    under = Source(checkpoint(root, "base", {name: base}), name) if base is not None else None
    like = sources[0] if sources else base
    target = OutTensor(name, CODES[out or like.dtype], tuple(like.shape))
    job = TensorJob(target, method, tuple(given), under, parameters or {}, dtype)
    with CheckpointWriter(root / "out", [target], 1 << 40) as writer:
        writer.begin(name, target.dtype, target.shape)
        merge = Merge(job, writer, Buffers(), threads=threads, chunk=chunk, seed=seed)
        METHODS[method].run(merge, **arguments(job))
        writer.finish()
    return load_file(root / "out" / "model.safetensors")[name]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Zeros by their signs too."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
