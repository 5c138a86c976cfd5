"""A plain merge (task arithmetic) beside the floor and mergekit, in one run.

    python benchmarks/bench_merge.py [--shapes 0.5b 1.5b] [--rounds 5] [--mergekit VENV/bin] [--work DIR] [--keep]

The floor: `cat` of the three models to /dev/null and `cp` of one. streammerge: the command `streammerge merge` in a
fresh process, so imports, the check of the written file, its SHA256 (once more without) and the report count. mergekit
(--mergekit, its own venv with a CPU torch): `mergekit-yaml` on the same files, with every setting of threads in
`mergekit_settings`. Each round runs all of them once, one after the other, on a warm page cache; outputs are deleted in
between. Needs four times a model's bytes of disk (1.5b: 12 GB) and a page cache that holds them. Appends medians and
every run to results/cpu-merge.jsonl (--out); ratios are of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import RESULTS, append, row
from synthetic import SHAPES
from timing import Timed, timed

from streammerge.bench.synthetic import ROLES

LAMBDA = 0.7
NO_HASHES = "streammerge, manifest: none"


def mergekit_settings() -> dict[str, tuple[dict[str, str], list[str]]]:
    """What is tried of mergekit: label -> environment, arguments."""
    one, two = ({"OMP_NUM_THREADS": str(n)} for n in (1, 2))
    return {
        "OMP_NUM_THREADS=1": (one, []),
        "OMP_NUM_THREADS=2": (two, []),
        "-j 2": ({}, ["-j", "2"]),
        "OMP_NUM_THREADS=1 --async-write --write-threads 2": (one, ["--async-write", "--write-threads", "2"]),
    }


def recipes(root: Path, trio: dict[str, Path]) -> dict[str, Path]:
    """The same merge as both read it."""
    ours = {"merge_method": "task_arithmetic", "base_model": str(trio["base"]), "instruct_model": str(trio["itm"]),
            "reasoning_model": str(trio["lrm"]), "lambda": LAMBDA}  # fmt: skip
    # θ_B + 1·(θ_R − θ_B) + λ·(θ_I − θ_B): the same sum
    weights = {"lrm": 1.0, "itm": LAMBDA}
    models = [{"model": str(trio[role]), "parameters": {"weight": w}} for role, w in weights.items()]
    theirs = {"merge_method": "task_arithmetic", "base_model": str(trio["base"]), "models": models, "dtype": "bfloat16"}
    found = {"streammerge": ours, NO_HASHES: ours | {"manifest": "none"}, "mergekit": theirs}
    paths = {name: root / f"{n}.yml" for n, name in enumerate(found)}
    for path, recipe in zip(paths.values(), found.values(), strict=True):
        path.write_text(json.dumps(recipe))
    return paths


def contestants(root: Path, trio: dict[str, Path], mergekit: Path | None) -> dict[str, tuple[list[str], dict]]:
    """Label -> command and environment. Every command makes root/out anew."""
    paths, out = recipes(root, trio), str(root / "out")
    files = [str(f) for folder in trio.values() for f in sorted(folder.glob("*.safetensors"))]
    ours = str(Path(sys.executable).with_name("streammerge"))
    found = {
        "floor: cat trio": (["cat", *files], {}),
        "floor: cp one": (["cp", "-r", str(trio["lrm"]), out], {}),
        **{name: ([ours, "merge", str(paths[name]), out], {}) for name in ("streammerge", NO_HASHES)},
    }
    if mergekit:
        for label, (env, flags) in mergekit_settings().items():
            command = [str(mergekit / "mergekit-yaml"), str(paths["mergekit"]), out, *flags]
            found[f"mergekit {label}"] = (command, env)
    return found


def one_round(root: Path, runs: dict[str, tuple[list[str], dict]], found: dict[str, list[Timed]]) -> None:
    """Every contestant once; what each one wrote is deleted and the disk is idle before the next."""
    for label, (command, env) in runs.items():
        shutil.rmtree(root / "out", ignore_errors=True)
        os.sync()
        # a shell sends cat's output away: `timed` keeps what a command prints
        shell = ["sh", "-c", 'exec "$@" >/dev/null', "sh", *command] if label.startswith("floor: cat") else command
        ran = timed(shell, 3600, env=os.environ | env)
        if ran.code:
            sys.exit(f"{' '.join(command)} ended with {ran.code}:\n{ran.told}")
        found[label].append(ran)
        print(f"  {label}: {ran.wall:.2f} s, CPU {ran.cpu:.2f} s, {ran.peak:.0f} MB", flush=True)
    shutil.rmtree(root / "out", ignore_errors=True)


def bench(shape: str, work: Path, rounds: int, mergekit: Path | None, layers: int | None) -> list:
    """All rows of one shape; its files are deleted at the end."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        root = Path(folder)
        making = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(root), "--shape", shape]
        subprocess.run(making + (["--layers", str(layers)] if layers else []), check=True)  # this process stays small
        trio = {role: root / role for role in ROLES}
        size = sum(f.stat().st_size for f in trio["lrm"].iterdir())
        runs = contestants(root, trio, mergekit)
        found: dict[str, list[Timed]] = {label: [] for label in runs}
        for path in trio.values():
            subprocess.run(["sh", "-c", 'cat "$0"/* >/dev/null', str(path)], check=True)  # the first cat would pay
        for n in range(rounds):
            print(f"{shape}, round {n + 1} of {rounds}, {size / 1e9:.2f} GB a model", flush=True)
            one_round(root, runs, found)
    return rows_of_shape(f"plain merge, {shape} shape, {size / 1e9:.2f} GB a model", found)


def rows_of_shape(what: str, found: dict[str, list[Timed]]) -> list:
    """Wall, CPU and peak of everything; streammerge against the floor, and against mergekit's fastest setting."""
    rows = []
    for label, runs in found.items():
        rows += [row(f"{what}: {label}", "wall s", [r.wall for r in runs]),
                 row(f"{what}: {label}", "CPU s", [r.cpu for r in runs]),
                 row(f"{what}: {label}", "peak RSS MB", [r.peak for r in runs])]  # fmt: skip
    ours = found["streammerge"]
    for name in ("streammerge", NO_HASHES):
        floors = zip(found["floor: cat trio"], found["floor: cp one"], found[name], strict=True)
        ratios = [r.wall / (cat.wall + cp.wall) for cat, cp, r in floors]
        rows.append(row(f"{what}: {name} / floor", "ratio of wall", ratios))
    theirs = {label: runs for label, runs in found.items() if label.startswith("mergekit")}
    if theirs:
        middle = len(ours) // 2
        for metric, field in (("wall", "wall"), ("peak RSS", "peak")):
            best = min(theirs, key=lambda label: sorted(getattr(r, field) for r in theirs[label])[middle])  # noqa: B023
            ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(theirs[best], ours, strict=True)]
            rows.append(row(f"{what}: mergekit / streammerge", f"ratio of {metric}", ratios, f"its best: {best}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "1.5b"])
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers of each shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="the bin folder of a venv with mergekit")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-merge.jsonl")
    args = parser.parse_args()
    for shape in args.shapes:
        rows = bench(shape, args.work, args.rounds, args.mergekit, args.layers)
        append(args.out, rows)
        for r in rows:
            print(f"{r.what}: {r.metric} {r.median:.3g} (spread {r.spread:.0%}) {r.note}")


if __name__ == "__main__":
    main()
