"""Memory: sizes as people write them, and meters for what was really used.

The host meter is the kernel's own high-water mark of the resident set (VmHWM), which no sampling can miss; the device
meter is torch's allocator peak.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .container import memory_limit
from .errors import RecipeError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str | int) -> int:
    """'8GiB', '500 MB', '5G' or a plain number of bytes -> bytes. Decimal units are powers of 1000, 'i' units of 1024.

    Raises RecipeError for anything else.
    """
    text = str(text)[:60]
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise RecipeError(f"cannot read the size {text!r}: write a number with a unit, such as 8GiB, 500MB or 5G")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise RecipeError(f"the size {text!r} is zero: write a positive size, such as 8GiB")
    return size


def format_size(nbytes: float) -> str:
    """Bytes -> '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def host_now() -> int:
    """Resident set of this process now, in bytes (0 where /proc does not exist)."""
    return _status_bytes("VmRSS") if Path("/proc/self/status").exists() else 0


def total(device: str) -> int:
    """All the memory that there is on 'host' (the machine's, or the container's), or on a CUDA device; 0 where it
    cannot be told."""
    if device == "host":
        return int(min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()))
    import torch

    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0


def host_peak() -> int:
    """High-water mark of the resident set since start or since `reset_host_peak`, in bytes."""
    if Path("/proc/self/status").exists():
        return _status_bytes("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def reset_host_peak() -> bool:
    """Start a new high-water mark. False where the kernel does not allow it: the peak then covers the whole run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def reset_device_peak(device: torch.device) -> None:
    """Start a new peak on a CUDA device."""
    if device.type == "cuda":
        import torch

        torch.cuda.init()  # the meter of cuda:N refuses to be reset before
        torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: str) -> int:
    """Peak bytes that torch's allocator handed out on `device` (0 for the CPU)."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def _libc(name: str):
    """A function of the C library where it is glibc, else None."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


_BLOCK = 4 << 20  # bytes of a block from which on malloc maps it by itself
_tamed = False


def tame_allocator() -> bool:
    """Keep glibc from holding on to large freed blocks. For a process that is ours: the setting is process-wide.

    Left alone, malloc raises its mmap threshold to the largest block freed so far (up to 32 MB). Weights and
    activations then live in a heap that fragments, and the resident set grows with the number of layers (measured
    on SmolLM2-135M: 320 MB beyond imports instead of 200). `fit_allocator` knows better once the batches are known.
    """
    global _tamed
    mallopt = _libc("mallopt")
    _tamed = bool(mallopt and mallopt(-3, _BLOCK) and mallopt(-1, 32 << 20))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return _tamed


def fit_allocator(hidden: int) -> None:
    """Have blocks from a quarter of `hidden` on, the bytes of the largest batch's hidden states, mapped by themselves:
    smaller batches' are then, too. In a heap they leave holes: 530 MB were 356 at a width of 768, and two runs of one
    merge differed by a fifth. Small models keep the heap: its holes are small, and page faults would cost more.

    Does nothing unless this process is ours (`tame_allocator`).
    """
    mallopt = _libc("mallopt")
    if _tamed and mallopt and hidden > 1 << 20:
        mallopt(-3, min(_BLOCK, max(1 << 19, hidden // 4)))


def give_back() -> None:
    """Return the heap's free pages to the kernel, so that one layer's leftovers do not add up to the next one's."""
    trim = _libc("malloc_trim")
    if trim:
        trim(0)
