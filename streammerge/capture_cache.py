"""The LRM's layers rounded for the calibration forwards, and a cache of them on disk.

`capture_weights: int8 | nf4` rounds what the survey's forwards multiply with, never what is merged. A first run reads
a layer as stored, rounds it, computes with the rounded weights and leaves them in the cache; a later survey of the
same LRM reads the cache in the layer's place. Both compute with the same numbers, so they write the same bytes.

A layer is one safetensors file with a fingerprint of what it was made from and a checksum of each tensor. A file that
does not match is made again, and the report says so. Nothing is fsynced: what a power cut tears, the checksums find.

Memory: the rounded layer and its copy in the compute dtype; the stored layer goes tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .io.checkpoint import TORCH_DTYPES, Checkpoint
from .io.drain import Drain, on_host
from .io.header import encode_header, read_header, tensor_bytes
from .planned import Plan
from .quantized import BLOCK, pack, unpack, version
from .recipe import MODULES, Recipe

_FORMAT = 1  # of the files: raise it when they change
_WORDS = 1 << 18  # of 8 bytes, in a checksum at a time
_ROLE = "capture_cache"

Entry = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype code, shape


def checksum(tensor: Tensor) -> Tensor:
    """Σ (2i + 1) wᵢ mod 2⁶⁴ over its 8-byte words: an int64 scalar on its device, the same on every device. Any one
    changed word changes it."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, len(words), _WORDS):
        part = words[begin : begin + _WORDS]
        odd = torch.arange(2 * begin + 1, 2 * (begin + len(part)), 2, device=words.device)
        total += (part * odd).sum()
    return total


