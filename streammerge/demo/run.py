"""`streammerge demo`: merge the bundled trio with RAIN, its ablations and task arithmetic, and compare them.

Every merge goes through the same pipeline and command-line recipe as a user's own; every result is a checkpoint on
disk that is then evaluated greedily on one split. Settings were chosen on the validation split
(benchmarks/demo_settings.py); the default split is the test split. Memory: one 2.5M-parameter model at a time.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, listed
from ..pipeline import merge
from ..progress import Progress
from ..recipe import Recipe, parse_recipe
from .evaluate import Outcome, evaluate, l_think, load_rows, paired_p, summarize

DATA = Path(__file__).parent / "data"
TASK_ARITHMETIC_BEST = 0.3  # its λ with the best both_accuracy on the validation split


@dataclass(frozen=True)
class Variant:
    """One line of the table: a name, λ, and the recipe keys that differ from the demo's recipe."""

    method: str
    lam: float
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """A directory name."""
        return f"{self.method.lower().replace(' ', '-').replace(',', '')}-{self.lam:g}"


UNIFORM = {"coefficients": {"rule": "uniform"}}
NO_BASIS = {"basis": {"rank": "none"}}
VARIANTS = (
    *(Variant("task arithmetic", lam, {"merge_method": "task_arithmetic"}) for lam in (TASK_ARITHMETIC_BEST, 0.5, 1.0)),
    Variant("Stage 1 only", 1.0, UNIFORM),
    *(Variant("Stage 2 only", lam, NO_BASIS) for lam in (0.3, 1.0)),
    Variant("RAIN", 0.7),
    Variant("RAIN", 1.0),
    Variant("RAIN", 1.3),
)


