"""What `make bench-gpu` runs: the kernels' tests on the GPU itself, then every benchmark that needs one.

    python benchmarks/bench_gpu.py [arguments of bench_kernels.py]

Needs a GPU, torch, Triton, pytest and 50 GiB of disk for a while, but no network: where the package is not installed,
the checkout is used as it lies. A step runs even where the one before it failed; ends with the first failure's code,
with 2 where there is no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def missing() -> str | None:
    """Why nothing can be measured here."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error})"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: kernels would not run on a GPU"
    return None if torch.cuda.is_available() else f"no GPU: torch {torch.__version__} of {sys.executable} sees none"


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    if reason := missing():
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return 2
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    sweep = ["benchmarks/bench_sweep.py", "--runs", "1", "--scratch-dir", tempfile.gettempdir(), "--shapes"]
    steps = [
        ["-m", "pytest", "-p", "checkout", "tests/triton_lane"],
        ["benchmarks/bench_kernels.py", *sys.argv[1:]],
        [*sweep, "7b=28", "70b=4", "--", "--scope", "layer"],  # 7B takes 49 GiB of disk so, 58 with scope model
        [*sweep, "7b=20", "70b=4"],
    ]
    codes = []
    for step in steps:
        print("$ python", *step, flush=True)
        codes.append(subprocess.run([sys.executable, *step], cwd=HERE.parent, env=env).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