class Quantized:
    """The LRM's rounded layers in one sweep. `keep`: bytes of stored layers that stay on the device between two passes:
    such a layer is read as stored anyway, so the cache would only add to the reading.

    `survey`: there is a pass over the LRM alone. Without one every layer is read as stored to be merged, and no cache
    is read or written.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype, *, keep: int, survey: bool):
        self._plan, self._device, self._dtype = plan, device, dtype
        self._method = plan.recipe.capture_weights
        self._made, self._used, self._problem = 0, 0, ""
        self._from_cache, self._saved, self._rebuilt, self._stale = 0, 0, [], 0
        linear = {plan.family.weight(layer, m) for layer in range(plan.layers) for m in MODULES}
        self._rounded = linear & plan.lrm.tensors.keys()
        self._folder = cache_folder(plan.recipe, plan.lrm, device) if survey else None
        self._fingerprint = fingerprint(plan.lrm, self._method, device) if survey else b""
        self._cached: dict[int, Checkpoint] = {}
        self._kept: set[int] = set()
        for layer in range(plan.layers) if survey else ():
            nbytes = self._stored_bytes(layer)
            if keep >= nbytes:
                keep -= nbytes
                self._kept.add(layer)
            else:
                self._open(layer)

    def order(self, layer: int) -> list[tuple[Checkpoint, str]]:
        """What the survey reads of a layer: its cached tensors, or the stored ones."""
        cached = self._cached.get(layer)
        if cached:
            return [(cached, name) for name, *_ in self._entries(layer)]
        return [(self._plan.lrm, name) for name in self._plan.layer_tensors(layer)]

    def survey(
        self, layer: int, take: Callable[[Checkpoint, str], Tensor], drain: Drain
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(the stored layer if it is to be kept, else nothing; the layer to compute with). `take` reads `order`."""
        cached, lrm = self._cached.pop(layer, None), self._plan.lrm
        if cached:
            parts = {name: take(cached, name) for name, *_ in self._entries(layer)}
            read = sum(cached.tensors[name].nbytes for name in parts)
            self._from_cache += read
            if torch.equal(_checksums(parts), cached.read(self._special(layer, "checksums"))):
                self._used += 1
                self._saved += self._stored_bytes(layer) - read
                return {}, self._unpacked(layer, parts)
            self._rebuilt.append(f"layer {layer}: its checksums do not match")
            self._saved -= read

            def take(checkpoint: Checkpoint, name: str) -> Tensor:
                return checkpoint.read(name).to(self._device)  # not in the feed's order, so not read ahead

        stored, parts = {}, {}
        for name in self._plan.layer_tensors(layer):
            tensor = take(lrm, name)
            parts |= self._packed(name, tensor)
            if layer in self._kept:
                stored[name] = tensor
        if layer not in self._kept:
            self._save(layer, parts, drain)
        return stored, self._unpacked(layer, parts)

    def rounded(self, layer: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stored layer, rounded, as the forward wants it: names inside the layer, in the compute dtype."""
        prefix, out = self._plan.family.layer_prefix(layer), {}
        for name, tensor in stored.items():
            found = self._unpacked(layer, self._packed(name, tensor), (name,))
            out[name.removeprefix(prefix)] = found[name].to(self._dtype)
        return out

    def as_dict(self) -> dict[str, Any]:
        """For the report. `bytes_saved`: of reading, in this run; negative where a damaged cache was read in vain."""
        told = {"weights": self._method, "cache": self._folder and str(self._folder), "layers_from_cache": self._used}
        told |= {"bytes_from_cache": self._from_cache, "bytes_saved": self._saved, "layers_cached": self._made}
        return told | {"rebuilt": self._rebuilt + self._stale_lines()}

    def warnings(self) -> list[str]:
        """What the user should know: cached layers that could not be used, or not be written."""
        lines = [f"capture_cache: {self._folder}: {line}; made again" for line in self._rebuilt + self._stale_lines()]
        return lines + ([f"capture_cache: {self._problem}; the next run reads the LRM again"] if self._problem else [])

    def _stale_lines(self) -> list[str]:
        return [f"{self._stale} layers were made from other files or by other versions"] if self._stale else []

    def _stored_bytes(self, layer: int) -> int:
        return sum(self._plan.lrm.tensors[name].nbytes for name in self._plan.layer_tensors(layer))

    def _special(self, layer: int, what: str) -> str:
        return f"{self._plan.family.layer_prefix(layer)}{what}"

    def _file(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:05d}.safetensors"

    def _entries(self, layer: int) -> list[Entry]:
        """The tensors of a layer in its file, by name."""
        out = []
        for name in self._plan.layer_tensors(layer):
            info = self._plan.lrm.tensors[name]
            if name not in self._rounded:
                out.append((name, info.dtype, info.shape))
                continue
            blocks = -(-info.shape[0] * info.shape[1] // BLOCK)
            codes = ("I8", info.shape) if self._method == "int8" else ("U8", (blocks * BLOCK // 2,))
            scales = (info.shape[0] if self._method == "int8" else blocks,)
            out += [(name, *codes), (f"{name}.scale", "F32", scales)]
        return sorted(out)

    def _open(self, layer: int) -> None:
        """Use the cached layer if its header is what it should be; else note why not."""
        file, problems, mark = self._file(layer), [], self._special(layer, "fingerprint")
        if not os.path.lexists(file):
            return
        found = read_header(file, problems)
        sums = self._special(layer, "checksums")
        wanted = {n: (code, shape) for n, code, shape in self._entries(layer)}
        wanted |= {mark: ("U8", (len(self._fingerprint),)), sums: ("I64", (len(wanted),))}
        if problems or mark not in found:
            self._rebuilt.append(f"layer {layer}: {problems[0] if problems else 'it has no fingerprint'}")
            return
        cached = Checkpoint(file.parent, _ROLE, found, {})
        try:
            made_from = cached.read(mark).view(-1).numpy().tobytes()
        except InputError as error:
            self._rebuilt.append(f"layer {layer}: {error}")
            return
        if made_from != self._fingerprint:
            self._stale += 1
        elif {n: (t.dtype, t.shape) for n, t in found.items()} != wanted:
            self._rebuilt.append(f"layer {layer}: it holds other tensors than it should")
        else:
            self._cached[layer] = cached

    def _packed(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in self._rounded:
            return {name: tensor}
        codes, scales = pack(self._method, tensor)
        return {name: codes, f"{name}.scale": scales}

    def _unpacked(self, layer: int, parts: dict[str, Tensor], names: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """The weights in the compute dtype; norms and biases as they are stored."""
        out = {}
        for name in names or self._plan.layer_tensors(layer):
            part, shape = parts[name], self._plan.lrm.tensors[name].shape
            rounded = name in self._rounded
            out[name] = unpack(self._method, part, parts[f"{name}.scale"], shape, self._dtype) if rounded else part
        return out

    def _save(self, layer: int, parts: dict[str, Tensor], drain: Drain) -> None:
        """Have the layer written to the cache, behind the sweep's back."""
        mark = torch.frombuffer(bytearray(self._fingerprint), dtype=torch.uint8)
        special = {self._special(layer, "checksums"): _checksums(parts), self._special(layer, "fingerprint"): mark}
        entries = [(n, c, s) for n, c, s in self._entries(layer)]
        entries += [(n, "U8" if t is mark else "I64", tuple(t.shape)) for n, t in special.items()]
        fetch = {name: on_host(t) for name, t in (parts | special).items()}

        def write() -> None:
            if self._problem:
                return  # said once; the rest would fail like it
            try:
                _write_file(self._file(layer), entries, fetch)
                self._made += 1
            except OSError as error:
                self._problem = f"{self._file(layer)}: cannot be written ({error.strerror})"

        drain.hand(write, sum(tensor_bytes(code, shape) for _, code, shape in entries))


def _checksums(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([checksum(parts[name]) for name in sorted(parts)]).cpu()


def _write_file(file: Path, entries: list[Entry], fetch: dict[str, Callable[[], Tensor]]) -> None:
    """One safetensors file under its final name, whole or not at all. OSError where it cannot be written."""
    wide_first = sorted(entries, key=lambda e: (-TORCH_DTYPES[e[1]].itemsize, e[0]))  # then all are aligned
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as out:
            out.write(encode_header(wide_first)[0])
            for name, *_ in wide_first:
                out.write(fetch[name]().contiguous().view(-1).view(torch.uint8).numpy())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder(recipe: Recipe, lrm: Checkpoint, device: torch.device) -> Path:
    """Where an LRM's rounded layers lie: one folder for a checkpoint's path, a method and a kind of device."""
    root = Path(recipe.capture_cache)
    if recipe.capture_cache == "auto":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = home / "streammerge" / "capture"
    name = hashlib.sha256(os.fsencode(lrm.path.resolve())).hexdigest()[:16]
    return root / f"{name}-{recipe.capture_weights}-{device.type}"


def fingerprint(lrm: Checkpoint, method: str, device: torch.device) -> bytes:
    """32 bytes of all that the rounded weights follow from: the shards' headers, sizes and times of change (reading
    their contents is what the cache saves), the method, the kind of device, and the versions."""
    stats = {f.name: os.stat(f) for f in {t.file for t in lrm.tensors.values()}}
    files = [(name, s.st_size, s.st_mtime_ns) for name, s in sorted(stats.items())]
    tensors = [(t.name, t.dtype, t.shape, t.file.name, t.start) for t in lrm.tensors.values()]
    told = [_FORMAT, BLOCK, method, device.type, version(), files, tensors]
    return hashlib.sha256(json.dumps(told).encode()).digest()
