"""What a container may use: the limits of this process's control groups (cgroup v1 and v2) and of all above them.

The machine's own figures do not know them, and who goes by these is killed, or throttled, on a machine that is idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_limit() -> float:
    """Bytes; infinite where there is no limit."""
    found = [*_numbers("memory", "memory.max"), *_numbers("memory", "memory.limit_in_bytes", v1=True)]
    return min((numbers[0] for numbers in found), default=math.inf)


def cpu_limit() -> float:
    """Cores, as 1.5; infinite where there is no limit."""
    periods = [period for (period,) in _numbers("cpu", "cpu.cfs_period_us", v1=True)]
    quotas = [quota for (quota,) in _numbers("cpu", "cpu.cfs_quota_us", v1=True)]
    pairs = [*(pair for pair in _numbers("cpu", "cpu.max") if len(pair) == 2), *zip(quotas, periods, strict=False)]
    return min((quota / period for quota, period in pairs if quota > 0 and period > 0), default=math.inf)


def _numbers(controller: str, file: str, v1: bool = False) -> Iterator[list[float]]:
    """The numbers in `file` of our own group and of every group above it; 'max' is infinite.

    Inside a container the group's path may be the host's, of which only the root is mounted: folders that are not there
    are passed over.
    """
    with suppress(OSError):
        for line in GROUPS.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if (controller not in controllers.split(",")) if v1 else number != "0":
                continue
            inner, root = Path(path.lstrip("/")), MOUNTED / controller if v1 else MOUNTED
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):
                    words = (root / folder / file).read_text().split()
                    yield [math.inf if word == "max" else float(word) for word in words]
