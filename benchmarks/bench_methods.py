"""mergekit configurations, by streammerge and by mergekit side by side: TIES, SLERP, task arithmetic.

    python benchmarks/bench_methods.py --mergekit VENV/bin [--methods ties slerp task_arithmetic] [--shape 1.5b]
        [--layers N] [--rounds 5] [--their-rounds 3] [--trio DIR] [--work DIR]

Both commands read the same YAML and the same files, each run in a fresh process: imports, verification, checksums and
report count. mergekit runs in the fastest of bench_merge's settings of threads, found in its first round, which tries
them all (--setting LABEL takes one as given). A round runs ours and theirs one after the other on a warm page cache;
outputs are deleted in between. --trio takes models that are there (base, itm, lrm), else they are made in --work.
Appends every run to results/cpu-methods.jsonl (--out); ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_merge import mergekit_settings
from rows import RESULTS, append, row
from synthetic import SHAPES
from timing import Timed, timed

from streammerge.bench.synthetic import ROLES

SETTINGS = {
    "ties": {"models": {"lrm": {"weight": 0.6, "density": 0.5}, "itm": {"weight": 0.4, "density": 0.5}}},
    "slerp": {"models": {"lrm": {}}, "parameters": {"t": 0.4}},
    "task_arithmetic": {"models": {"lrm": {"weight": 1.0}, "itm": {"weight": 0.7}}},
}


def write_config(root: Path, method: str, trio: Path) -> Path:
    """The YAML that both read."""
    told = SETTINGS[method]
    models = [{"model": str(trio / role), "parameters": given} for role, given in told["models"].items()]
    config = {"merge_method": method, "base_model": str(trio / "base"), "models": models, "dtype": "bfloat16"}
    path = root / f"{method}.yml"
    path.write_text(json.dumps(config | {"parameters": told.get("parameters", {})}))
    return path


def once(command: list[str], env: dict[str, str], out: Path) -> Timed:
    """One run; what it wrote is deleted and the disk is idle before it."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    ran = timed(command, 3600, env=os.environ | env)
    shutil.rmtree(out, ignore_errors=True)
    if ran.code:
        sys.exit(f"{' '.join(command)} ended with {ran.code}:\n{ran.told}")
    print(f"  {Path(command[0]).name}: {ran.wall:.2f} s, CPU {ran.cpu:.2f} s, {ran.peak:.0f} MB", flush=True)
    return ran


def bench(root: Path, method: str, trio: Path, args: argparse.Namespace, what: str) -> list:
    """All rows of one method."""
    config, out = write_config(root, method, trio), root / "out"
    ours = [str(Path(sys.executable).with_name("streammerge")), "merge", str(config), str(out), "--quiet"]
    settings = mergekit_settings()
    tried = {args.setting: settings[args.setting]} if args.setting else settings
    theirs = {label: [once([str(args.mergekit / "mergekit-yaml"), str(config), str(out), *flags], env, out)]
              for label, (env, flags) in tried.items()}  # fmt: skip
    best = min(theirs, key=lambda label: theirs[label][0].wall)
    env, flags = settings[best]
    mine = []
    for n in range(args.rounds):
        print(f"{method}, round {n + 1} of {args.rounds}, mergekit: {best}", flush=True)
        mine.append(once(ours, {}, out))
        if len(theirs[best]) < args.their_rounds:
            theirs[best].append(once([str(args.mergekit / "mergekit-yaml"), str(config), str(out), *flags], env, out))
    rows = []
    for label, runs in {"streammerge": mine, f"mergekit {best}": theirs[best]}.items():
        rows += [row(f"{what}, {method}: {label}", metric, [getattr(r, field) for r in runs])
                 for metric, field in (("wall s", "wall"), ("CPU s", "cpu"), ("peak RSS MB", "peak"))]  # fmt: skip
    for metric, field in (("wall", "wall"), ("peak RSS", "peak")):
        a, b = (statistics.median(getattr(r, field) for r in runs) for runs in (theirs[best], mine))
        named = f"{what}, {method}: mergekit / streammerge"
        rows.append(row(named, f"ratio of {metric}", [a / b], f"its best: {best}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="the bin folder of a venv with mergekit")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, help="only the first so many decoder layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--their-rounds", type=int, default=3)
    parser.add_argument("--setting", choices=mergekit_settings(), help="mergekit's threads, where its best is known")
    parser.add_argument("--trio", type=Path, help="a folder with base, itm and lrm")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where files are made")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-methods.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        root, trio = Path(folder), args.trio
        if trio is None:
            trio = root
            making = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(root), "--shape", args.shape]
            subprocess.run(making + (["--layers", str(args.layers)] if args.layers else []), check=True)
        size = sum(f.stat().st_size for f in (trio / "lrm").iterdir())
        for role in ROLES:
            subprocess.run(["sh", "-c", 'cat "$0"/* >/dev/null', str(trio / role)], check=True)
        layers = f", {args.layers} layers" if args.layers else ""
        for method in args.methods:
            rows = bench(root, method, trio, args, f"{args.shape} shape{layers}, {size / 1e9:.2f} GB a model")
            append(args.out, rows)
            for r in rows:
                print(f"{r.what}: {r.metric} {r.median:.3g} (spread {r.spread:.0%}) {r.note}")


if __name__ == "__main__":
    main()
