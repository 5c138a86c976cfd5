"""One measurement as one JSON line: what was measured, on which machine, with which versions, by which command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """`runs` are the single measurements, in order; `spread` is (largest - smallest) / median.

    Without runs, as for what could not run here, both are None, and the note says why.
    """

    what: str
    metric: str  # with its unit: 'wall s', 'peak RSS MB'
    median: float | None
    spread: float | None
    runs: tuple[float, ...]
    note: str
    command: str
    machine: dict
    versions: dict
    commit: str
    when: str
    facts: dict = field(default_factory=dict)  # what a table is made of: shape, variant, error, …


def row(what: str, metric: str, runs: Sequence[float], note: str = "", facts: dict | None = None) -> Row:
    """The row of these runs, with everything around them filled in."""
    middle = spread = None
    if runs:
        middle = statistics.median(runs)
        spread = round((max(runs) - min(runs)) / middle, 4) if middle else 0.0
        middle = round(middle, 4)
    return Row(
        what, metric, middle, spread, tuple(round(r, 4) for r in runs), note, command(), machine(),
        versions(), commit(), datetime.now(timezone.utc).isoformat(timespec="seconds"), facts or {},
    )  # fmt: skip


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rows)


def command() -> str:
    """This process's command, with the environment variables that change timings."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TRITON_INTERPRET")
    told = [f"{k}={os.environ[k]}" for k in names if k in os.environ]
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else str(script)
    return " ".join([*told, "python", name, *map(shlex.quote, sys.argv[1:])])


def machine() -> dict:
    """CPU, cores, memory, load at this moment (other work on the machine makes timings longer); the GPU in use."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(pages / 1e9, 1),
        "load": [round(x, 2) for x in os.getloadavg()],
    } | _gpu()


def _gpu() -> dict:
    torch = sys.modules.get("torch")  # a benchmark that does not use torch shall not pay for it
    if torch is None or not torch.cuda.is_initialized():
        return {}
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"gpu": about.name, "gpu_memory_gb": round(about.total_memory / 1e9, 1), "cuda": torch.version.cuda}


def versions() -> dict:
    """Python and the libraries that do the work; Triton where it is in use."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    found = {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}
    triton = sys.modules.get("triton")
    return found | ({"triton": triton.__version__} if triton else {})


def commit() -> str:
    """The repository's commit; '+' where the package (the demo apart) differs from it.

    A copy without git's folder does not know: it is told by the environment's COMMIT, or says '?'.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("COMMIT", "?")

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "streammerge", "kernels", ":!streammerge/demo")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
