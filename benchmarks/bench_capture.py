"""What rounded weights in the calibration forwards save and cost (`capture_weights: native | int8 | nf4`).

    python benchmarks/bench_capture.py [--only trio smollm2 rounding] [--runs 5] [--work DIR]

On the demo's trio with its own calibration, and on SmolLM2-135M (the trio of tests/smollm2.py) with the shortest
samples of ../shared/calibration. Saved: bytes that the survey reads, in the run that makes the cache and in a later one
that reads it. Cost: the share of the native features' energy that lies outside the rounded model's bases, site by site,
beside the share outside the native bases; the change of α; L_think; and on the trio the demo's accuracies (test split).
These do not depend on the machine's load: --runs 0 measures them alone. Each timed run is a merge in a fresh process
(--runs of every kind, in turns, on a warm page cache): seconds of the survey, and the peak of the host's memory
beyond imports. `rounding`: CPU time of rounding a bf16 weight of 4096 x 1024, and of the way back to fp32 with its
checksum, on one thread. Appends to results/cpu-capture.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from rows import RESULTS, ROOT, Row, append, row

METHODS = ("native", "int8", "nf4")
SITES = ("attn_in", "values", "attn_out", "mlp_in", "mlp_mid")
SAMPLES = {"reasoning": 8, "instruction": 12}  # of SmolLM2: the shortest
DATA = ROOT / "streammerge/demo/data"


def trio_recipe(work: Path) -> dict:
    """The demo's, with absolute paths."""
    recipe = yaml.safe_load((DATA / "recipe.yml").read_text())
    for key in ("base_model", "instruct_model", "reasoning_model"):
        recipe[key] = str(DATA / recipe[key])
    recipe["calibration"] = {k: str(DATA / v) for k, v in recipe["calibration"].items()}
    return recipe


def smollm2_recipe(work: Path) -> dict:
    """SmolLM2's trio, which is made at first use, and the shortest of the authors' samples."""
    sys.path.insert(0, str(ROOT / "tests"))
    import smollm2

    if smollm2.missing():
        raise SystemExit(smollm2.missing())
    paths, sets = smollm2.smollm2_trio(), ROOT.parent / "shared/calibration"
    chosen = json.loads((sets / "reasoning_calibration_set.json").read_text())
    chosen = sorted(chosen, key=lambda s: len(s["prompt"] + s["reasoning"]))[: SAMPLES["reasoning"]]
    lines = sorted((sets / "instruction_calibration_set.jsonl").read_text().splitlines(), key=len)
    (work / "reasoning.json").write_text(json.dumps(chosen))
    (work / "instruction.jsonl").write_text("\n".join(lines[: SAMPLES["instruction"]]))
    return {
        "merge_method": "rain", "base_model": str(paths["base"]), "instruct_model": str(paths["itm"]),
        "reasoning_model": str(paths["lrm"]), "thinking": smollm2.THINKING,
        "calibration": {"reasoning": str(work / "reasoning.json"), "instruction": str(work / "instruction.jsonl"),
                        "holdout": 0.25},
    }  # fmt: skip


MODELS = {"trio": trio_recipe, "smollm2": smollm2_recipe}
NAMES = {"trio": "demo trio", "smollm2": "SmolLM2-135M"}


def write_recipe(work: Path, recipe: dict, method: str) -> Path:
    """The recipe of one method, with a cache of this benchmark's own."""
    keys = {} if method == "native" else {"capture_weights": method, "capture_cache": str(work / "cache")}
    path = work / f"{method}.yml"
    path.write_text(yaml.safe_dump(recipe | keys))
    return path


def watched_merge(recipe: Path, out: Path, watch) -> dict:
    """A merge in this process that shows `watch(layer, capture, bases)` every layer's features and bases."""
    from streammerge import load_recipe, merge, sweep

    plain = sweep.build_bases

    def build(capture, basis, seed, layer):
        bases = plain(capture, basis, seed, layer)
        watch(layer, capture, bases)
        return bases

    sweep.build_bases = build
    try:
        return merge(load_recipe(recipe), out)
    finally:
        sweep.build_bases = plain


def named(sites: dict, values) -> dict:
    """Site -> what belongs to it, a list: of `values` one a key/value head."""
    return {site: [found] for site, found in sites.items()} | {"values": list(values)}


def outside(features, u) -> float:
    """Share of the features' energy outside the span of U: 1 − ‖H U‖² / ‖H‖²."""
    import torch

    u = u.double()
    if features.cov is not None:
        cov = features.cov.double()
        return 1 - float((u * (cov @ u)).sum() / cov.trace())
    rows = torch.cat(features.rows).double()
    return 1 - float((rows @ u).square().sum() / rows.square().sum())


