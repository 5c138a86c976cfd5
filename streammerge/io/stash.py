"""Offloaded activations: the hidden states of a calibration stream between one layer and the next.

Activations stay, weights stream. On the CPU nothing is copied. On a GPU a batch either stays in device memory, where
the budget has room for all of them, or lives between two visits in page-locked host memory: it goes out on one copy
stream while the next batch is computed, and comes back on another before its turn. The host block is registered with
CUDA as it is: torch's own pinned blocks are rounded up to powers of two, which can double what the plan promises.

Memory: tokens x hidden x itemsize bytes; while offloaded, also the batch at hand and its neighbours on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Stash:
    """Keyed by batch number. `put` replaces what was there; several threads may work on different batches."""

    def __init__(self, device: torch.device, *, offload: bool = False):
        self.device = device
        self._held: dict[int, Tensor] = {}
        self._away = _HostBlocks(device) if offload and device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        held = self._away.blocks if self._away else self._held
        return sum(t.numel() * t.element_size() for t in held.values())

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

    def on_host(self) -> dict[int, Tensor]:
        """Every batch, on the host."""
        return self._away.on_host() if self._away else {n: t.cpu() for n, t in self._held.items()}

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

    def on_host(self) -> dict[int, Tensor]:
        self._out.synchronize()
        return self.blocks

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


def _page_locked(like: Tensor) -> Tensor:
    """Host memory of this shape that DMA can reach. Where the system forbids it, copies still work, only slower."""
    block = torch.empty(like.shape, dtype=like.dtype)
    torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel() * block.element_size(), 0)
    return block
