"""A sweep at work: its streams on their way up, what it reads from, what it has found, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .artifacts import Artifacts
from .attention import AttentionMass, LayerMass
from .batches import make_batches
from .calibration import CalibrationSet
from .capture_cache import Quantized
from .compose import Composed, LayerAlpha
from .forward import Stream, StreamedModel
from .io.checkpoint import Checkpoint
from .io.drain import WAITING, Drain
from .io.feed import Feed
from .io.stash import Stash
from .io.writer import CheckpointWriter
from .journal import Journal
from .planned import Plan
from .progress import Progress


@dataclass
class Streams:
    """The calibration sets on their way up. `reference` and `verification` are the held-out set in θ_R and in θ*."""

    reasoning: Stream | None
    instruction: Stream | None
    reference: Stream | None
    verification: Stream | None

    @staticmethod
    def open(
        data: CalibrationSet,
        tokens_per_batch: int,
        device: torch.device,
        *,
        offload: bool = False,
        spill: Path | None = None,
    ) -> Streams:
        """Batches of each set that has samples. Where their activations wait: Stash."""

        def stream(samples: Sequence) -> Stream | None:
            batches = make_batches(samples, tokens_per_batch)
            return Stream(batches, device, offload=offload, spill=spill) if samples else None

        return Streams(stream(data.reasoning), stream(data.instruction), stream(data.heldout), stream(data.heldout))

    def all(self) -> list[Stream]:
        """Those that exist."""
        return list(self.named().values())

    def moving(self, stage: str, surveyed: bool) -> list[str]:
        """Names of those that move in a stage. With a survey the instruction set goes up in it, and nothing else."""
        return [n for n in self.named() if not surveyed or (n == "instruction") == (stage == "survey")]

    def named(self) -> dict[str, Stream]:
        """Those that exist, by name."""
        return {name: stream for name, stream in vars(self).items() if stream}


@dataclass
class Meter:
    """Where a sweep's time went. On a GPU `busy` is the time between the events around its work, waits left out."""

    waited: float = 0.0  # seconds in which the sweep stood still for weights
    blocked: float = 0.0  # seconds in which it stood still since what it had merged was not yet written
    nbytes: int = 0  # read from the three models
    seconds: float = 0.0  # the whole sweep
    _clock: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def working(self, device: torch.device, part: str) -> Iterator[None]:
        """Work of the device on a part of the sweep: a stream's name, embedding, bases or composing."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._clock[part] = self._clock.get(part, 0.0) + time.perf_counter() - began
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._events.append((part, *pair))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of work by part: the clock's on a CPU, the device's own on a GPU, which is waited for."""
        found = dict(self._clock)
        if self._events:
            torch.cuda.synchronize()
        for part, begin, end in self._events:
            found[part] = found.get(part, 0.0) + begin.elapsed_time(end) / 1e3
        return found

    @property
    def busy(self) -> float | None:
        """Seconds of work on a GPU, None on a CPU. Waits for the device."""
        return sum(self.parts.values()) if self._events else None


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
    progress: Progress
    ahead: int = 256 << 20
    keep: int = 0
    spill: Path | None = None  # where activations go that the host has no room for
    composed: dict[str, Composed] = field(default_factory=dict)
    alphas: dict[int, LayerAlpha] = field(default_factory=dict)
    masses: dict[int, LayerMass] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    observer: AttentionMass | None = None  # it knows each batch's rows and spans, so one serves all layers
    shelf: Stash | None = None  # where v_proj's features wait, layer by layer in the same memory
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    artifacts: Artifacts | None = None  # bases and masses that outlive the merge
    journal: Journal | None = None  # where snapshots for a resume go; None takes none
    quantized: Quantized | None = None  # the LRM's layers as the calibration forwards see them, if not as stored

    def reuses(self, kind: str) -> bool:
        """Whether an earlier merge's bases or masses serve."""
        return self.artifacts is not None and kind in self.artifacts.reused

    def advance(self, layer: int, weights: dict[str, Tensor], stream: Stream | None, **seen) -> None:
        """Move a stream up one layer, if there is one."""
        if stream:
            part = next(name for name, other in self.streams.named().items() if other is stream)
            with self.meter.working(self.model.device, part):
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

    @contextmanager
    def drain(self) -> Iterator[Drain]:
        """Takes work to be done behind the sweep's back; left, it waits for what is still to be done."""
        with Drain(self.ahead // WAITING) as drain:
            yield drain
            began = time.perf_counter()
        self.meter.blocked += drain.waited + time.perf_counter() - began
