"""Independent jobs on a few threads: the first error ends them all, and Ctrl-C is heard at once.

For work that leaves the interpreter lock alone (reading, writing, numpy on large blocks). The caller's own thread does
none of it: it tells of the progress, and it is where Python raises KeyboardInterrupt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from threading import Event, Lock, Thread
from typing import TypeVar

from .container import cpu_limit

Job = TypeVar("Job")
_POLL = 0.1  # seconds between two reports of progress


def usable_cores() -> int:
    """Cores that this process may run on, and is given the time of."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(there, cpu_limit())))


def in_parallel(
    jobs: Iterable[Job],
    start: Callable[[], Callable[[Job], int]],
    workers: int,
    tick: Callable[[int], None] = lambda done: None,
) -> None:
    """Do all jobs, in their order as far as `workers` threads allow.

    `start` is called once in each thread, for the thread's own buffers; what it returns does one job and says how much
    was done, in units of which `tick` hears. Raises the first error once every thread has ended.
    """
    todo, lock, stop = iter(jobs), Lock(), Event()
    errors: list[BaseException] = []
    done = [0] * workers

    def loop(n: int) -> None:
        try:
            work = start()
            while not stop.is_set():
                with lock:
                    job = next(todo, None)
                if job is None:
                    return
                done[n] += work(job)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [Thread(target=loop, args=(n,), name=f"streammerge-{n}", daemon=True) for n in range(workers)]
    told = 0
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_POLL)
                told, before = sum(done), told
                tick(told - before)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]
    tick(sum(done) - told)
