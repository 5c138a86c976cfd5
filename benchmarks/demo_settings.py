"""Which settings for the demo trio? Every candidate merged and scored on the validation split.

    python benchmarks/demo_settings.py                # all candidates, validation split
    python benchmarks/demo_settings.py --only RAIN    # those whose name holds a text; nothing is written
    python benchmarks/demo_settings.py --test         # `streammerge demo` on the test split, for the README's table

Writes benchmarks/results/demo-validation.jsonl, one row a candidate, or demo-test.json. The defaults in recipe.py and
λ of task arithmetic in demo/run.py were chosen from the validation rows; the test split was then looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from rows import RESULTS, command, commit, machine, versions

from streammerge.demo.evaluate import evaluate, l_think, load_rows, summarize
from streammerge.demo.run import DATA, Variant, as_dicts, comparisons, demo, demo_recipe
from streammerge.pipeline import merge
from streammerge.progress import Progress

NARROW = {"thinking": {"random": 0}, "basis": {"rank": "exact"}}
TA = {"merge_method": "task_arithmetic"}
CANDIDATES = [
    *(Variant("task arithmetic", lam, TA) for lam in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)),
    *(Variant("RAIN", lam) for lam in (0.5, 0.7, 0.85, 1.0, 1.15, 1.3)),
    *(Variant("RAIN, layer scope", lam, {"coefficients": {"scope": "layer"}}) for lam in (0.7, 1.0, 1.3)),
    *(Variant(f"RAIN, energy {e}", 1.0, {"basis": {"energy": e}}) for e in (0.9, 0.95, 0.98, 0.99)),
    *(Variant(f"RAIN, κ {k}", 1.0, {"coefficients": {"kappa": k}}) for k in (0.25, 0.5, 1.0)),
    *(Variant(f"RAIN, ρ {r}", 1.0, {"coefficients": {"rho": r}}) for r in (0.0, 2.0)),
    *(Variant("RAIN, exact, predecessors only", lam, NARROW) for lam in (0.7, 1.0)),
    *(Variant(f"RAIN, random {n}", 1.0, {"thinking": {"random": n}}) for n in (0, 2, 8)),
    Variant("RAIN, inside 5", 1.0, {"thinking": {"random": 0, "inside": 5}}),
    Variant("RAIN, after 5", 1.0, {"thinking": {"after": 5}}),
    Variant("RAIN, no attended values", 1.0, {"thinking": {"attended_values": False}}),
    Variant("RAIN, rows at t", 1.0, {"coefficients": {"rows": "token"}}),
    Variant("RAIN, prior rule", 1.0, {"coefficients": {"rule": "prior"}}),
    *(Variant("Stage 1 only", lam, {"coefficients": {"rule": "uniform"}}) for lam in (0.7, 1.0)),
    *(Variant("Stage 2 only", lam, {"basis": {"rank": "none"}}) for lam in (0.3, 1.0)),
]


def score(variant: Variant, rows: list, heldout: list) -> dict:
    """Merge one candidate and evaluate it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        report = merge(demo_recipe(variant), out)
        summary = summarize(evaluate(out, rows))
        loss = l_think(out, DATA / "lrm", heldout)
    rates = {name: value["rate"] for name, value in summary.items()}
    applied = report["totals"]["applied_over_delta"]
    return {**dataclasses.asdict(variant), **rates, "l_think": loss["all"], "l_think_by_position": loss,
            "applied_over_delta": applied}  # fmt: skip


def validate(only: str) -> None:
    """Score the candidates and write the rows."""
    rows = load_rows(DATA / "validation.jsonl")
    heldout = json.loads((DATA / "heldout_reasoning.json").read_text())
    lines = []
    for variant in (v for v in CANDIDATES if only in v.method):
        row = score(variant, rows, heldout)
        told = "  ".join(f"{k} {row[k + '_accuracy']:.3f}" for k in ("reasoning", "instruction", "both"))
        print(f"{variant.method:32} λ {variant.lam:<5g} {told}  missing {row['missing_think']:.3f}  "
              f"L_think {row['l_think']:.2e}  applied {row['applied_over_delta']:.2f}", flush=True)
        lines.append(json.dumps({"split": "validation", **row, **surroundings()}, ensure_ascii=False))
    if not only:
        (RESULTS / "demo-validation.jsonl").write_text("\n".join(lines) + "\n")


def test() -> None:
    """Run the demo as a user does and keep its table."""
    results, told = demo(None, split="test", as_json=False, progress=Progress("quiet"))
    found = {**surroundings(), **told, "comparisons": comparisons(results), "rows": as_dicts(results)}
    (RESULTS / "demo-test.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def surroundings() -> dict:
    """What a row needs to be repeated."""
    return {"command": command(), "machine": machine(), "versions": versions(), "commit": commit()}


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", help="candidates whose name holds this text")
    arguments.add_argument("--test", action="store_true", help="the test split instead")
    chosen = arguments.parse_args()
    if chosen.test:
        test()
    else:
        validate(chosen.only)


if __name__ == "__main__":
    main()
