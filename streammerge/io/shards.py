"""Which tensor goes into which file of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .header import ITEM_BYTES, tensor_bytes


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output: its name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def plan_shards(tensors: Sequence[OutTensor], shard_bytes: int) -> dict[str, list[OutTensor]]:
    """Greedy in the given order, up to `shard_bytes` of tensor data each -> {file name: its tensors in file order}.

    A larger tensor gets a shard of its own. Within a shard wide dtypes come first, so that all are aligned.
    """
    shards: list[list[OutTensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        size = tensor_bytes(tensor.dtype, tensor.shape)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return {n: sorted(s, key=lambda t: -ITEM_BYTES[t.dtype]) for n, s in zip(names, shards, strict=True)}
