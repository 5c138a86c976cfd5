"""A synthetic trio of checkpoints in the shape of a real model, for benchmarks that read files.

    python benchmarks/synthetic.py OUT [--shape 1.5b] [--layers N] [--dtype bfloat16]

Makes OUT/base, OUT/itm and OUT/lrm: config.json and bf16 shards of 5 GB with an index, as the Hub has them, no
tokenizer. What is in them: streammerge/bench/synthetic.py. --layers keeps the first N decoder layers only, and
config.json says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from streammerge.bench import synthetic
from streammerge.bench.shapes import CODES, SHAPES

__all__ = ["SHAPES", "make_trio"]


def make_trio(
    root: Path, shape: str, layers: int | None = None, dtype: str = "bfloat16", roles: Sequence[str] = synthetic.ROLES
) -> dict[str, Path]:
    """base, itm and lrm under `root`, or some of them -> their folders."""
    return synthetic.make_trio(root, SHAPES[shape].config(layers, dtype=dtype), dtype, roles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--dtype", choices=CODES, default="bfloat16")
    args = parser.parse_args()
    if any((args.out / role).exists() for role in synthetic.ROLES):
        sys.exit(f"{args.out} holds a trio already")
    for role, path in make_trio(args.out, args.shape, args.layers, args.dtype).items():
        print(f"{role}: {path}, {sum(f.stat().st_size for f in os.scandir(path)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
