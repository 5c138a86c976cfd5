"""Quantised checkpoints as ordinary float ones: tensors are decoded as they are read, block by block.

bitsandbytes nf4, fp4 and int8, and DeepSeek's fp8 in tiles (packed.py). What comes out has the bits of bitsandbytes'
own dequantisation, and of transformers' for fp8: the product in fp32, rounded once to the weight's dtype. Every other
form is refused by name, with what to do instead (refusals.py).

Memory: about 1.5 MB for each thread that reads, whatever the tensor; opening reads the maps of each tensor (1 KB).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import WORDS, all_finite, encode
from ..errors import InputError, listed
from .checkpoint import Checkpoint, open_checkpoint
from .header import ITEM_BYTES, TensorInfo, tensor_bytes
from .packed import DTYPES, FourBit, Tiled, bitsandbytes, fp8
from .refusals import advice

_BLOCK = 1 << 16  # elements that are decoded at a time; a multiple of every block of bitsandbytes
_NAMES = {code: name for name, code in DTYPES.items()}
_PACKED = {"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}  # no norm is stored so
_AUXILIARY = (".absmax", ".quant_map", ".nested_quant_map", ".nested_absmax", ".SCB", ".weight_format", "_scale_inv")


@dataclass(frozen=True)
class Decoded(Checkpoint):
    """A quantised checkpoint as its readers want it: `tensors` and `config` are those of a full-precision one.

    `stored`: the checkpoint as it lies on the disk. `encoded`: {tensor: how it is decoded}. `spare`: names of the
    auxiliary tensors (scales, maps), of which nothing reaches an output. `scheme`: what a user calls the form.
    """

    stored: Checkpoint | None = field(default=None, repr=False)
    encoded: Mapping[str, FourBit | Tiled] = field(default_factory=dict, repr=False)
    spare: tuple[str, ...] = ()
    scheme: str = ""

    @property
    def rewritten(self) -> dict[str, bytes]:
        """config.json of the decoded model."""
        return {"config.json": (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()}

    def decoded_to(self, code: str | None) -> Decoded:
        """The same with every quantised tensor decoded to this dtype; None: as it is."""
        if not code:
            return self
        changed = {name: _logical(self.tensors[name], code, self.tensors[name].shape) for name in self.encoded}
        return replace(self, tensors=self.tensors | changed)

    def _fill(self, view: memoryview, info: TensorInfo, offset: int) -> None:
        """Fill `view` with the decoded tensor's bytes from `offset` on; both are whole elements."""
        found = self.encoded.get(info.name)
        if found is None:
            return super()._fill(view, info, offset)
        size = ITEM_BYTES[info.dtype]
        if offset % size or len(view) % size:
            raise ValueError(f"{info.name}: bytes {offset} to {offset + len(view)} cut an element of {info.dtype}")
        out, start = np.frombuffer(view, WORDS[info.dtype]), offset // size
        scratch = np.empty(min(_BLOCK, len(out)), np.float32)
        for at in range(0, len(out), _BLOCK):
            part = out[at : at + _BLOCK]
            with np.errstate(all="ignore"):  # what is not finite is found by looking at what comes out
                wide = found.decode(self._read_stored, start + at, len(part))
                encode(wide, info.dtype, part, scratch[: len(part)])
            if info.dtype == "BF16" and not all_finite(wide, "F32"):
                part[np.isnan(wide)] = 0x7FC0
        return None

    def _read_stored(self, info: TensorInfo, begin: int, nbytes: int) -> np.ndarray:
        raw = np.empty(nbytes, np.uint8)
        self.stored.read_into(info.name, memoryview(raw), begin)
        return raw

    def close(self) -> None:
        super().close()
        self.stored.close()


def decoded(stored: Checkpoint, problems: list[str]) -> Checkpoint:
    """A checkpoint whose config.json has a quantization_config, as one of floats. Adds a line to `problems` for a form
    that is not read, and for every tensor that does not fit its form."""
    told = stored.config["quantization_config"]
    method = told.get("quant_method") if isinstance(told, dict) else None
    if method is None and isinstance(told, dict) and (told.get("load_in_4bit") or told.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in ("bitsandbytes", "fp8"):
        problems.append(f"config.json: {advice(method, told)}")
        return stored
    find = bitsandbytes if method == "bitsandbytes" else fp8
    encoded, spare, wrong = find(stored, told)
    held = spare | encoded.keys()
    if not wrong:  # else what belongs to a broken weight would be a second problem
        wrong = [f"{info.file.name}: tensor {name!r} ({info.dtype}) is part of a quantised weight, whose other parts "
                 "are missing: download the checkpoint again" for name, info in stored.tensors.items()
                 if name not in held and (info.dtype in _PACKED or name.endswith(_AUXILIARY))]  # fmt: skip
    if not encoded and not wrong:
        wrong = [f"config.json: its quantization_config says {method}, and no tensor is stored so: delete the key if "
                 "the weights are in full precision"]
    problems += wrong
    if wrong:
        return stored
    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    code = stated_dtype(config)
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = _NAMES[code]
    tensors = {name: info for name, info in stored.tensors.items() if name not in spare}
    for name, (how, shape, own) in encoded.items():
        tensors[name] = _logical(how.weight, own or code, shape)
    ways = {name: how for name, (how, _, _) in encoded.items()}
    kinds = "/".join(sorted({how.kind for how in ways.values()}))
    return Decoded(stored.path, stored.role, tensors, config, stored._files, stored=stored, encoded=ways,
                   spare=tuple(sorted(spare)), scheme=f"{method} {kinds}" if method != kinds else "fp8 in tiles")


def stated_dtype(config: Mapping[str, Any]) -> str:
    """The dtype code that config.json gives the weights; bf16 where it says nothing or something else."""
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), "BF16")


def _logical(stored: TensorInfo, code: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(stored.name, code, tuple(shape), stored.file, stored.start, tensor_bytes(code, shape))


def open_model(path: Path, role: str) -> Checkpoint:
    """`open_checkpoint` for a model that is read as floats: one that is quantised is decoded as it is read.

    InputError lists all that is wrong with it, a form that is not read included.
    """
    found = open_checkpoint(path, role)
    if found.config.get("quantization_config") is None:
        return found
    problems: list[str] = []
    found = decoded(found, problems)
    if problems:
        raise InputError(listed(f"{role}: the checkpoint {path} cannot be used:", problems,
                                "Nothing was written."))
    return found


def notes(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """A line for each that is quantised: what of it is decoded, and where the rest goes."""
    return [f"{c.role} is quantised ({c.scheme}): {len(c.encoded)} tensors are decoded as they are read, "
            f"{len(c.spare)} auxiliary ones (scales, maps) go into them" for c in checkpoints if c.encoded]  # fmt: skip
