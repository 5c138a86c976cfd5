"""Weights ahead of their use: tensors read on a thread, in the order in which they will be asked for.

The whole order is known before the first byte is read, so nothing is guessed: `take` hands tensors over, the thread
stays at most `ahead` bytes in front of it. For a CPU a tensor is read straight into pages of its own. For a GPU it is
read into a small ring of pinned slots, each sent on by a DMA copy on a stream of its own while the next one is being
read; beyond `ahead`, which is device memory, the kernel is told what comes next, so that its page cache fills while
the GPU computes.

Memory: `ahead` bytes of tensors (or the next tensor, where it is larger) on the device; for a GPU the ring on the host.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .checkpoint import TORCH_DTYPES, Checkpoint

SLOT = 32 << 20  # a power of two: torch rounds pinned blocks up to one
SLOTS = 4
_HINT = 4 << 30  # bytes past `ahead` that the kernel is asked to read

Order = Iterable[tuple[Checkpoint, str]]


class Closed(Exception):
    """The consumer has gone: the thread may stop."""


class Lane:
    """A first-in-first-out queue bounded by bytes; an error of the producer is raised in the consumer."""

    def __init__(self, limit: int):
        self._limit, self._held, self._items = limit, 0, deque()
        self._cond, self._closed, self._error = threading.Condition(), False, None

    def reserve(self, nbytes: int) -> None:
        """Wait for room; an item larger than the limit passes when it is alone. Raises Closed."""
        with self._cond:
            while not self._closed and self._held and self._held + nbytes > self._limit:
                self._cond.wait()
            if self._closed:
                raise Closed
            self._held += nbytes

    def put(self, item, nbytes: int) -> None:
        """Append what `reserve` made room for."""
        with self._cond:
            self._items.append((item, nbytes))
            self._cond.notify_all()

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the consumer once the items before it are taken."""
        with self._cond:
            self._error = error
            self._cond.notify_all()

    def get(self):
        """(item, its bytes), which count until they are released; waits for it, or raises the producer's error."""
        with self._cond:
            while not self._items:
                if self._error is not None:
                    raise self._error
                self._cond.wait()
            return self._items.popleft()

    def release(self, nbytes: int) -> None:
        """These bytes are the consumer's now, or gone."""
        with self._cond:
            self._held -= nbytes
            self._cond.notify_all()

    def close(self) -> None:
        """Drop what is waiting, and let a waiting producer go."""
        with self._cond:
            self._closed = True
            self._items.clear()
            self._cond.notify_all()


class Feed:
    """A context manager over one pass through `order`. `waited`: seconds that `take` stood still; `nbytes`: taken."""

    def __init__(self, order: Order, device: torch.device, ahead: int):
        self.waited, self.nbytes = 0.0, 0
        self._device, self._lane = device, Lane(ahead)
        self._order = list(order)
        self._read: Callable[[Checkpoint, str], tuple[Tensor, object]] = _to_pages
        self._thread = threading.Thread(target=self._run, name="streammerge-feed", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lane.close()
        self._thread.join()

    def take(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """The next tensor of the order, which must be this one, on the device in its stored dtype.

        Raises what reading it raised (InputError).
        """
        began = time.perf_counter()
        (key, tensor, ready), nbytes = self._lane.get()
        self._lane.release(nbytes)
        self.waited += time.perf_counter() - began
        if key != (checkpoint.role, name):
            raise RuntimeError(f"the sweep asks for {(checkpoint.role, name)}, the feed has read {key}")
        if ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready)
            tensor.record_stream(stream)
        self.nbytes += nbytes
        return tensor.to(self._device)  # it is there, unless the device is one that nobody reads ahead for

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                self._read = _Uploader(self._device)
            hints = _hints(self._order) if self._device.type == "cuda" else iter(())
            for checkpoint, name in self._order:
                nbytes = checkpoint.tensors[name].nbytes
                next(hints, None)
                self._lane.reserve(nbytes)
                tensor, ready = self._read(checkpoint, name)
                self._lane.put(((checkpoint.role, name), tensor, ready), nbytes)
            self._lane.fail(RuntimeError("the sweep asks for more than the feed was to read"))
        except Closed:
            pass
        except BaseException as error:  # the consumer's to raise
            self._lane.fail(error)


def _to_pages(checkpoint: Checkpoint, name: str) -> tuple[Tensor, None]:
    return checkpoint.read(name), None


class _Uploader:
    """Disk to device through pinned slots. Copies run on a side stream; an event tells when the last has landed."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._slots = [torch.empty(SLOT, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self._busy = [torch.cuda.Event() for _ in range(SLOTS)]
        self._turn = 0

    def __call__(self, checkpoint: Checkpoint, name: str) -> tuple[Tensor, torch.cuda.Event]:
        info = checkpoint.tensors[name]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            raw = torch.empty(info.nbytes, dtype=torch.uint8, device=self._device)
            for start in range(0, info.nbytes, SLOT):
                slot, busy = self._slots[self._turn], self._busy[self._turn]
                self._turn = (self._turn + 1) % SLOTS
                busy.synchronize()  # the copy that used this slot before
                size = min(SLOT, info.nbytes - start)
                checkpoint.read_into(name, memoryview(slot.numpy())[:size], start)
                raw[start : start + size].copy_(slot[:size], non_blocking=True)
                busy.record(self._stream)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape), ready


def _hints(order: list[tuple[Checkpoint, str]]) -> Iterator[None]:
    """Asks the kernel, one step a tensor, for the tensors up to _HINT bytes past the one at hand."""
    told, front = 0, 0
    for checkpoint, name in order:
        front -= checkpoint.tensors[name].nbytes
        while told < len(order) and front < _HINT:
            other, later = order[told]
            info = other.tensors[later]
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(other.descriptor(later), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
            front, told = front + info.nbytes, told + 1
        yield
