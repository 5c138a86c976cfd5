"""The plan of a merge as text for a terminal."""

from __future__ import annotations

from typing import Any

from ..gradient import shown
from ..memory import format_size


def print_plan(plan: dict[str, Any]) -> None:
    """Tensors and what they go through, calibration, memory by term, disk, and time by part; on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False, highlight=False)  # a path may look like markup
    recipe = plan["recipe"]
    console.print(f"plan: {recipe['merge_method']}, λ = {shown(recipe['lambda'])}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column, justify in (("tensors", "left"), ("layers", "left"), ("shape", "right"), ("dtype", "left"),
                            ("size", "right"), ("action", "left")):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")
    for group in plan["groups"]:
        table.add_row(
            (group["tensors"].partition(".*.")[2] or group["tensors"]).removesuffix(".weight"), group["layers"] or "–",
            "x".join(map(str, group["shape"])), _written(group), format_size(group["bytes"]), group["action"],
        )  # fmt: skip
    console.print(table)
    for text in (*_treatments(plan["groups"]), *_calibration(plan), *_memory(plan), *_disk(plan), *_time(plan)):
        console.print(text)
    for warning in plan["warnings"]:
        console.print(f"note: {warning}")


def _written(group: dict[str, Any]) -> str:
    same = group["dtype"] == group["written_as"]
    return group["dtype"] if same else f"{group['dtype']} → {group['written_as']}"


def _treatments(groups: list[dict[str, Any]]) -> list[str]:
    """What the merged modules go through, those that are treated alike in one line; λ where it is not one for all."""
    merged = [g for g in groups if g["action"] == "merged"]
    several = len({str(g["lambda"]) for g in merged}) > 1 or any(isinstance(g["lambda"], list) for g in merged)
    told = {
        "λ": [_values(g["lambda"]) for g in merged if several],
        "density": [_values(g["density"]) for g in merged if "density" in g],
        "α": [g["alpha"] for g in merged],
        "projection": [_basis(g["basis"]) for g in merged],
    }
    lines: dict[tuple[str, str], list[str]] = {}
    for what, rules in told.items():
        for group, rule in zip(merged, rules, strict=False):
            lines.setdefault((what, rule), []).append(group["module"])
    return [f"{what} of {', '.join(modules)}: {rule}" for (what, rule), modules in lines.items()]


def _values(values: float | list[float]) -> str:
    """One value, or one a layer."""
    return f"{values:.4g}" if isinstance(values, float) else "by layer " + " ".join(f"{v:.4g}" for v in values)


def _basis(basis: dict[str, Any] | None) -> str:
    if basis is None:
        return "none"
    many = f"{basis['count']} bases, each" if basis["count"] > 1 else "a basis"
    return f"{many} of {basis['rows']} rows ({basis['site']}), {basis['rule']}, rank at most {basis['rank_at_most']}"


def _calibration(plan: dict[str, Any]) -> list[str]:
    tokens = plan["calibration"]["tokens"]
    if not sum(tokens.values()):
        return ["calibration: none"]
    told = ", ".join(f"{name} {count:,}" for name, count in tokens.items() if count)
    return [f"calibration tokens: {told}"]


def _memory(plan: dict[str, Any]) -> list[str]:
    """The choice, then predicted peaks by term, the largest first."""
    settings, lines = plan["plan"], []
    if settings["tokens_per_batch"]:
        waits = "on the host" if settings["offload"] or plan["device"] == "cpu" else "on the device"
        lines.append(f"{plan['device']}, {plan['compute_dtype']}: {settings['tokens_per_batch']} tokens a batch, "
                     f"{settings['workers']} side by side, activations {waits}, "
                     f"{format_size(settings['ahead'])} read ahead")
    for side in ("device", "host"):
        if settings[side]:
            lines.append(f"predicted peak, {side}, beyond imports: {format_size(settings[side + '_total'])}")
            lines += [f"  {format_size(nbytes):>11}  {term}"
                      for term, nbytes in sorted(settings[side].items(), key=lambda item: -item[1]) if nbytes]
    return lines


def _disk(plan: dict[str, Any]) -> list[str]:
    disk = plan["disk"]
    free = "" if disk["free"] is None else f"; {format_size(disk['free'])} free at {disk['where']}"
    return [f"disk: {format_size(disk['output'])}{free}"]


def _time(plan: dict[str, Any]) -> list[str]:
    """The estimate, what it was made of, and how far it can be believed."""
    probe, took = plan["probe"], plan["time"]
    cached = probe["read_cached"]
    known = "unknown whether from the disk or the page cache"
    if cached is not None:
        known = f"{cached:.0%} of it in the page cache already"
    read = f"reading {probe['read_rate'] / 1e6:,.0f} MB/s ({format_size(probe['read_bytes'])}, {known})"
    write = f"writing {probe['write_rate'] / 1e6:,.0f} MB/s ({format_size(probe['write_bytes'])})"
    if probe["write_assumed"]:
        write = "writing not measured, taken to be as fast"
    rate = f"{probe['elements'] / 1e6:,.0f} M elements/s a thread"
    if "matmul" in probe:
        rate = f"matmul {probe['matmul'] / 1e9:,.0f} GFLOP/s in {plan['compute_dtype']}"
    lines = [f"estimated time: {_duration(took['total'])}, within a factor of 2 or 3 at best"]
    lines += [f"  {seconds:>9.1f} s  {part}" for part, seconds in took["parts"].items() if seconds >= 0.05]
    return [*lines, f"  from {read}; {write}; {rate}"]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
