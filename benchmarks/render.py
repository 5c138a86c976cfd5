"""Write the measured tables into the README, from benchmarks/results, and draw results/scaling.svg.

    python benchmarks/render.py

A table stands between two comment lines; tests/test_readme.py and tests/test_bench_kernels.py fail when it is not the
committed result. The kernels' has the last row of each variant and shape, a table for every GPU; without any, it says
that it is empty.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import parity_table
import scaling

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
HEAD = "| model | reasoning | instruction | both | missing `</think>` | L_think |\n|---|---|---|---|---|---|"
CAPTURE_HEAD = (
    "| model | weights | the survey reads: first / later run | later, of all reading | energy outside the bases: mean, "
    "worst | rank | change of α: mean, largest | L_think | reasoning / instruction / both | survey: first / later | "
    "peak memory: first / later |\n" + 11 * "|---" + "|"
)
KERNELS_HEAD = "| kernel | model | shape | Triton | twin | best library call | share | auto |\n" + 8 * "|---" + "|"


def line(row: dict) -> str:
    """One model's line; rates in percent."""
    name = row["method"] if row["lambda"] is None else f"{row['method']} λ = {row['lambda']:g}"
    rates = [f"{100 * row[k]:.1f}" for k in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy")]
    missing = "–" if row["missing_think"] is None else f"{100 * row['missing_think']:.1f}"
    loss = "–" if row["l_think"] is None else f"{row['l_think']:.1e}"
    return f"| {' | '.join([name, *rates, missing, loss])} |"


def demo() -> str:
    """The demo's table."""
    found = json.loads((RESULTS / "demo-test.json").read_text())
    table = "\n".join([HEAD, *map(line, found["rows"])])
    told = "\n".join(f"> {text}" + "  " for text in found["comparisons"])
    return f"{table}\n\n{told}"


def kernel_rows() -> dict[str, dict[tuple, dict[str, dict]]]:
    """GPU -> (kernel, model, shape) -> variant -> its last row."""
    found: dict[str, dict[tuple, dict[str, dict]]] = {}
    for file in sorted(RESULTS.glob("*-kernels.jsonl")):
        for text in file.read_text().splitlines():
            row = json.loads(text)
            facts = row["facts"]
            if "gpu" in row["machine"] and not facts["quick"]:
                shapes = found.setdefault(facts["device"], {})
                shapes.setdefault((facts["kernel"], facts["model"], facts["shape"]), {})[facts["variant"]] = row
    return found


def time_of(row: dict | None) -> str:
    """A cell: microseconds, or a dash; † where the variant is not exact enough."""
    if row is None or row["median"] is None:
        return "–"
    return f"{row['median']:.0f}" + ("" if row["facts"]["status"] == "ok" else " †")


def kernel_line(key: tuple, variants: dict[str, dict]) -> str:
    """One shape's line. The library is its fastest call that is exact enough, or else its fastest."""
    calls = [r for name, r in variants.items() if name not in ("Triton", "twin") and r["median"] is not None]
    best = min(calls, key=lambda r: (r["facts"]["status"] != "ok", r["median"]), default=None)
    kernel = variants.get("Triton")
    share = "–" if kernel is None or kernel["median"] is None else f"{100 * kernel['facts']['share']:.0f} %"
    named = time_of(best) + ("" if best is None else f" ({best['facts']['variant']})")
    auto = kernel["facts"]["auto"] if kernel else "–"
    return f"| {' | '.join([*key, time_of(kernel), time_of(variants.get('twin')), named, share, auto])} |"


def kernels() -> str:
    """The kernels' tables, or the line that says that there is none."""
    found = kernel_rows()
    if not found:
        return (
            "*Empty*: nothing was measured on a GPU yet. `make bench-gpu` and `python benchmarks/render.py` on a "
            "machine with one fill it.\nUntil then `auto` takes Triton wherever it can run: at which shapes it should "
            "take the library waits for measurements."
        )
    parts = []
    for gpu, shapes in found.items():
        facts = next(iter(next(iter(shapes.values())).values()))["facts"]
        rates = facts["ceilings"]
        parts += [
            f"{gpu}, {facts['dtype']}: {rates['matmul']:.0f} TFLOP/s, {rates['tf32']:.0f} in TF32, "
            f"{rates['copy']:.0f} GB/s. Times in µs; the share is Triton's, of the roofline; † is not exact enough.",
            "\n".join([KERNELS_HEAD, *(kernel_line(key, variants) for key, variants in shapes.items())]),
        ]
    return "\n\n".join(parts)


def capture_line(first: dict, later: dict) -> str:
    """One model and kind of weights; what was not timed is a dash."""
    facts, sites = first["facts"], first["facts"]["residual"].values()
    read, then, whole = (facts[k] for k in ("survey_bytes_first", "survey_bytes_later", "sweep_bytes_first"))
    mean, worst = sum(m for m, _ in sites) / len(sites), max(w for _, w in sites)
    rates = facts.get("accuracies", {}).values()
    seconds = [r["median"] for r in (first, later)]
    peaks = [r["facts"].get("peak_mb") for r in (first, later)]
    cells = [
        facts["model"], facts["weights"], f"{read / 1e6:.1f} / {then / 1e6:.1f} MB",
        f"{100 * (then - read) / whole:+.1f} %" if then != read else "–",
        f"{100 * mean:.2f} %, {100 * worst:.2f} %", f"{facts['rank']:.1f}",
        "{:.4f}, {:.4f}".format(*facts["alpha_change"]) if facts["weights"] != "native" else "–",
        f"{facts['l_think']:.2e}", " / ".join(f"{100 * r:.1f}" for r in rates) or "–",
        "–" if None in seconds else "{:.2f} / {:.2f} s".format(*seconds),
        "–" if None in peaks else "{:.0f} / {:.0f} MB".format(*map(statistics.median, peaks)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def capture() -> str:
    """The table of rounded calibration weights, by the last row of each kind, and what rounding takes."""
    found: dict[tuple, dict[str, dict]] = {}
    taken: dict[tuple, dict] = {}
    for text in (RESULTS / "cpu-capture.jsonl").read_text().splitlines():
        row = json.loads(text)
        if "way" in row["facts"]:
            taken[row["facts"]["weights"], row["facts"]["way"]] = row
            continue
        found.setdefault((row["facts"]["model"], row["facts"]["weights"]), {})[row["facts"]["run"]] = row
    told = ", ".join(f"{weights} {way} {r['median']:.2g}" for (weights, way), r in taken.items())
    table = "\n".join([CAPTURE_HEAD, *(capture_line(runs["first"], runs["later"]) for runs in found.values())])
    return f"{table}\n\nCPU time of one thread, ns a weight: {told}."


def faults() -> str:
    """The table of faults by what was told and left, from the last row; what both kinds of merge tell alike is told
    once."""
    met = json.loads((RESULTS / "cpu-faults.jsonl").read_text().splitlines()[-1])["facts"]["faults"]
    lines: dict[tuple, list[str]] = {}
    for one in met:
        said = re.sub(r" \(\d+ bytes\)", "", one["says"]).replace("|", "\\|")
        said = said if len(said) <= 150 else said[:149] + "…"
        key = one["fault"], said or "–", one["code"], one["left"] + ("" if not one["problems"] else " (!)")
        same = next((k for k in lines if (k[0], k[2:]) == (key[0], key[2:])), key)
        lines.setdefault(same, []).append(one["kind"])
    body = [f"| {fault} | {said} | {code} | {left} |" for (fault, said, code, left) in lines]
    return "\n".join(["| fault | told | exit code | OUT afterwards |", "|---|---|---|---|", *body])


def kills() -> str:
    """The table of kills by kind and place, from the last row of each kind."""
    last = {}
    for text in (RESULTS / "cpu-kills.jsonl").read_text().splitlines():
        one = json.loads(text)
        last[one["facts"]["kind"]] = one
    lines = ["| merge | killed | kills | done again | extra time: median, largest | outputs that differ |",
             "|---|---|---|---|---|---|"]
    for kind, one in last.items():
        places: dict[str, list[dict]] = {}
        for kill in one["facts"]["kills"]:
            places.setdefault(re.split(r"[:,]", kill["left"])[0], []).append(kill)
        for place, struck in places.items():
            again = [k["replayed"] for k in struck if "replayed" in k]
            layers = f"{statistics.mean(again):.1f} of {one['facts']['layer_passes']} layers" if again else "–"
            extra = [k["extra"] for k in struck]
            inside = sum(k["how"] == "in a write" for k in struck)
            lines.append(f"| {kind}, {one['facts']['whole_seconds']:.2f} s | {place} | {len(struck)}, {inside} in a "
                         f"write | {layers} | {statistics.median(extra):.2f} s, {max(extra):.2f} s | "
                         f"{one['facts']['wrong']} |")
    return "\n".join(lines)


def budget() -> str:
    """The table of planned and measured peaks, a row a cell."""
    rows = [json.loads(text) for text in (RESULTS / "cpu-budget.jsonl").read_text().splitlines()]
    head = ("model", "`--host-memory`", "tokens a batch x workers", "planned", "measured", "difference")
    lines = [f"| {' | '.join(head)} |", 6 * "|---" + "|"]
    for one in rows:
        f = one["facts"]
        size = f"{f['hidden']} x {f['wide']}, {f['heads']}/{f['kv_heads']} heads, {f['layers']} layers"
        model = f"{f['shape']}: {size}, {f['dtype']}, {f['tokens'] / 1e3:.0f}k tokens"
        how = f"{f['tokens_per_batch']} x {f['workers']}" + (", spilled" if f["spill"] else "")
        lines.append(f"| {model} | {f['budget']} | {how} | {f['planned'] / 1e6:.0f} MB | {one['median']:.0f} MB | "
                     f"{100 * f['error']:+.1f} % |")  # fmt: skip
    worst = max(abs(one["facts"]["error"]) for one in rows)
    return "\n".join([*lines, "", f"Worst difference: {100 * worst:.1f} %."])


def methods() -> str:
    """The table of mergekit configurations by both, from the last row of each kind."""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for text in (RESULTS / "cpu-methods.jsonl").read_text().splitlines():
        one = json.loads(text)
        case, _, who = one["what"].rpartition(": ")
        kind = "both" if " / " in who else who.split()[0]
        found.setdefault(case, {})[kind, one["metric"]] = one
        if kind == "mergekit":
            found[case]["mergekit", "threads"] = who.removeprefix("mergekit ")
    lines = ["| merge | streammerge | mergekit 0.1.5 | times as fast | peak RSS: streammerge, mergekit | share |",
             6 * "|---" + "|"]
    for case, told in found.items():
        ours, theirs = (f"{told[who, 'wall s']['median']:.1f} s ({len(told[who, 'wall s']['runs'])} runs)"
                        for who in ("streammerge", "mergekit"))
        peaks = [told[who, "peak RSS MB"]["median"] for who in ("streammerge", "mergekit")]
        lines.append(f"| {case} | {ours} | {theirs}, {told['mergekit', 'threads']} | "
                     f"{told['both', 'ratio of wall']['median']:.1f} | {peaks[0]:.0f} MB, {peaks[1]:.0f} MB | "
                     f"1/{peaks[1] / peaks[0]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the comment lines."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in (("demo", demo()), ("kernels", kernels()), ("capture", capture()), ("faults", faults()),
                        ("kills", kills()), ("budget", budget()), ("sweep", scaling.table(RESULTS)),
                        ("methods", methods()), ("parity", parity_table.committed(RESULTS))):  # fmt: skip
        marked = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _, new=marked: new, text, flags=re.DOTALL)
    readme.write_text(text)
    if scaling.sweep_rows(RESULTS):
        (RESULTS / "scaling.svg").write_text(scaling.plot(RESULTS))


if __name__ == "__main__":
    main()