def costs(work: Path, recipe: dict, accuracies: bool) -> dict[str, dict]:
    """Method -> what it costs and reads: one merge each with a fresh cache, and the native one looking at all bases."""
    found, reports = {}, {}
    for method in METHODS[1:]:
        shutil.rmtree(work / "cache", ignore_errors=True)
        kept = found[method] = {}
        for run in ("first", "later"):  # the same numbers, which is checked
            reports[method, run] = watched_merge(
                write_recipe(work, recipe, method), work / f"{method}-{run}",
                lambda layer, _, bases, kept=kept: kept.setdefault(layer, named(bases.sites, bases.values)),
            )  # fmt: skip
        assert reports[method, "first"]["l_think"] == reports[method, "later"]["l_think"]
    residuals: dict[str, dict[str, list[float]]] = {m: {s: [] for s in SITES} for m in METHODS}

    def look(layer, capture, bases) -> None:
        features = named(capture.sites, capture.values)
        every = {"native": named(bases.sites, bases.values)} | {m: found[m][layer] for m in METHODS[1:]}
        for method, mine in every.items():
            for site, parts in features.items():
                residuals[method][site] += [outside(f, b.u) for f, b in zip(parts, mine[site], strict=True)]

    reports["native", "first"] = watched_merge(write_recipe(work, recipe, "native"), work / "native-first", look)
    wanted = sum(reports["native", "first"]["alpha"]["heads"], [])
    out = {}
    for method in METHODS:
        told = reports[method, "first"]
        change = [abs(a - b) for a, b in zip(sum(told["alpha"]["heads"], []), wanted, strict=True)]
        out[method] = {
            "residual": {s: [sum(v) / len(v), max(v)] for s, v in residuals[method].items()},
            "rank": sum(m["rank"] for m in told["modules"]) / len(told["modules"]),
            "alpha_change": [sum(change) / len(change), max(change)],
            "l_think": told["l_think"]["mean"],
        } | reading(reports, method)
        if accuracies:
            out[method]["accuracies"] = score(work / f"{method}-first")
    return out


def reading(reports: dict, method: str) -> dict[str, int]:
    """Bytes that the survey reads, first and later, and of the whole sweep in the first run."""
    saved = reports["nf4", "later"]["capture"]
    layers = saved["bytes_saved"] + saved["bytes_from_cache"]  # the LRM's decoder layers as stored
    later = reports[method, "later"]["capture"]["bytes_from_cache"] if method != "native" else layers
    whole = reports[method, "first"]["throughput"]["bytes_read"]
    return {"survey_bytes_first": layers, "survey_bytes_later": later, "sweep_bytes_first": whole}


def score(model: Path) -> dict[str, float]:
    """The demo's rates on the test split."""
    from streammerge.demo.evaluate import evaluate, load_rows, summarize

    summary = summarize(evaluate(model, load_rows(DATA / "test.jsonl")))
    return {k: summary[f"{k}_accuracy"]["rate"] for k in ("reasoning", "instruction", "both")}


def timed_merge(recipe: Path, out: Path) -> None:
    """The child's part: a merge whose survey is timed; prints its seconds and the peak in MB as JSON."""
    from streammerge import load_recipe, merge, sweep
    from streammerge.memory import tame_allocator

    tame_allocator()
    plain, spent = sweep.survey, []

    def survey(run):
        began = time.perf_counter()
        alphas = plain(run)
        spent.append(time.perf_counter() - began)
        return alphas

    sweep.survey = survey
    told = merge(load_recipe(recipe), out)
    print(json.dumps({"survey": spent[0], "peak": told["memory"]["host_beyond_imports"] / 1e6}))


def times(work: Path, recipe: dict, runs: int) -> dict[tuple[str, str], list[dict]]:
    """(method, first or later) -> every run. Each round merges with each method once without and once with a cache."""
    found: dict[tuple[str, str], list[dict]] = {}
    for _ in range(runs):
        shutil.rmtree(work / "cache", ignore_errors=True)
        for method in METHODS:
            for run in ("first", "later"):
                shutil.rmtree(work / "out", ignore_errors=True)
                file = str(write_recipe(work, recipe, method))
                command = [sys.executable, __file__, "--child", file, str(work / "out")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((method, run), []).append(json.loads(done.stdout.splitlines()[-1]))
    return found


def rows_of(model: str, work: Path, runs: int) -> list[Row]:
    """Every row of a model: for each method, the seconds and peaks of first and later runs, and all costs as facts."""
    recipe = MODELS[model](work)
    cost, taken, rows = costs(work, recipe, model == "trio"), times(work, recipe, runs), []
    for method in METHODS:
        for run in ("first", "later"):
            facts = {"model": NAMES[model], "weights": method, "run": run} | cost[method]
            runs_of = taken.get((method, run), [])
            note = "" if runs_of else "not timed: --runs 0"
            peaks = [r["peak"] for r in runs_of]
            if peaks:
                facts["peak_mb"] = [round(p, 1) for p in peaks]
            seconds = [r["survey"] for r in runs_of]
            rows.append(row(f"capture, {NAMES[model]}, {method}, {run} run", "survey s", seconds, note, facts))
    return rows


def rounding(runs: int = 7) -> list[Row]:
    """CPU nanoseconds a weight, each way; these hardly depend on the machine's load."""
    import torch

    from streammerge.capture_cache import checksum
    from streammerge.quantized import pack, unpack

    torch.set_num_threads(1)
    weight, rows = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for method in METHODS[1:]:
        parts = pack(method, weight)

        def back(method=method, parts=parts):
            return [checksum(p) for p in parts], unpack(method, *parts, weight.shape, torch.float32)

        ways = {"rounding": lambda method=method: pack(method, weight), "back": back}
        for way, work in ways.items():
            taken = []
            for _ in range(runs + 1):
                began = time.process_time()
                work()
                taken.append((time.process_time() - began) * 1e9 / weight.numel())
            rows.append(row(f"{way}, {method}", "CPU ns a weight", taken[1:], "", {"weights": method, "way": way}))
    return rows


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*MODELS, "rounding"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices, help="what is measured (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="timed merges of every kind (0: none)")
    parser.add_argument("--work", type=Path, help="directory for caches and outputs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-capture.jsonl", help="results file")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return timed_merge(*args.child)
    if "rounding" in args.only:
        append(args.out, rounding())
    for model in (m for m in MODELS if m in args.only):
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            append(args.out, rows_of(model, Path(work), args.runs))


if __name__ == "__main__":
    main()
