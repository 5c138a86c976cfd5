"""The sweep's rows as a table for the README, and as a plot: time and memory against the size of the model.

render.py calls both. The plot is plain SVG, results/scaling.svg: two panels with logarithmic axes, one line a device.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

BILLIONS = {"0.5b": 0.5, "1.5b": 1.5, "7b": 7.6, "32b": 32.8, "70b": 70.6}
HEAD = (
    "| device | shape | layers, tokens measured | s a layer: measured | whole merge, extrapolated | peak host memory "
    "of the measured layers | planned for the whole merge | token-layers/s |\n" + 8 * "|---" + "|"
)
_WIDE, _HIGH, _LEFT, _TOP = 330, 240, 64, 34
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7a4fa3")

Found = dict[tuple[str, str], dict[str, dict]]  # (device, shape) -> metric -> its last row


def sweep_rows(results: Path) -> Found:
    """The last measurement of every device and shape, from every *-sweep.jsonl."""
    found: Found = {}
    for file in sorted(results.glob("*-sweep.jsonl")):
        for text in file.read_text().splitlines():
            row = json.loads(text)
            named = re.fullmatch(r"RAIN sweep, (\S+), \d+ layers", row["what"])
            if named and row["metric"] != "peak host GB beyond imports":  # those are of --flat
                device = row["note"].partition(",")[0]
                found.setdefault((device, named[1]), {})[row["metric"]] = row
    order = list(BILLIONS)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], order.index(item[0][1]))))


def flat_lines(results: Path) -> list[str]:
    """What --flat measured: the same shape with few and with many layers."""
    last = {}
    for file in sorted(results.glob("*-sweep.jsonl")):
        for text in file.read_text().splitlines():
            row = json.loads(text)
            if row["metric"] == "peak host memory, ratio":
                last[row["what"]] = row
    return [f"{what.partition(', ')[2]}: peak host memory x {row['median']:.2f}" for what, row in last.items()]


def table(results: Path) -> str:
    """The README's table; the line that says so where nothing was measured."""
    found = sweep_rows(results)
    if not found:
        return "*Empty*: `python benchmarks/bench_sweep.py` and `python benchmarks/render.py` fill it."
    lines = [HEAD, *(_line(device, shape, rows) for (device, shape), rows in found.items())]
    told = flat_lines(results)
    return "\n".join(lines) + ("\n\n" + "  \n".join(told) if told else "")


def _line(device: str, shape: str, rows: dict[str, dict]) -> str:
    def value(metric: str) -> float:
        return rows[metric]["median"]

    measured = re.search(r"(\d+) of (\d+) layers and (\d+) of (\d+) tokens", rows["measured s a layer"]["note"])
    layers, of_layers, tokens, of_tokens = map(int, measured.groups())
    cells = [
        device, shape, f"{layers} of {of_layers}, {tokens:,} of {of_tokens:,}", f"{value('measured s a layer'):.2f} s",
        f"{value('extrapolated total min'):.1f} min", f"{value('measured peak host GB beyond imports'):.2f} GB",
        f"{value('predicted peak host GB, whole merge'):.1f} GB", f"{value('measured token-layers/s'):,.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def plot(results: Path) -> str:
    """An SVG with time (extrapolated) and memory (planned; measured on a part) against billions of parameters."""
    found = sweep_rows(results)
    time, memory = {}, {}
    for (device, shape), rows in found.items():
        size = BILLIONS[shape]
        time.setdefault(device, []).append((size, rows["extrapolated total min"]["median"]))
        for metric, name in (("predicted peak host GB, whole merge", "planned, whole merge"),
                             ("measured peak host GB beyond imports", "measured layers")):  # fmt: skip
            memory.setdefault(f"{device}: {name}", []).append((size, rows[metric]["median"]))
    sizes = [BILLIONS[shape] for _, shape in found]
    memory["the trio in bf16"] = [(size, 6 * size) for size in sorted(set(sizes))]
    panels = _panel("minutes, extrapolated", time, 0) + _panel("peak host memory, GB", memory, _WIDE + _LEFT + 30)
    size = f'width="{2 * (_WIDE + _LEFT) + 60}" height="{_HIGH + _TOP + 120}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{panels}</svg>\n')  # fmt: skip


def _panel(title: str, lines: dict[str, list[tuple[float, float]]], at: float) -> str:
    """One panel, its left edge at x = `at`: axes with a tick at each decade, a line and a legend entry a series."""
    values = [y for points in lines.values() for _, y in points]
    xs, ys = _decades([x for points in lines.values() for x, _ in points]), _decades(values)
    parts = [f'<text x="{at + _LEFT}" y="20" font-weight="bold">{title}</text>']
    for x in _ticks(xs):
        px = _place(x, xs, at + _LEFT, _WIDE)
        parts += [f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{_TOP + _HIGH}" stroke="#ddd"/>',
                  f'<text x="{px:.1f}" y="{_TOP + _HIGH + 16}" text-anchor="middle">{x:g}B</text>']
    for y in _ticks(ys):
        py = _place(y, ys, _TOP + _HIGH, -_HIGH)
        parts += [f'<line x1="{at + _LEFT}" x2="{at + _LEFT + _WIDE}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>',
                  f'<text x="{at + _LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>']
    for n, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[n % len(_COLOURS)]
        spots = [(_place(x, xs, at + _LEFT, _WIDE), _place(y, ys, _TOP + _HIGH, -_HIGH)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in spots]
        parts.append(f'<text x="{at + _LEFT}" y="{_TOP + _HIGH + 36 + 16 * n}" fill="{colour}">● {name}</text>')
    return "\n".join(parts) + "\n"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around the values, as exponents."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _ticks(span: tuple[float, float]) -> Iterable[float]:
    return (10.0**n for n in range(int(span[0]), int(span[1]) + 1))


def _place(value: float, span: tuple[float, float], start: float, length: float) -> float:
    return start + length * (math.log10(value) - span[0]) / (span[1] - span[0])
