"""A sweep at work: its streams on their way up, what it reads from, what it has found, and where its time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .attention import AttentionMass, LayerMass
from .batches import make_batches
from .calibration import CalibrationSet
from .compose import Composed, LayerAlpha
from .forward import Stream, StreamedModel
from .io.checkpoint import Checkpoint
from .io.feed import Feed
from .io.stash import Stash
from .io.writer import CheckpointWriter
from .plan import Plan
from .progress import Progress


@dataclass
class Streams:
    """The calibration sets on their way up. `reference` and `verification` are the held-out set in θ_R and in θ*."""

    reasoning: Stream | None
    instruction: Stream | None
    reference: Stream | None
    verification: Stream | None

    @staticmethod
    def open(data: CalibrationSet, tokens_per_batch: int, device: torch.device, *, offload: bool = False) -> Streams:
        """Batches of each set that has samples; on a GPU, `offload` keeps their activations on the host."""

        def stream(samples: Sequence) -> Stream | None:
            return Stream(make_batches(samples, tokens_per_batch), device, offload=offload) if samples else None

        return Streams(stream(data.reasoning), stream(data.instruction), stream(data.heldout), stream(data.heldout))

    def all(self) -> list[Stream]:
        """Those that exist."""
        return [s for s in (self.reasoning, self.instruction, self.reference, self.verification) if s]


@dataclass
class Meter:
    """Where a sweep's time went. On a GPU `busy` is the time between the events around its work, waits left out."""

    waited: float = 0.0  # seconds in which the sweep stood still for weights
    nbytes: int = 0  # read from the three models
    seconds: float = 0.0  # the whole sweep
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def working(self, device: torch.device) -> Iterator[None]:
        """Work of the device; costs nothing on a CPU."""
        if device.type != "cuda":
            yield
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._events.append(pair)

    @property
    def busy(self) -> float | None:
        """Seconds of work on a GPU, None on a CPU. Waits for the device."""
        if not self._events:
            return None
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3


@dataclass
class Run:
    """A sweep at work, and what it found: per tensor, per layer, and L_think's two streams for `verify`.

    `ahead`: bytes of weights to read ahead. `keep`: bytes of the LRM's layers that may stay on a GPU between passes.
    """

    plan: Plan
    model: StreamedModel
    data: CalibrationSet
    streams: Streams
    writer: CheckpointWriter
    scratch: Path
    progress: Progress
    ahead: int = 256 << 20
    keep: int = 0
    composed: dict[str, Composed] = field(default_factory=dict)
    alphas: dict[int, LayerAlpha] = field(default_factory=dict)
    masses: dict[int, LayerMass] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    observer: AttentionMass | None = None  # it knows each batch's rows and spans, so one serves all layers
    shelf: Stash | None = None  # where v_proj's features wait, layer by layer in the same memory
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def advance(self, layer: int, weights: dict[str, Tensor], stream: Stream | None, **seen) -> None:
        """Move a stream up one layer, if there is one."""
        if stream:
            with self.meter.working(self.model.device):
                self.model.advance(layer, weights, stream, tick=lambda n: self.progress.advance(n, tokens=n), **seen)

    def feed(self, order: Sequence[tuple[Checkpoint, str]]) -> Feed:
        """Tensors in the order of their use, read ahead."""
        return Feed(order, self.model.device, self.ahead)

    def take(self, feed: Feed, checkpoint: Checkpoint, name: str) -> Tensor:
        """The next tensor of the feed."""
        before = feed.waited, feed.nbytes
        tensor = feed.take(checkpoint, name)
        self.meter.waited += feed.waited - before[0]
        self.meter.nbytes += feed.nbytes - before[1]
        self.progress.advance(nbytes=feed.nbytes - before[1])
        return tensor
