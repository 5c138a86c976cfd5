"""Offloaded activations: the hidden states of a calibration stream between one layer and the next.

Activations stay, weights stream. On the CPU nothing is copied. On a GPU a batch either stays in device memory, where
the budget has room for all of them, or lives between two visits in page-locked host memory: it goes out on one copy
stream while the next batch is computed, and comes back on another before its turn. The host block is registered with
CUDA as it is: torch's own pinned blocks are rounded up to powers of two, which can double what the plan promises.

Where the host has no room either, they are spilled to a file without a name, which a crash cannot leave behind.

Memory: tokens x hidden x itemsize bytes, or none of it when spilled; while away from the device, also the batch at
hand and its neighbours there.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ResourceError


class Stash:
    """Keyed by batch number. `put` replaces what was there; several threads may work on different batches.

    `offload`: off a GPU, to the host. `spill`: to a file in this folder instead; ResourceError where it cannot grow.
    """

    def __init__(self, device: torch.device, *, offload: bool = False, spill: Path | None = None):
        self.device = device
        self._held: dict[int, Tensor] = {}
        self._away = None
        if spill is not None:
            self._away = _SpillFile(spill, device)
        elif offload and device.type == "cuda":
            self._away = _HostBlocks(device)

    @property
    def nbytes(self) -> int:
        """Bytes kept now, wherever they are."""
        return self._away.nbytes if self._away else sum(t.numel() * t.element_size() for t in self._held.values())

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep hidden [samples, tokens, hidden], which is on the device."""
        if self._away:
            self._away.send(batch, hidden)
        else:
            self._held[batch] = hidden

    def fetch(self, batch: int) -> Tensor:
        """The batch's hidden states on the device; when offloaded, the next batch sets out as well."""
        return self._away.bring(batch) if self._away else self._held[batch]

    def part(self, batch: int, index: int) -> Tensor:
        """One slice along the first dimension of what was put, on the device."""
        return self._away.part(batch, index) if self._away else self._held[batch][index]

    def on_host(self, batch: int) -> Tensor:
        """One batch, on the host."""
        return self._away.on_host(batch) if self._away else self._held[batch].cpu()

    def kept(self) -> dict[int, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every batch that was put."""
        if self._away:
            return self._away.kept()
        return {n: (t.shape, t.dtype) for n, t in self._held.items()}

    def drop(self) -> None:
        """Forget every batch: the stream has been all the way up."""
        self._held.clear()
        if self._away:
            self._away.drop()


class _HostBlocks:
    """Page-locked host memory, a block a batch, with a copy stream for each direction."""

    def __init__(self, device: torch.device):
        self.blocks: dict[int, Tensor] = {}
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._left: dict[int, torch.cuda.Event] = {}  # the batch's bytes are on the host
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._device = device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.blocks.values())

    def send(self, batch: int, hidden: Tensor) -> None:
        if batch not in self.blocks:
            self.blocks[batch] = _page_locked(hidden)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            self.blocks[batch].copy_(hidden, non_blocking=True)
            hidden.record_stream(self._out)
            self._left[batch] = torch.cuda.Event()
            self._left[batch].record()

    def bring(self, batch: int) -> Tensor:
        if batch not in self._coming:
            self._start(batch)
        if batch + 1 in self.blocks:
            self._start(batch + 1)
        hidden, landed = self._coming.pop(batch)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(landed)
        hidden.record_stream(stream)
        return hidden

    def on_host(self, batch: int) -> Tensor:
        self._left[batch].synchronize()
        return self.blocks[batch]

    def kept(self) -> dict[int, tuple[torch.Size, torch.dtype]]:
        return {n: (t.shape, t.dtype) for n, t in self.blocks.items()}

    def part(self, batch: int, index: int) -> Tensor:
        self._left[batch].synchronize()
        return self.blocks[batch][index].to(self._device, non_blocking=True)

    def _start(self, batch: int) -> None:
        with torch.cuda.stream(self._in):
            self._in.wait_event(self._left[batch])
            hidden = self.blocks[batch].to(self._device, non_blocking=True)
            landed = torch.cuda.Event()
            landed.record()
        self._coming[batch] = hidden, landed

    def drop(self) -> None:
        self._out.synchronize()
        self._in.synchronize()
        for block in self.blocks.values():
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
        self.blocks.clear()
        self._coming.clear()


class _SpillFile:
    """A file without a name, each batch at an offset of its own. Plain reads and writes: pages of the page cache are
    the kernel's to drop."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device, self._lock = folder, device, threading.Lock()
        self._place: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self.nbytes = 0
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)

    def send(self, batch: int, hidden: Tensor) -> None:
        raw = memoryview(hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        with self._lock:
            if batch not in self._place:
                self._place[batch] = self.nbytes, hidden.shape, hidden.dtype
                self.nbytes += len(raw)
        done, start = 0, self._place[batch][0]
        try:
            while done < len(raw):
                done += os.pwrite(self._file.fileno(), raw[done:], start + done)
        except OSError as error:
            raise ResourceError(f"{self._folder}: spilled activations cannot be written: {error.strerror}; free some "
                                "space, give --scratch-dir another disk, or raise --host-memory") from error

    def bring(self, batch: int) -> Tensor:
        start, shape, dtype = self._place[batch]
        return self._read(start, shape, dtype, self._device)

    def part(self, batch: int, index: int) -> Tensor:
        start, shape, dtype = self._place[batch]
        return self._read(start + index * shape[1:].numel() * dtype.itemsize, shape[1:], dtype, self._device)

    def _read(self, start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        raw = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], start + done)
                if not count:
                    raise OSError(0, "the file ends too early")
                done += count
        except OSError as error:
            raise ResourceError(f"{self._folder}: spilled activations cannot be read: {error.strerror}; give "
                                "--scratch-dir another disk") from error
        return raw.view(dtype).reshape(shape).to(device)

    def on_host(self, batch: int) -> Tensor:
        start, shape, dtype = self._place[batch]
        return self._read(start, shape, dtype, torch.device("cpu"))

    def kept(self) -> dict[int, tuple[torch.Size, torch.dtype]]:
        return {n: (shape, dtype) for n, (_, shape, dtype) in self._place.items()}

    def drop(self) -> None:
        self._place.clear()
        self.nbytes = 0
        os.ftruncate(self._file.fileno(), 0)


def _page_locked(like: Tensor) -> Tensor:
    """Host memory of this shape that DMA can reach. Where the system forbids it, copies still work, only slower."""
    block = torch.empty(like.shape, dtype=like.dtype)
    torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel() * block.element_size(), 0)
    return block
