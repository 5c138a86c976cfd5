"""The table of tests/parity/test_bits.py: method by dtype, from its rows or from results/cpu-parity.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def table(facts: list[dict]) -> str:
    """Markdown; `facts` of every row."""
    cells: dict[str, dict[str, str]] = {}
    for one in facts:
        cells.setdefault(one["case"], {})[one["dtype"]] = cell(one)
    lines = [f"| method | {' | '.join(DTYPES)} |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {case} | {' | '.join(row[d] for d in DTYPES)} |" for case, row in cells.items()])


def cell(one: dict) -> str:
    """One method in one dtype."""
    if "ours" in one:
        return f"kept {max(one['ours']):.2%}, {max(one['theirs']):.2%}"
    told = apart(one)
    if "stable" in one and one["differ"]:
        sure = apart(one["stable"])
        return f"{sure} †" if one["stable"]["differ"] < one["differ"] else told
    return told


def apart(one: dict) -> str:
    if not one["differ"]:
        return "bit-equal"
    share = f"{one['differ'] / one['elements']:.1e} differ"
    return f"≤ {one['ulps']} ulp, {share}" if one["ulps"] <= 99 else f"{one['rms']:.0e} of the RMS, {share}"


def committed(results: Path) -> str:
    """The table of the rows in a results folder."""
    rows = (results / "cpu-parity.jsonl").read_text().splitlines()
    return table([json.loads(text)["facts"] for text in rows])
