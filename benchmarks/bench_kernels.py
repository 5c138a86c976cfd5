"""Every kernel beside its twin and the best library call, at the layer shapes of 1.5B, 7B, 32B and 70B models.

    python benchmarks/bench_kernels.py [--models 7b …] [--kernels project …]     # needs a GPU
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --quick                 # tiny shapes; a CPU will do

Inputs are random and fresh for every case. Each variant is first compared with float64 and its memory measured, then
all variants take turns: a run is the median of many calls, on input sets that together are four times the L2 cache.
Times are those of a call as the sweep makes it, host work between its launches included. Memory is the device's peak
beyond the inputs, the result included where it is new. The share of the roofline is the least time that the case's
operations or bytes take (kernel_cases.py counts them), at rates measured on this device first, over the time taken.

Appends a row a variant and shape to results/<device>-kernels.jsonl after every case, so that an interrupted run keeps
what it has. Ends with 1 where a kernel failed or was wrong, with 2 where there is no GPU and no --quick.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import checkout  # noqa: F401  (first: what follows imports the package)
import kernel_library as library
import torch
from kernel_cases import MODELS, TINY, Case, cases, draw, element
from rows import RESULTS, Row, append, row
from streammerge.kernels import KernelUnavailable, dispatch, why_not

KERNELS = ("span_mass", "row_gram", "gram_update", "project")
_CALLS, _RUN = (3, 300), 0.03  # calls a run, and the seconds it aims at
_SETS = 64  # input sets at most


def tensors(inputs: Sequence) -> list[torch.Tensor]:
    """All tensors of a case's inputs."""
    return [t for x in inputs for t in (tensors(x) if isinstance(x, list | tuple) else [x]) if torch.is_tensor(t)]


def wait(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable, sets: Sequence[tuple], calls: int, device: torch.device) -> float:
    """The median of some calls in microseconds, each on the next set: by device events, or by the clock of a CPU."""
    if device.type != "cuda":
        took = []
        for n in range(calls):
            began = time.perf_counter()
            call(*sets[n % len(sets)])
            took.append(time.perf_counter() - began)
        return statistics.median(took) * 1e6
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for n, (start, stop) in enumerate(marks):
        start.record()
        call(*sets[n % len(sets)])
        stop.record()
    wait(device)
    return statistics.median(start.elapsed_time(stop) for start, stop in marks) * 1e3


