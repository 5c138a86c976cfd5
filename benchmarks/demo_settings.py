"""Which settings for the demo trio? Every candidate merged and scored on the validation split.

    python benchmarks/demo_settings.py                # all candidates, validation split
    python benchmarks/demo_settings.py --only RAIN    # those whose name holds a text

Writes benchmarks/results/demo-validation.jsonl, one row a candidate. The defaults in recipe.py and λ of task
arithmetic in demo/run.py were chosen from these rows; `streammerge demo` then reports the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from rows import machine

from streammerge.demo.evaluate import evaluate, l_think, load_rows, summarize
from streammerge.demo.run import DATA, Variant, demo_recipe
from streammerge.pipeline import merge

RESULTS = Path(__file__).parent / "results" / "demo-validation.jsonl"
NARROW = {"thinking": {"random": 0}, "basis": {"rank": "exact"}}
TA = {"merge_method": "task_arithmetic"}
CANDIDATES = [
    *(Variant("task arithmetic", lam, TA) for lam in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)),
    *(Variant("RAIN", lam) for lam in (0.5, 0.7, 0.85, 1.0, 1.3)),
    *(Variant("RAIN, model scope", lam, {"coefficients": {"scope": "model"}}) for lam in (0.7, 1.0, 1.3)),
    *(Variant("RAIN, exact, predecessors only", lam, NARROW) for lam in (0.5, 0.7, 1.0, 1.3)),
    *(Variant("RAIN, random 2", lam, {"thinking": {"random": 2}}) for lam in (0.7, 1.0)),
    *(Variant("RAIN, random 8", lam, {"thinking": {"random": 8}}) for lam in (1.0, 1.3)),
    Variant("RAIN, inside 5", 1.0, {"thinking": {"random": 0, "inside": 5}}),
    Variant("RAIN, no attended values", 1.0, {"thinking": {"attended_values": False}}),
    *(Variant(f"RAIN, energy {e}", 1.0, {"basis": {"energy": e}}) for e in (0.95, 0.98, 0.999)),
    *(Variant(f"RAIN, κ {k}", 1.0, {"coefficients": {"kappa": k}}) for k in (0.25, 0.75, 1.0)),
    *(Variant(f"RAIN, ρ {r}", 1.0, {"coefficients": {"rho": r}}) for r in (0.0, 2.0)),
    Variant("RAIN, rows at t", 1.0, {"coefficients": {"rows": "token"}}),
    Variant("RAIN, prior rule", 1.0, {"coefficients": {"rule": "prior"}}),
    *(Variant("Stage 1 only", lam, {"coefficients": {"rule": "uniform"}}) for lam in (0.7, 1.0)),
    *(Variant("Stage 2 only", lam, {"basis": {"rank": "none"}}) for lam in (0.25, 1.0)),
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


def main() -> None:
    """Score the candidates and write the rows."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default="", help="candidates whose name holds this text")
    only = arguments.parse_args().only
    rows = load_rows(DATA / "validation.jsonl")
    heldout = json.loads((DATA / "heldout_reasoning.json").read_text())
    lines = []
    for variant in (v for v in CANDIDATES if only in v.method):
        row = score(variant, rows, heldout)
        told = "  ".join(f"{k} {row[k + '_accuracy']:.3f}" for k in ("reasoning", "instruction", "both"))
        print(f"{variant.method:32} λ {variant.lam:<5g} {told}  missing {row['missing_think']:.3f}  "
              f"L_think {row['l_think']:.2e}  applied {row['applied_over_delta']:.2f}", flush=True)
        lines.append(json.dumps({"split": "validation", **row, **machine()}, ensure_ascii=False))
    if not only:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
