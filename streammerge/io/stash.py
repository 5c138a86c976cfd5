"""Offloaded activations: the hidden states of a calibration stream between one layer and the next.

Activations stay, weights stream: between two visits of the device a batch lives here, on the host, where it costs
tokens x hidden x itemsize bytes (counted in `nbytes`). Not pinned: torch rounds every pinned block up to a power of
two, which can double what the plan promises. On the CPU nothing is copied at all.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Stash:
    """Keyed by batch number. `put` replaces what was there."""

    def __init__(self, device: torch.device):
        self.device = device
        self._held: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held on the host now."""
        return sum(t.numel() * t.element_size() for t in self._held.values())

    def put(self, batch: int, hidden: Tensor) -> None:
        """Take hidden [samples, tokens, hidden] off the device."""
        self._held[batch] = hidden.cpu()

    def drop(self) -> None:
        """Forget every batch: the stream has been all the way up."""
        self._held.clear()

    def fetch(self, batch: int) -> Tensor:
        """The batch's hidden states on the device."""
        return self._held[batch].to(self.device)
