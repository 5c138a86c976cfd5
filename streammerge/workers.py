"""Batches side by side on a CPU, with results that do not know how many threads there were.

Layers of small models leave most of a core idle between operators, so several batches pass at once, a thread each, and
the threads share out torch's own. What a batch adds to something shared, it adds when all earlier batches have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


class Abandoned(Exception):
    """Another batch failed: its error is the one to tell."""


class Gates:
    """Lets work through in batch order, a gate for each thing shared. Batches set out in order, so none waits long."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._cond, self._broken = threading.Condition(), False

    def pass_in_order(self, gate: str, batch: int, work: Callable[[], None]) -> None:
        """Run `work` once every earlier batch has passed this gate."""
        with self._cond:
            while self._next.get(gate, 0) != batch:
                if self._broken:
                    raise Abandoned
                self._cond.wait()
        work()
        with self._cond:
            self._next[gate] = batch + 1
            self._cond.notify_all()

    def abandon(self) -> None:
        """Nobody waits any longer."""
        with self._cond:
            self._broken = True
            self._cond.notify_all()


class Workers:
    """`count` threads with an equal share of torch's each; one worker is the caller's own thread. Leave it to end them.

    torch.set_num_threads holds for the thread that calls it (OpenMP), which is what is wanted here.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = None
        if count > 1:
            share = max(1, torch.get_num_threads() // count)
            self._pool = ThreadPoolExecutor(count, "streammerge-worker", torch.set_num_threads, (share,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def run(self, work: Callable[[int, Gates], int], batches: int, tick: Callable[[int], None]) -> None:
        """work(batch, gates) for every batch, and `tick` with each result, in batch order.

        Where batches fail, the rest is given up and the first error in batch order is raised.
        """
        gates = Gates()
        if self._pool is None:
            for batch in range(batches):
                tick(work(batch, gates))
            return
        futures = [self._pool.submit(work, batch, gates) for batch in range(batches)]
        try:
            for future in futures:
                tick(future.result())
        finally:
            gates.abandon()
            for future in futures:
                future.cancel()
            wait(futures)
