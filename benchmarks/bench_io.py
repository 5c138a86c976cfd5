"""How fast a checkpoint is read and written, beside `cat` and `cp` of the same bytes.

    python benchmarks/bench_io.py [--shape 1.5b] [--layers N] [--rounds 5] [--work DIR]

Reading: every tensor by Checkpoint.read_into, into one buffer of a fixed size, by one thread and by one a core.
Writing: the same tensors by CheckpointWriter.put from one buffer, `finish` (fsync and rename) included; and each read
before it is put. Beside them `cat FILES > /dev/null`, `cp -r`, and `cp -r` with `sync` of what it wrote, which is what
a finished checkpoint can be compared with. All in one process but for cat and cp; each round runs everything once, on
a warm page cache. Appends GB/s to results/cpu-io.jsonl (--out).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rows import RESULTS, append, row
from synthetic import SHAPES, make_trio

from streammerge.io.checkpoint import Checkpoint, open_checkpoint
from streammerge.io.disk import byte_buffer
from streammerge.io.writer import CheckpointWriter, OutTensor
from streammerge.scan import PIECE
from streammerge.threads import in_parallel, usable_cores


def pieces(model: Checkpoint) -> list[tuple[str, int, int]]:
    """(tensor, byte offset, bytes) over the whole model."""
    return [(name, at, min(PIECE, info.nbytes - at))
            for name, info in model.tensors.items() for at in range(0, info.nbytes, PIECE)]  # fmt: skip


def read(model: Checkpoint, threads: int) -> None:
    """Every byte, into one buffer a thread."""

    def start() -> Callable:
        buffer = memoryview(byte_buffer(PIECE))
        return lambda piece: model.read_into(piece[0], buffer[: piece[2]], piece[1]) or piece[2]

    in_parallel(pieces(model), start, threads)


def write(model: Checkpoint, out: Path, threads: int, *, copy: bool) -> None:
    """A checkpoint of the same tensors: copies, or put from a buffer that is not filled anew."""
    tensors = [OutTensor(t.name, t.dtype, t.shape) for t in model.tensors.values()]
    with CheckpointWriter(out, tensors, 5 * 10**9) as writer:
        for t in tensors:
            writer.begin(t.name, t.dtype, t.shape)

        def start() -> Callable:
            buffer = memoryview(byte_buffer(PIECE))

            def work(piece: tuple[str, int, int]) -> int:
                name, at, size = piece
                if copy:
                    model.read_into(name, buffer[:size], at)
                writer.put(name, buffer[:size], at)
                return size

            return work

        in_parallel(pieces(model), start, threads)
        writer.finish()


def contestants(model: Checkpoint, out: Path) -> dict[str, Callable[[], object]]:
    """Label -> what is timed."""
    folder, cores = str(model.path), usable_cores()

    def shell(command: str) -> Callable[[], object]:
        return lambda: subprocess.run(["sh", "-c", command, folder, str(out)], check=True)

    found = {"cat > /dev/null": shell('cat "$0"/*.safetensors > /dev/null')}
    for n in dict.fromkeys((1, cores)):
        found[f"read_into, {n} threads"] = lambda n=n: read(model, n)
    found |= {"cp": shell('cp -r "$0" "$1"'), "cp and sync": shell('cp -r "$0" "$1" && sync "$1"/*')}
    for n in dict.fromkeys((1, cores)):
        found[f"put and finish, {n} threads"] = lambda n=n: write(model, out, n, copy=False)
        found[f"read_into, put and finish, {n} threads"] = lambda n=n: write(model, out, n, copy=True)
    return found


def bench(model: Checkpoint, out: Path, rounds: int) -> dict[str, list[float]]:
    """GB/s of every contestant, by round; outputs are deleted, and the disk is idle, before each."""
    size = sum(t.nbytes for t in model.tensors.values())
    runs = contestants(model, out)
    found: dict[str, list[float]] = {label: [] for label in runs}
    for n in range(rounds + 1):  # the first one warms the cache up
        for label, run in runs.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            began = time.perf_counter()
            run()
            if n:
                found[label].append(size / (time.perf_counter() - began) / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-io.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        root = Path(folder)
        with open_checkpoint(make_trio(root, args.shape, args.layers, roles=("lrm",))["lrm"], "lrm") as model:
            what = f"I/O, {args.shape} shape, {sum(t.nbytes for t in model.tensors.values()) / 1e9:.2f} GB"
            found = bench(model, root / "out", args.rounds)
    rows = [row(f"{what}: {label}", "GB/s", runs) for label, runs in found.items()]
    append(args.out, rows)
    for r in rows:
        print(f"{r.what}: {r.median:.2f} {r.metric} (spread {r.spread:.0%})")


if __name__ == "__main__":
    main()
