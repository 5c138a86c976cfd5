"""The RAIN sweep at the shapes of real models: `streammerge bench` in fresh processes, as rows.

    python benchmarks/bench_sweep.py [--shapes 0.5b 1.5b 7b=28 70b=4] [--runs 5] [--scratch-dir DIR] [-- BENCH FLAGS]
    python benchmarks/bench_sweep.py --flat 0.5b=4,16

SHAPE=N measures N layers (default: bench's own). Each run makes its synthetic trio anew, and measures the real sweep on
it; rows say how many layers and tokens were measured, and that the total is extrapolated. Flags after `--` go to
`streammerge bench`, as in `-- --device-memory 8GiB --scope layer`. --flat is about memory: the host peak of the same
shape with few and with many layers, and their ratio. Appends medians and every run to results/cpu-sweep.jsonl, or to
results/GPU-sweep.jsonl (--out). Disk: four times the layers' bytes, and what a merge keeps between its passes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  (first: what follows imports the package)
from rows import RESULTS, Row, append, row

from streammerge.bench.shapes import SHAPES

_CODE = "import sys, checkout; from streammerge.cli import main; sys.exit(main())"
_COMMAND = [sys.executable, "-c", _CODE, "bench"]
_PATHS = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
_ENV = os.environ | {"PYTHONPATH": os.pathsep.join(_PATHS)}


class Failed(Exception):
    """A run that gave no report; it has said why on stderr."""


def measured(shape: str, layers: int | None, flags: Sequence[str]) -> dict[str, Any]:
    """The report of one run in a process of its own. Raises Failed."""
    chosen = ["--layers", str(layers)] if layers else []
    given = [*_COMMAND, "--shape", shape, *chosen, "--quiet", "--json", *flags]
    done = subprocess.run(given, stdout=subprocess.PIPE, env=_ENV)
    if done.returncode:
        raise Failed(f"{shape}: exit code {done.returncode}")
    return json.loads(done.stdout)


def metrics() -> dict[str, Callable[[dict[str, Any]], float | None]]:
    """Metric with its unit -> its value in a report, None where it does not apply."""

    def of(name: str, scale: float = 1.0) -> Callable:
        def read(report: dict[str, Any]) -> float | None:
            value: Any = report
            for key in name.split("."):
                value = value.get(key)
            return None if value is None else value * scale

        return read

    def share(name: str) -> Callable:
        part = of(name)
        return lambda r: None if part(r) is None else part(r) / r["measured"]["sweep"]

    return {
        "measured s a layer": lambda r: r["measured"]["sweep"] / r["measured"]["layers"],
        "measured share waiting for weights": share("measured.waited"),
        "measured share of the GPU busy": share("measured.busy"),
        "measured token-layers/s": lambda r: sum(r["measured"]["tokens"].values()) * r["measured"]["layers"]
        / r["measured"]["sweep"],
        "measured read MB/s of the sweep": lambda r: r["measured"]["nbytes"] / r["measured"]["sweep"] / 1e6,
        "read MB/s with nothing else to do": of("measured.read_rate", 1e-6),
        "write MB/s with nothing else to do": of("measured.write_rate", 1e-6),
        "measured peak host GB beyond imports": of("measured.memory.host_beyond_imports", 1e-9),
        "measured peak device GB": lambda r: (r["measured"]["memory"]["device"] or 0) / 1e9 or None,
        "measured peak device GB reserved": of("measured.memory.device_reserved", 1e-9),
        "predicted peak host GB, whole merge": of("plan.host_total", 1e-9),
        "predicted peak device GB, whole merge": lambda r: r["plan"]["device_total"] / 1e9 or None,
        "extrapolated s a layer": of("extrapolated.layer.seconds"),
        "extrapolated s of work a layer": of("extrapolated.layer.work"),
        "extrapolated s of disk a layer": of("extrapolated.layer.disk"),
        "extrapolated total min": of("extrapolated.total", 1 / 60),
    }


def note(report: dict[str, Any]) -> str:
    """What was measured, and from what to what it is extrapolated."""
    found, whole = report["measured"], report["whole"]
    return (f"{report['device']}, {report['threads']} CPU threads, {report['compute_dtype']}, scope {report['scope']}; "
            f"{found['layers']} of {whole['layers']} layers and {sum(found['tokens'].values())} of "
            f"{sum(whole['tokens'].values())} tokens measured; synthetic weights, no tokenisation")  # fmt: skip


def sweep_rows(shape: str, reports: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each metric of one shape's runs."""
    layers, found = reports[0]["measured"]["layers"], []
    for metric, read in metrics().items():
        values = [read(report) for report in reports]
        if None not in values:
            found.append(row(f"RAIN sweep, {shape}, {layers} layers", metric, values, note(reports[0])))
    return found


