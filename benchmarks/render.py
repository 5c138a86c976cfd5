"""Write the demo's measured table into the README, from benchmarks/results/demo-test.json.

    python benchmarks/render.py

The table stands between two comment lines; tests/test_readme.py fails when it is not the committed result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| model | reasoning | instruction | both | missing `</think>` | L_think |\n|---|---|---|---|---|---|"


def line(row: dict) -> str:
    """One model's line; rates in percent."""
    name = row["method"] if row["lambda"] is None else f"{row['method']} λ = {row['lambda']:g}"
    rates = [f"{100 * row[k]:.1f}" for k in ("reasoning_accuracy", "instruction_accuracy", "both_accuracy")]
    missing = "–" if row["missing_think"] is None else f"{100 * row['missing_think']:.1f}"
    loss = "–" if row["l_think"] is None else f"{row['l_think']:.1e}"
    return f"| {' | '.join([name, *rates, missing, loss])} |"


def main() -> None:
    """Replace what stands between the comment lines."""
    found = json.loads((ROOT / "benchmarks/results/demo-test.json").read_text())
    table = "\n".join([HEAD, *map(line, found["rows"])])
    told = "\n".join(f"> {text}" + "  " for text in found["comparisons"])
    readme = ROOT / "README.md"
    marked = f"<!-- demo -->\n{table}\n\n{told}\n<!-- /demo -->"
    readme.write_text(re.sub(r"<!-- demo -->.*<!-- /demo -->", lambda _: marked, readme.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
