"""How long will a merge without calibration take? Bytes over the disk's speed, elements over the core's.

An estimate: reading and writing go through one disk, the cores share out the arithmetic, and the slower of the two
decides. What the page cache holds is read by the cores. Nothing here imports torch.
"""

from __future__ import annotations

import time

import numpy as np

from ..arithmetic import Chunk
from ..codec import WORDS
from ..planned import Plan, distinct
from ..scan import PIECE
from .disk import DiskSpeed

_PROBE = 0.2  # seconds


def block_speed(plan: Plan) -> float:
    """Elements a second that one thread merges, on numbers of the plan's dtypes."""
    name = next(iter(plan.merged))
    codes = [c.tensors[name].dtype for c in (plan.lrm, plan.itm, plan.base)]
    code = next(t.dtype for t in plan.tensors if t.name == name)
    chunk = Chunk({*codes, code}, {code}, PIECE)
    for row, stored_as in zip(chunk.stored, codes, strict=False):
        row.view(WORDS[stored_as])[:] = 0x3F80 if stored_as == "BF16" else 1
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < _PROBE:
        chunk.merge(codes, code, chunk.items, plan.merged[name].lam)
        done += chunk.items
    return done / (time.perf_counter() - began)


def plain_parts(plan: Plan, threads: int, read: DiskSpeed, write_rate: float, elements: float) -> dict[str, float]:
    """Seconds by part. `threads`: as many cores as are at work; `elements`: a second, of one thread."""
    models = distinct(plan.lrm, plan.itm, plan.base)
    merged = sum(c.tensors[n].nbytes for c in models for n in plan.merged)
    copied = sum(plan.lrm.tensors[n].nbytes for n in plan.copied)
    written = sum(t.nbytes for t in plan.lrm.tensors.values())
    reading = (merged + copied) / read.rate
    cached = read.cached or 0.0
    work = sum(int(np.prod(plan.lrm.tensors[n].shape)) for n in plan.merged) / elements
    cores = (work + cached * reading) / threads
    disk = (1 - cached) * reading + written / write_rate
    again = written + copied  # the output is checked beside what was copied
    return {
        "arithmetic": cores,
        "waiting for the disk": max(0.0, disk - cores),
        "verification": again / read.rate / (threads if cached > 0.5 else 1),
    }
