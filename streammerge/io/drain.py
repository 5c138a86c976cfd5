"""Work that nothing waits for, such as writing what is merged, on a thread of its own and in order.

Memory: at most `limit` bytes handed over and not yet done (or one item, where it is larger).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .feed import Closed, Lane

WAITING = 4  # one part in so many of what is read ahead may wait to be written; a slower disk holds the sweep up


class Drain:
    """A context manager: leaving it waits for all that was handed over, and raises the first error of the thread.
    Left by an error, it drops what has not begun. `waited`: seconds that `hand` stood still for room."""

    def __init__(self, limit: int):
        self.waited, self._lane = 0.0, Lane(limit)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="streammerge-drain", daemon=True)

    def __enter__(self) -> Drain:
        self._thread.start()
        return self

    def hand(self, work: Callable[[], None], nbytes: int) -> None:
        """Run `work`, which holds `nbytes`, after all that came before. Raises what earlier work raised."""
        began = time.perf_counter()
        try:
            self._lane.reserve(nbytes)
        except Closed:
            raise self._error from None  # only a failure closes the lane before the end
        self.waited += time.perf_counter() - began
        self._lane.put(work, nbytes)

    def flush(self) -> None:
        """Wait until all that was handed over is done. Raises what it raised."""
        done = threading.Event()
        self.hand(done.set, 0)
        while not done.wait(0.05):
            if self._error is not None:
                raise self._error

    def __exit__(self, kind, *_: object) -> None:
        if kind is not None:
            self._lane.close()
        self._lane.fail(Closed())
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while True:
                work, nbytes = self._lane.get()
                work()
                del work  # and what it holds
                self._lane.release(nbytes)
        except Closed:
            pass
        except BaseException as error:
            self._error = error
            self._lane.close()


def on_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Call it, on any thread, for the tensor on the host. From a GPU it is copied on a stream of its own, after the
    work that is queued now and beside all that comes later."""
    if tensor.device.type != "cuda":
        host = tensor.cpu()
        return lambda: host
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensor.device))

    def fetch() -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
            torch.cuda.current_stream().wait_event(done)
            return tensor.cpu()  # returns when the copy has landed: the device block may be freed then

    return fetch
