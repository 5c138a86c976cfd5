"""The report of `streammerge bench` as text for a terminal."""

from __future__ import annotations

from typing import Any

from ..memory import format_size


def print_answer(report: dict[str, Any]) -> None:
    """Memory by term, what was measured, and the time that follows; on stderr."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False, highlight=False)
    shape, whole, found, answer = (report[key] for key in ("shape", "whole", "measured", "extrapolated"))
    console.print(f"RAIN at {shape['name']} ({shape['layers']} layers of {format_size(whole['lrm'])}), "
                  f"{_count(whole['tokens'])} calibration tokens, coefficients.scope {report['scope']}, on "
                  f"{report['device']} ({report['threads']} CPU threads)")
    _print_memory(console, report["plan"], "here")
    if report["plan_on_gpu"]:
        _print_memory(console, report["plan_on_gpu"], "with a GPU, whose time cannot be measured here")
    console.print(f"Measured: {found['layers']} layers, {_count(found['tokens'])} tokens, mean rank "
                  f"{found['rank']:.0%} of the input width; reading {found['read_rate'] / 1e6:.0f} MB/s, writing "
                  f"{found['write_rate'] / 1e6:.0f} MB/s")
    peak = found["memory"]
    gpu = found["busy"] is not None
    busy = f", GPU busy {found['busy'] / found['sweep']:.0%}" if gpu else ""
    on_gpu = f", {format_size(peak['device'])} on the GPU" if gpu else ""
    console.print(f"  {found['sweep'] / found['layers']:.2f} s a layer, {found['waited'] / found['sweep']:.0%} of it "
                  f"waiting for weights{busy}; peak memory {format_size(peak['host_beyond_imports'])} beyond imports "
                  f"on the host{on_gpu}")
    table = Table(title="the whole merge, extrapolated")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for part, seconds in answer["parts"].items():
        table.add_row(part, f"{seconds:.1f}")
    console.print(table)
    layer = answer["layer"]
    console.print(f"{layer['seconds']:.2f} s a layer: {layer['work']:.2f} s of work beside {layer['disk']:.2f} s of "
                  f"disk; {answer['waiting_share']:.0%} of all is waiting for the disk")
    console.print(f"Total {answer['total'] / 60:.1f} minutes. Extrapolated from {found['layers']} to {whole['layers']} "
                  f"layers, from {_count(found['tokens'])} to {_count(whole['tokens'])} tokens, and to the whole "
                  f"vocabulary; weights and tokens are random, tokenisation is left out.")


def _print_memory(console: Any, plan: dict[str, Any], where: str) -> None:
    """Predicted peaks by term, the largest first."""
    for side in ("device", "host"):
        if plan[side]:
            console.print(f"Predicted peak, {side}, {where}: {format_size(plan[side + '_total'])}")
            for term, nbytes in sorted(plan[side].items(), key=lambda item: -item[1]):
                if nbytes:
                    console.print(f"  {format_size(nbytes):>11}  {term}")
    console.print(f"Output: {format_size(plan['disk'])}; {plan['tokens_per_batch']} tokens a batch")


def _count(tokens: dict[str, int]) -> str:
    """Tokens that pass through each layer; the held-out set passes twice."""
    return f"{sum(tokens.values()):,}"