@dataclass(frozen=True)
class Result:
    """A model's outcomes on the split, their summary, and L_think on the held-out samples."""

    method: str
    lam: float | None
    outcomes: list[Outcome]
    summary: dict[str, Any]
    l_think: float | None

    def row(self) -> dict[str, Any]:
        """The line of `--json`."""
        rates = {k: self.summary[k]["rate"] for k in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy")}
        missing = {"missing_think": self.summary["missing_think"]["rate"], "l_think": self.l_think}
        return {"method": self.method, "lambda": self.lam, **rates, **missing}


def demo_recipe(variant: Variant) -> Recipe:
    """The bundled recipe with a variant's keys."""
    import yaml

    keys = yaml.safe_load((DATA / "recipe.yml").read_text()) | {"lambda": variant.lam} | variant.keys
    return parse_recipe(yaml.safe_dump(keys), str(DATA / "recipe.yml"), directory=DATA)


def demo(
    out: Path | None, *, split: str, as_json: bool, progress: Progress
) -> tuple[list[Result], dict[str, float]]:
    """Run the whole comparison; prints the table, or JSON on stdout. Keeps the merged models when `out` is given.

    Returns the results, and the seconds and null-space leaks that the table's last lines state.
    """
    used = [str(out / v.slug) for v in VARIANTS if out and (out / v.slug).exists()]
    if used:
        raise InputError(listed("The demo's directories are there already:", used, "Choose a new --out."))
    rows, began = load_rows(DATA / f"{split}.jsonl"), time.perf_counter()
    heldout = json.loads((DATA / "heldout_reasoning.json").read_text())
    results = [_score("LRM", None, DATA / "lrm", rows, heldout), _score("ITM", None, DATA / "itm", rows, None)]
    spent, rain = 0.0, {}
    with tempfile.TemporaryDirectory(prefix="streammerge-demo-") as scratch:
        root = out or Path(scratch)
        queue = list(VARIANTS)
        while queue:
            variant = queue.pop(0)
            progress.event(f"demo: {variant.method}, λ = {variant.lam:g}")
            start = time.perf_counter()
            report = merge(demo_recipe(variant), root / variant.slug, progress=Progress("quiet"))
            spent += time.perf_counter() - start
            results.append(_score(variant.method, variant.lam, root / variant.slug, rows, heldout))
            if variant == Variant("RAIN", 1.0):
                rain = report
                queue.insert(0, _equal_norm(report))
    told = {
        "seconds_merging": round(spent, 1), "seconds": round(time.perf_counter() - began, 1),
        "leak": rain["totals"]["leak"], "written_leak": rain["totals"]["written_leak"],
    }  # fmt: skip
    if as_json:
        print(json.dumps([r.row() for r in results]))
    else:
        _print(results, told, split)
    return results, told


def _equal_norm(report: dict[str, Any]) -> Variant:
    """The control for Stage 2: one α for all heads that applies a delta of the same norm as RAIN's."""
    totals = report["totals"]
    value = totals["applied_norm"] / (totals["kept_over_delta"] * totals["delta_norm"])
    return Variant("uniform α, equal norm", 1.0, {"coefficients": {"rule": "uniform", "value": value}})


def _score(method: str, lam: float | None, model: Path, rows: list, heldout: list | None) -> Result:
    outcomes = evaluate(model, rows)
    loss = None if heldout is None else l_think(model, DATA / "lrm", heldout)["all"]
    return Result(method, lam, outcomes, summarize(outcomes), loss)


def _print(results: list[Result], told: dict[str, float], split: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=108)
    n = len(results[0].outcomes)
    title = f"streammerge demo: {n} prompts of the {split} split, greedy; % right [95 % interval]"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("method", "λ", "reasoning", "instruction", "both", "missing", "L_think"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for r in results:
        s = r.summary
        cells = [_cell(s[k]) for k in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy")]
        missing = s["missing_think"]["rate"]
        table.add_row(
            r.method, "" if r.lam is None else f"{r.lam:g}", *cells, "–" if missing is None else f"{100 * missing:.1f}",
            "–" if r.l_think is None else f"{r.l_think:.1e}",
        )  # fmt: skip
    console.print(table)
    for line in comparisons(results):
        console.print(line)
    leaks = f"{told['leak']:.1e} in fp32, {told['written_leak']:.1e} as written"
    console.print(f"RAIN's null space: worst ‖Δ⊥U‖/‖ΔU‖ {leaks}")
    console.print("missing: outputs without </think>, %; L_think: KL(LRM || model) at the thinking positions, nats")
    merges = len(results) - 2
    console.print(f"{merges} merges in {told['seconds_merging']:.1f} s; with evaluation {told['seconds']:.1f} s")


def _cell(rate: dict[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} [{100 * rate['low']:.0f}–{100 * rate['high']:.0f}]"


def comparisons(results: list[Result]) -> list[str]:
    """Paired tests on the same rows: RAIN against task arithmetic at its best λ, and against a uniform α."""
    found = {(r.method, r.lam): r for r in results}
    rain = found["RAIN", 1.0]
    return [
        _compare(rain, found["task arithmetic", TASK_ARITHMETIC_BEST]),
        _compare(rain, found["uniform α, equal norm", 1.0]),
    ]


def _compare(a: Result, b: Result) -> str:
    parts = []
    flags = {"reasoning": "correct", "instruction": "follows", "both": "both"}
    for name, flag in flags.items():
        kind = "reasoning" if name == "reasoning" else "instruction"
        left, right = ([bool(getattr(o, flag)) for o in r.outcomes if o.kind == kind] for r in (a, b))
        gain = sum(left) - sum(right)
        parts.append(f"{name} {sum(left)} vs {sum(right)} of {len(left)} ({gain:+d}, p = {paired_p(left, right):.2g})")
    ratio = a.l_think / b.l_think if b.l_think else float("nan")
    names = f"{a.method} λ = {a.lam:g} against {b.method} λ = {b.lam:g}"
    return f"{names}: {'; '.join(parts)}; L_think x {ratio:.2f}  (exact McNemar)"


def as_dicts(results: list[Result]) -> list[dict[str, Any]]:
    """Everything but the texts, for benchmarks."""
    return [{**r.row(), "summary": dataclasses.asdict(r)["summary"]} for r in results]
