"""The command line: `streammerge merge RECIPE OUT`, `plan RECIPE [OUT]`, `bench` and `demo`.

stdout carries the result (`--json`), stderr everything else. A user's mistake is one screen of text and an exit code,
never a traceback.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import signal
import sys
import time
from contextlib import suppress

from .environment import unknown
from .errors import Refused, ResourceError, StreamMergeError
from .flags import parser
from .memory import format_size, tame_allocator
from .threads import usable_cores


def _progress(args: argparse.Namespace):
    from .progress import Progress

    return Progress("quiet" if args.quiet else "json" if args.log_format == "json" else "auto")


_BUDGET = ("lam", "device_memory", "host_memory", "tokens_per_batch", "scratch_dir", "scratch_space",
           "shard_size", "hash_inputs")


def _recipe(args: argparse.Namespace):
    """The recipe, with what the flags say in place of its own. Before torch is imported: a typo is answered at once."""
    from .api import with_budget

    return with_budget(args.recipe, **{name: getattr(args, name) for name in _BUDGET})


def _merge(args: argparse.Namespace) -> None:
    if args.dry_run:
        if args.also:
            from .also import check

            check(args.out, args.also)
        return _plan(args)
    recipe = _recipe(args)
    from .merging import merge
    from .report import print_summary

    report = merge(recipe, args.out, device=args.device, progress=_progress(args), threads=args.threads,
                   restart=args.restart, save_every=args.save_every, artifacts=args.artifacts,
                   also=args.also)  # fmt: skip
    if not args.quiet and args.log_format == "text":
        from .tensor_merging import print_tensor_summary

        (print_tensor_summary if "methods" in report else print_summary)(report, args.out)
        for told in report.get("also", {}).values():
            _print_quantized(told)
    if args.json:
        print(json.dumps(report, default=str))


def _quantize(args: argparse.Namespace) -> None:
    from .also import quantize

    told = quantize(args.model, args.out, args.to, shard_size=args.shard_size, threads=args.threads,
                    progress=_progress(args))  # fmt: skip
    if not args.quiet and args.log_format == "text":
        _print_quantized(told)
    if args.json:
        print(json.dumps(told))


def _print_quantized(told: dict) -> None:
    """What a quantised copy is, on stderr."""
    print(f"{told['path']}: {told['method']}, {format_size(told['bytes'])}; {told['quantized']} weights quantised, "
          f"{told['copied']} tensors copied", file=sys.stderr)  # fmt: skip


def _plan(args: argparse.Namespace) -> None:
    from .api import plan
    from .planning.table import print_plan

    report = plan(_recipe(args), args.out, device=args.device, threads=args.threads, progress=_progress(args),
                  restart=getattr(args, "restart", False))  # fmt: skip
    if not args.quiet and args.log_format == "text":
        from .tensor_merging import print_tensor_plan

        (print_plan if "groups" in report else print_tensor_plan)(report)
    if args.json:
        print(json.dumps(report, default=str))


def _demo(args: argparse.Namespace) -> None:
    import torch

    from .demo.run import demo

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    demo(args.out, split=args.split, as_json=args.json, progress=_progress(args))


def _bench(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    import torch

    from .bench.run import Question, bench
    from .bench.samples import AUTHORS
    from .bench.shapes import SHAPES
    from .bench.table import print_answer
    from .recipe import Budget

    imports = time.perf_counter() - began
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    budget = Budget(args.device_memory or "auto", args.host_memory or "auto", args.tokens_per_batch)
    tokens = args.calibration_tokens or AUTHORS
    asked = Question(
        SHAPES[args.shape], args.layers, args.tokens, tokens, args.scope, budget, args.device, args.scratch_dir
    )
    report = bench(asked, _progress(args), imports)
    if not args.quiet and args.log_format == "text":
        print_answer(report)
    if args.json:
        print(json.dumps(report))


def _verify(args: argparse.Namespace) -> None:
    from .checking import check

    found = check(
        args.out, quick=args.quick, generate=args.generate, tokens=args.tokens, insist=args.insist,
        l_think=args.l_think, threads=args.threads, progress=_progress(args),
    )  # fmt: skip
    if args.json:
        print(json.dumps(found.as_dict()))
    if not args.quiet and args.log_format == "text":
        for line in found.lines():
            print(line, file=sys.stderr)
    error = found.error()
    if error:
        raise error


_COMMANDS = {"merge": _merge, "plan": _plan, "demo": _demo, "bench": _bench, "verify": _verify,
             "quantize": _quantize}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    args = parser().parse_args(argv)
    for line in unknown():
        _tell(args, "warning", line)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # idle OpenMP threads that spin steal the core from those that work: tenfold slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if usable_cores() < (os.cpu_count() or 1):  # torch counts the machine's; a container's share may be smaller
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    tame_allocator()
    gc.set_threshold(10_000)  # from 700: imports make little garbage, and looking for it took 0.4 of their 2.4 s
    with suppress(ValueError):  # not the main thread: then its owner hears the signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        _COMMANDS[args.command](args)
    except StreamMergeError as error:
        return _failed(args, f"error: {error}{'' if isinstance(error, Refused) else _unfinished(args)}",
                       error.exit_code)
    except OSError as error:  # the system's refusal where nobody expected one
        what = f"{error.filename}: " if error.filename is not None else ""
        return _failed(args, f"error: {what}{error.strerror or error}{_unfinished(args)}", ResourceError.exit_code)
    except KeyboardInterrupt as stop:
        left = _unfinished(args)
        terminated = isinstance(stop, _Terminated)
        told = left or _complete(args) or "; nothing was left behind"
        return _failed(args, f"interrupted{told}", 75 if left and terminated else 130)
    if argv is None:
        _leave()
    return 0


def _leave() -> None:
    """End this process at once, its work being done: to take torch and transformers apart again takes a second."""
    with suppress(OSError):  # whoever read our output is gone, of which the usual way out tells
        atexit._run_exitfuncs()  # first: they may print
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but a pipeline hears that it may run the command again (exit code 75)."""


def _terminated(*_: object) -> None:
    raise _Terminated


def _unfinished(args: argparse.Namespace) -> str:
    """What to tell of a merge that can be gone on with."""
    out = getattr(args, "out", None)
    if args.command != "merge" or out is None or not (out / ".streammerge" / "journal.json").exists():
        return ""
    return f"\n{out} holds what was done so far: the same command goes on from there, --restart begins anew"


def _complete(args: argparse.Namespace) -> str:
    """What to tell of a merge whose quantised copies were interrupted."""
    if not getattr(args, "also", ()) or not (args.out / "streammerge_report.json").exists():
        return ""
    return f"; {args.out} is complete, of its copies ({', '.join(args.also)}) at least one is not: streammerge quantize"


def _failed(args: argparse.Namespace, message: str, exit_code: int) -> int:
    """Tell the user why, and return the exit code."""
    _tell(args, "error", message, exit_code=exit_code)
    return exit_code


def _tell(args: argparse.Namespace, level: str, message: str, **more: int) -> None:
    """A line on stderr, in the format of the log."""
    if args.log_format == "json":
        message = json.dumps({"ts": round(time.time(), 3), "level": level, "event": message, **more})
    print(message if args.log_format == "json" else f"streammerge: {message}", file=sys.stderr)
