"""A command's wall time, CPU time and peak memory.

The peak is the kernel's, of the command or of what it waited for. Linux counts the resident set of the process that
started it, too: a benchmark that measures small processes imports nothing large itself.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """One run of a command. CPU seconds hardly depend on what else the machine does; wall seconds do."""

    wall: float
    cpu: float
    peak: float  # RSS, MB
    code: int  # 124: over the limit
    told: str  # the end of its output


def timed(command: list[str], limit: float, **kwargs) -> Timed:
    """Run a command, at most `limit` seconds."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **kwargs)
        code = None
        while code is None:
            found, status, usage = os.wait4(child.pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
            elif time.perf_counter() - began > limit:
                child.kill()
                usage, code = os.wait4(child.pid, 0)[2], 124
            else:
                time.sleep(0.005)
        seconds, child.returncode = time.perf_counter() - began, code
        log.seek(0)
        return Timed(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, code, log.read()[-3000:])
