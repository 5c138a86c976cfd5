"""CUDA's streams without CUDA: asynchronous copies are as late as they are allowed to be.

Copies with non_blocking=True wait in the queue of their stream until something waits for them: an event that is
synchronised, or that the compute stream waits for. Until then a target made by `to` holds garbage. A slot that is
filled again before its copy has left, or a tensor that is read before it has landed, therefore gives wrong bytes,
each time, where a real GPU would only now and then. Compute itself runs at once, on the CPU.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

CUDA = torch.device("cuda")


_turn = threading.RLock()


class Stream:
    """A queue of copies; `done` counts those that have run."""

    def __init__(self, device=None, eager=False):
        self.queue, self.done, self.eager = [], 0, eager

    def run(self, until: int) -> None:
        with _turn:  # who waits for a copy that another thread runs must wait for its end
            while self.done < until:
                work, self.done = self.queue[self.done], self.done + 1
                work()

    def add(self, work) -> None:
        self.queue.append(work)
        if self.eager:
            self.run(len(self.queue))

    def wait_event(self, event) -> None:
        self.add(event.synchronize)

    def wait_stream(self, other) -> None:
        until = len(other.queue)
        self.add(lambda: other.run(until))

    def synchronize(self) -> None:
        self.run(len(self.queue))


class Event:
    """A place in a stream's queue."""

    def __init__(self, enable_timing=False):
        self.stream = None

    def record(self, stream=None) -> None:
        self.stream = stream or current()
        self.until = len(self.stream.queue)

    def synchronize(self) -> None:
        if self.stream:
            self.stream.run(self.until)


_here = threading.local()
_compute = Stream(eager=True)


def current(device=None) -> Stream:
    """The thread's stream."""
    return getattr(_here, "stream", _compute)


@contextmanager
def on(stream: Stream):
    """torch.cuda.stream."""
    before, _here.stream = current(), stream
    yield
    _here.stream = before


def install(monkeypatch) -> SimpleNamespace:
    """Patch torch so that device 'cuda' is this. Returns what was page-locked: `.registered`, a list of addresses."""
    told = SimpleNamespace(registered=[])
    empty, to, copy_ = torch.empty, torch.Tensor.to, torch.Tensor.copy_

    def lazy_copy(self, source, non_blocking=False):
        if non_blocking:
            current().add(lambda: copy_(self, source))
            return self
        return copy_(self, source)

    def lazy_to(self, *args, non_blocking=False, **kwargs):
        if args and args[0] == CUDA:
            if not non_blocking:
                return self
            landed = torch.full_like(self, 77)
            current().add(lambda: copy_(landed, self))
            return landed
        return to(self, *args, **kwargs)

    def plain_empty(*size, device=None, pin_memory=False, **kwargs):
        return empty(*size, **kwargs).fill_(55)

    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: told.registered.append(address) or 0,
        cudaHostUnregister=lambda address: told.registered.remove(address) or 0,
    )
    for name, value in {"Stream": Stream, "Event": Event, "current_stream": current, "stream": on,
                        "device": lambda d: nullcontext(), "cudart": lambda: runtime}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", plain_empty)
    monkeypatch.setattr(torch.Tensor, "copy_", lazy_copy)
    monkeypatch.setattr(torch.Tensor, "to", lazy_to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return told
