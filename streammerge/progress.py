"""What a user sees while a merge runs: a bar with an ETA on a terminal, a JSON line a layer for a pipeline, else only
a line a stage.

Everything goes to stderr; stdout is kept for results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .memory import host_now, host_peak

Mode = Literal["auto", "quiet", "json"]


@dataclass(frozen=True)
class Step:
    """How far the present stage of a merge is: `done` of `total` work units (bytes of a plain merge, token-layers of a
    sweep), tokens and bytes that it moved, seconds since it began and, once anything is done, seconds to its end."""

    stage: str
    done: int
    total: int
    tokens: int
    nbytes: int
    seconds: float
    eta_seconds: float | None


class Progress:
    """A context manager. `total` is in work units (token-layers); rates are averages since the start of the stage.

    `listener` hears of every step besides; what it raises ends the merge, which can then be gone on with.
    """

    def __init__(self, mode: Mode = "auto", listener: Callable[[Step], None] | None = None):
        self.mode, self._listener = mode, listener
        self._stage = ""
        self._bar: Any = None
        self._task: Any = None
        self._began = time.perf_counter()
        self._tokens = self._bytes = self._done = 0
        self._total = 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def event(self, name: str, **fields: Any) -> None:
        """Something worth a line in the log, such as a stage that begins."""
        if self.mode == "json":
            record = {"ts": round(time.time(), 3), "level": "info", "event": name, **fields, "rss": host_now()}
            print(json.dumps(record), file=sys.stderr, flush=True)
        elif self.mode == "auto" and self._bar is None:
            text = " ".join(f"{k}={v}" for k, v in fields.items())
            print(f"[streammerge] {name} {text}".rstrip(), file=sys.stderr, flush=True)

    def start(self, label: str, total: int) -> None:
        """Begin a stage of `total` work units."""
        self.event(label)
        self._began, self._total = time.perf_counter(), max(1, total)
        self._tokens = self._bytes = self._done = 0
        self._stage = label
        self._report()
        if self.mode == "auto" and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.percentage:>3.0f}% ETA"),
                TimeRemainingColumn(compact=True), TextColumn("{task.fields[rates]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(label, total=self._total, rates="")

    def advance(self, units: int = 0, *, tokens: int = 0, nbytes: int = 0, label: str | None = None) -> None:
        """Work done since the last call."""
        self._done += units
        self._tokens += tokens
        self._bytes += nbytes
        self._stage = label or self._stage
        self._report()
        if self._bar is not None:
            seconds = self._seconds()
            rates = f"{self._tokens / seconds / 1e3:.1f}k tok/s {self._bytes / seconds / 1e6:.0f} MB/s"
            rates += f" peak {host_peak() / 1e9:.2f} GB"
            told = {"description": label} if label else {}
            self._bar.update(self._task, advance=units, rates=rates, **told)

    def layer(self, name: str, layer: int, of: int) -> None:
        """A layer of the pass `name` is done, one work unit: a line with rates and ETA in the JSON log."""
        self.advance(1)
        if self.mode == "json":
            seconds = self._seconds()
            self.event(
                name, layer=layer, of=of, tokens_per_second=round(self._tokens / seconds, 1),
                bytes_per_second=round(self._bytes / seconds), peak=host_peak(),
                eta_seconds=round(self._eta(seconds) or 0.0, 1),
            )  # fmt: skip

    def _report(self) -> None:
        if self._listener is not None:
            seconds = self._seconds()
            self._listener(Step(self._stage, self._done, self._total, self._tokens, self._bytes, seconds,
                                self._eta(seconds)))  # fmt: skip

    def _eta(self, seconds: float) -> float | None:
        return seconds * max(0, self._total - self._done) / self._done if self._done else None

    def _seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self._began)

    def stop(self) -> None:
        """End the stage's bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