def how_many(call: Callable, sets: Sequence[tuple], device: torch.device) -> int:
    """Calls that fill a run, from a few calls after the first. On a CPU, where nothing is learnt from times, one."""
    if device.type != "cuda":
        return 1
    return max(_CALLS[0], len(sets), min(_CALLS[1], int(_RUN * 1e6 / max(1.0, timed(call, sets, 3, device)))))


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this device reaches: TFLOP/s of a large product in the inputs' dtype and in TF32, GB/s of a large copy."""
    n, size = (256, 1 << 20) if quick else (8192, 1 << 30)
    a, b = (draw(device, seed, n, n) for seed in (0, 1))
    low = [x.to(element(device)) for x in (a, b)]

    def rate(work: float, call: Callable) -> float:
        timed(call, [()], 3, device)
        return work / statistics.median(timed(call, [()], 10, device) for _ in range(5)) * 1e6

    found = {"matmul": rate(2 * n**3, lambda: low[0] @ low[1]) / 1e12}
    with library.tf32():
        found["tf32"] = rate(2 * n**3, lambda: a @ b) / 1e12
    source = draw(device, 2, size // 4)
    target = torch.empty_like(source)
    found["copy"] = rate(2 * size, lambda: target.copy_(source)) / 1e9
    return {name: round(value, 3) for name, value in found.items()}


def floor_us(case: Case, rates: dict[str, float]) -> float:
    """The least time of a case in microseconds."""
    return max(case.flops / (rates[case.unit] * 1e6), case.bytes / (rates["copy"] * 1e3))


def input_sets(case: Case, device: torch.device) -> list[tuple]:
    """Enough sets that none is in the L2 cache when its turn comes; fewer where memory ends, but two."""
    torch.cuda.empty_cache()  # what earlier cases left counts as used
    first = case.make(0)
    if device.type != "cuda":
        return [first, case.make(100)]
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    each = sum(t.numel() * t.element_size() for t in tensors(first))
    room = int(torch.cuda.mem_get_info(device)[0] * 0.4 / each)
    count = max(2, min(_SETS, room, int(4 * cache / min(each, case.bytes)) + 1))
    return [first, *(case.make(100 * n) for n in range(1, count))]


def peak(call: Callable, inputs: tuple, device: torch.device) -> int | None:
    """Bytes beyond the inputs; None on a CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(*inputs)
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def examine(case: Case, name: str, sets: list[tuple], device: torch.device) -> dict:
    """A variant's error and memory, and a status: "ok", or why it has no time, or why its time should not count."""
    call, facts = case.run[name], {"error": None, "peak_bytes": None, "calls": 0}
    try:
        error = case.error(call, sets[0])
        facts |= {"error": error, "peak_bytes": peak(call, sets[1], device), "calls": how_many(call, sets, device)}
    except KernelUnavailable as reason:
        return facts | {"status": f"not run: {reason}"}
    except Exception as problem:  # a library that lacks the call, or memory that ends: the others go on
        return facts | {"status": f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}"}
    if error <= case.limit:
        return facts | {"status": "ok"}
    return facts | {"error": error if error == error else None, "status": f"error {error:.1e} > {case.limit:.0e}"}


def taken(case: Case, inputs: tuple) -> str:
    """What "auto" takes, by the dispatcher's own count."""
    dispatch.forget()
    getattr(dispatch, case.kernel)(*inputs)
    return next(iter(dispatch.ran())).split(": ", 1)[1]


def bench(case: Case, runs: int, rates: dict[str, float], common: dict, device: torch.device) -> list[Row]:
    """One case's rows, a variant each."""
    sets = input_sets(case, device)
    facts = {name: examine(case, name, sets, device) for name in case.run}
    times: dict[str, list[float]] = {name: [] for name in case.run}
    for _ in range(runs):  # in turns: a clock that drifts does so for all
        for name, call in case.run.items():
            if facts[name]["calls"]:
                times[name].append(timed(call, sets, facts[name]["calls"], device))
    least, auto = floor_us(case, rates), taken(case, sets[0])
    about = {"kernel": case.kernel, "model": case.model, "shape": case.shape, **case.about}
    limits = {"limit": case.limit, "flops": case.flops, "unit": case.unit, "bytes": case.bytes, "floor_us": least}
    found = []
    for name, told in facts.items():
        share = least / statistics.median(times[name]) if times[name] else None
        told = common | about | {"variant": name} | told | limits | {"share": share, "sets": len(sets), "auto": auto}
        what = f"{case.kernel} {case.model} {case.shape}: {name}"
        found.append(row(what, "us", times[name], told["status"], told))
    return found


def show(rows: Sequence[Row]) -> None:
    """A case on the terminal."""
    print(f"\n{rows[0].facts['kernel']} {rows[0].facts['model']}: {rows[0].facts['shape']}")
    for one in rows:
        f = one.facts
        took = "" if one.median is None else f"{one.median:10.1f} us  spread {one.spread:4.0%}  share {f['share']:4.0%}"
        memory = "" if f["peak_bytes"] is None else f"  {f['peak_bytes'] / 1e6:8.1f} MB"
        error = "" if f["error"] is None else f"  error {f['error']:.1e}"
        print(f"  {f['variant']:<18} {took}{memory}{error}  {f['status']}", flush=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--runs", type=int, default=5, help="medians a variant")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs; no file")
    parser.add_argument("--out", type=Path, help="where rows go, in place of results/<device>-kernels.jsonl")
    return parser


def main() -> int:
    args = options().parse_args()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda" and not args.quick:
        print(f"bench_kernels.py: torch {torch.__version__} sees no GPU here; --quick runs tiny shapes on the CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    torch.set_grad_enabled(False)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    slug = re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")
    out = args.out or (None if args.quick else RESULTS / f"{slug}-kernels.jsonl")
    rates = ceilings(device, args.quick)
    print(f"{named}: {rates['matmul']} TFLOP/s {element(device)}, {rates['tf32']} TFLOP/s TF32, {rates['copy']} GB/s")
    if reason := why_not(torch.empty(0, device=device)):
        print(f"Triton is not run: {reason}")
    dtype = str(element(device)).removeprefix("torch.")
    common = {"device": named, "quick": args.quick, "dtype": dtype, "ceilings": rates}
    bad = []
    for case in cases({"tiny": TINY} if args.quick else {m: MODELS[m] for m in args.models}, device):
        if case.kernel in args.kernels:
            rows = bench(case, args.runs, rates, common, device)
            show(rows)
            bad += [r.what for r in rows if r.facts["variant"] in ("Triton", "twin")
                    and not r.note.startswith(("ok", "not run"))]  # fmt: skip
            if out:
                append(out, rows)
    if bad:
        print("\nfailed or wrong:", *bad, sep="\n  ", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