def flat_rows(shape: str, few: Sequence[dict[str, Any]], many: Sequence[dict[str, Any]]) -> list[Row]:
    """Host peaks of few and of many layers, and their ratio run by run."""
    peak = metrics()["measured peak host GB beyond imports"]
    counts = [reports[0]["measured"]["layers"] for reports in (few, many)]
    peaks = [[peak(report) for report in reports] for reports in (few, many)]
    found = [row(f"RAIN sweep, {shape}, {n} layers", "peak host GB beyond imports", values, note(reports[0]))
             for n, values, reports in zip(counts, peaks, (few, many), strict=True)]  # fmt: skip
    ratios = [b / a for a, b in zip(*peaks, strict=True)]
    what = f"RAIN sweep, {shape}, {counts[1]} layers beside {counts[0]}"
    return [*found, row(what, "peak host memory, ratio", ratios, note(many[0]))]


def results_file(device: str) -> Path:
    """cpu-sweep.jsonl, or one named after the GPU."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-sweep.jsonl"


def _shape(text: str) -> tuple[str, list[int]]:
    name, _, layers = text.partition("=")
    if name not in SHAPES or not re.fullmatch(r"(\d+(,\d+)*)?", layers):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted one of {', '.join(SHAPES)}, and its layers as in 7b=28")
    return name, [int(n) for n in layers.split(",") if n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [(name, []) for name in SHAPES]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=every, metavar="SHAPE[=N]", help="default: all")
    parser.add_argument("--flat", type=_shape, metavar="SHAPE=FEW,MANY", help="memory at two numbers of layers instead")
    parser.add_argument("--runs", type=int, default=5, help="of each; their median is the row")
    parser.add_argument("--scratch-dir", default=".", help="the disk that is measured (default: here)")
    parser.add_argument("--out", type=Path, help="results file")
    parser.add_argument("flags", nargs="*", metavar="BENCH FLAGS", help="after --, for `streammerge bench`")
    args = parser.parse_args()
    flags = ["--scratch-dir", args.scratch_dir, *args.flags]
    if args.flat and len(args.flat[1]) != 2:
        parser.error("--flat wants two numbers of layers, as in 0.5b=4,16")
    wanted = [args.flat] if args.flat else [(s, [n]) for s, counts in args.shapes for n in counts or [None]]
    failures = []
    for shape, counts in wanted:
        try:
            turns = [[measured(shape, n, flags) for n in counts] for _ in range(args.runs)]
        except Failed as error:
            failures.append(str(error))
            continue
        columns = list(zip(*turns, strict=True))
        found = flat_rows(shape, *columns) if args.flat else sweep_rows(shape, columns[0])
        append(args.out or results_file(turns[0][0]["device"]), show(found))
    if failures:
        sys.exit("not measured: " + "; ".join(failures))


def show(rows: list[Row]) -> list[Row]:
    """Print rows and hand them on."""
    for one in rows:
        print(f"{one.what:32} {one.metric:40} {one.median:10.4g}  (spread {one.spread:.0%} of {len(one.runs)} runs)")
    return rows


if __name__ == "__main__":
    main()
