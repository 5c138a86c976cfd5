"""The command line: `streammerge merge RECIPE OUT`, `plan RECIPE [OUT]`, `bench` and `demo`.

stdout carries the result (`--json`), stderr everything else. A user's mistake is one screen of text and an exit code,
never a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from . import __version__
from .errors import ResourceError, StreamMergeError
from .memory import tame_allocator

_EXIT_CODES = """exit codes:
  0  done                       5  the written checkpoint failed verification
  1  a bug in streammerge       6  the merge changed nothing
  2  recipe or usage            7  thinking markers missing from too many samples
  3  invalid input             75  interrupted (SIGTERM); the same command goes on
  4  not enough memory or disk  130  interrupted (Ctrl-C)
"""

_MERGE = """Merge three checkpoints of one architecture as a recipe says.

A recipe (paths are relative to its own directory; Hub ids are taken from the local cache only):

  merge_method: rain
  base_model: Qwen/Qwen2.5-7B
  instruct_model: Qwen/Qwen2.5-7B-Instruct
  reasoning_model: deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
  calibration:
    reasoning: reasoning_calibration_set.json
    instruction: instruction_calibration_set.jsonl
  lambda: 1.0

OUT must be new or empty. It gets the merged weights, the LRM's config, tokenizer and template byte for byte, and
streammerge_report.json. Every other key and its default: streammerge/recipe.py, explained in the README.
"""

_PLAN = """What `streammerge merge` would do with this recipe, in seconds, and without writing anything.

Every tensor and what becomes of it, calibration tokens, predicted peak memory under the budgets with the terms of its
sum, disk needed and free, and an estimate of the time from short probes of this machine. A merge that would fail on its
inputs, its budgets or OUT fails here in the same words and with the same exit code.
"""

_BENCH = """How long would a RAIN merge of models of this size take on this machine, and how much memory?

  streammerge bench --shape 70b --device-memory 24GiB --scratch-dir /data

Predicts the peak memory of the whole merge within the budgets, then measures the real sweep on synthetic models that
have only a few layers of that shape, and extrapolates the time. The synthetic models are removed afterwards.
"""


_VERIFY = """Is OUT still what `streammerge merge` wrote? Reads everything, writes nothing.

Compares every file with OUT/streammerge_manifest.json by size and SHA256; checks headers, index, that all values are
finite, that config.json's model takes every tensor, and that the tokenizer spells the thinking markers with the ids
that it had. All that is wrong is told at once. Exit code 0, or 5; 3 where OUT has no manifest.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="streammerge", epilog=_EXIT_CODES, formatter_class=raw,
        description="Merge large reasoning models with instruction-tuned ones, one layer in memory at a time.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"streammerge {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    merge = commands.add_parser(
        "merge", help="merge as a recipe says", description=_MERGE, epilog=_EXIT_CODES, formatter_class=raw
    )
    _add_merge_flags(merge, out=None)
    merge.add_argument("--dry-run", action="store_true", help="write nothing, print the plan (`streammerge plan`)")
    _add_resume_flags(merge)
    merge.set_defaults(run=_merge)
    plan = commands.add_parser(
        "plan", help="what a merge would do and take", description=_PLAN, epilog=_EXIT_CODES, formatter_class=raw
    )
    _add_merge_flags(plan, out="?")
    plan.set_defaults(run=_plan)

    demo = commands.add_parser(
        "demo", help="merge the bundled trio and compare methods", formatter_class=raw,
        description="Merge the small trained trio that ships with the package with RAIN and its ablations, evaluate "
        "every result on the test split, and print them side by side.",
    )  # fmt: skip
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the merged models here (default: discarded)")
    demo.add_argument("--split", choices=("test", "validation"), default="test", help="rows to evaluate on")
    demo.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    _add_output_flags(demo)
    demo.set_defaults(run=_demo)
    _add_bench(commands, raw)
    _add_verify(commands, raw)
    return top


def _add_verify(commands: argparse._SubParsersAction, raw: type) -> None:
    """`streammerge verify` and its flags."""
    verify = commands.add_parser(
        "verify", help="compare a merged model with its manifest", description=_VERIFY, epilog=_EXIT_CODES,
        formatter_class=raw,
    )  # fmt: skip
    verify.add_argument("out", type=Path, metavar="OUT", help="what a merge wrote")
    verify.add_argument("--quick", action="store_true", help="read no weights: sizes, headers and all other files")
    verify.add_argument("--generate", metavar="PROMPT", help="load the model on the CPU and answer this, greedily")
    verify.add_argument("--tokens", type=_count, default=64, metavar="N", help="tokens to generate (default: 64)")
    verify.add_argument("--insist", action="store_true", help="generate even with a model above 4 GiB")
    verify.add_argument("--l-think", action="store_true", help="measure L_think again, against the reasoning model "
                        "where the manifest says it lies")
    verify.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: all cores)")
    _add_output_flags(verify)
    verify.set_defaults(run=_verify)


def _add_merge_flags(to: argparse.ArgumentParser, out: str | None) -> None:
    """What a merge and its plan take alike; `out`: argparse's nargs of OUT."""
    to.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    to.add_argument("out", type=Path, nargs=out, metavar="OUT", help="output directory, new or empty")
    to.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    to.add_argument("--device-memory", type=_size, metavar="SIZE", help="device limit, as 8GiB (default: recipe's)")
    to.add_argument("--host-memory", type=_size, metavar="SIZE", help="host limit, as 16GiB (default: recipe's)")
    to.add_argument("--tokens-per-batch", type=_tokens, metavar="N", help="calibration tokens in a batch")
    to.add_argument("--scratch-dir", metavar="DIR", help="where activations go that the host has no room for "
                    "(default: OUT)")
    to.add_argument("--scratch-space", type=_size, metavar="SIZE", help="the most that they may take there")
    to.add_argument("--lambda", dest="lam", type=_finite, metavar="λ", help="override the recipe's lambda")
    to.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice; all cores "
                    "for a merge without calibration)")
    _add_output_flags(to)


def _add_bench(commands: argparse._SubParsersAction, raw: type) -> None:
    """`streammerge bench` and its flags."""
    from .bench.shapes import SHAPES

    bench = commands.add_parser(
        "bench", help="how long would a merge take here, and how much memory", description=_BENCH, epilog=_EXIT_CODES,
        formatter_class=raw,
    )  # fmt: skip
    bench.add_argument("--shape", required=True, type=str.lower, choices=SHAPES, help="size of the models")
    bench.add_argument("--layers", type=_count, metavar="N", help="layers to measure (default: 2 on a CPU, 4 on a GPU)")
    bench.add_argument("--tokens", type=_count, metavar="N", help="about so many calibration tokens to measure with "
                       "(default: 4096 on a CPU, all on a GPU)")
    bench.add_argument("--calibration-tokens", type=_count, metavar="N", help="tokens of your calibration sets "
                       "(default: the authors', 429,000)")
    bench.add_argument("--scope", choices=("model", "layer"), default="model", help="coefficients.scope")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    bench.add_argument("--device-memory", type=_size, metavar="SIZE", help="device limit, as 24GiB")
    bench.add_argument("--host-memory", type=_size, metavar="SIZE", help="host limit, as 16GiB")
    bench.add_argument("--tokens-per-batch", type=_tokens, metavar="N", help="calibration tokens in a batch")
    bench.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    bench.add_argument("--scratch-dir", type=Path, default=Path("."), metavar="DIR", help="where the synthetic models "
                       "go for a while: the disk that is to be measured (default: the working directory)")
    _add_output_flags(bench)
    bench.set_defaults(run=_bench)


def _size(text: str) -> str:
    """A size for a budget flag, checked as the recipe's own are."""
    from .memory import parse_size

    try:
        parse_size(text)
    except StreamMergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _finite(text: str) -> float:
    with suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: wanted a finite number")


def _tokens(text: str) -> int:
    return _whole(text, least=64)


def _count(text: str) -> int:
    return _whole(text, least=1)


def _threads(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, least: int) -> int:
    with suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number, at least {least}")


def _add_resume_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--restart", action="store_true", help="drop an unfinished merge in OUT and begin anew")
    command.add_argument("--artifacts", type=Path, metavar="DIR", help="keep bases and attention masses here, and "
                         "reuse those of an earlier merge of the same LRM on the same calibration sets")
    command.add_argument("--save-every", type=_seconds, default=30.0, metavar="SECONDS", help="how often to save for a "
                         "resume (default: 30)")


def _seconds(text: str) -> float:
    seconds = _finite(text)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted seconds, at least 0")
    return seconds


def _add_output_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.add_argument("--log-format", choices=("text", "json"), default="text", help="progress on stderr as JSON")


def _progress(args: argparse.Namespace):
    from .progress import Progress

    return Progress("quiet" if args.quiet else "json" if args.log_format == "json" else "auto")


def _recipe(args: argparse.Namespace):
    """The recipe, with what the flags say in place of its own."""
    from .recipe import load_recipe

    recipe = load_recipe(args.recipe)  # before torch is imported: a typo is answered at once
    names = ("device_memory", "host_memory", "tokens_per_batch", "scratch_dir", "scratch_space")
    given = {k: getattr(args, k) for k in names}
    budget = dataclasses.replace(recipe.budget, **{k: v for k, v in given.items() if v is not None})
    lam = recipe.lam if args.lam is None else args.lam
    return dataclasses.replace(recipe, budget=budget, lam=lam)


def _merge(args: argparse.Namespace) -> None:
    if args.dry_run:
        return _plan(args)
    recipe = _recipe(args)
    from .merging import merge
    from .report import print_summary

    report = merge(recipe, args.out, device=args.device, progress=_progress(args), threads=args.threads,
                   restart=args.restart, save_every=args.save_every, artifacts=args.artifacts)  # fmt: skip
    if not args.quiet and args.log_format == "text":
        print_summary(report, args.out)
    if args.json:
        print(json.dumps(report, default=str))


def _plan(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    recipe = _recipe(args)
    from .plain import is_plain
    from .planning.run import plan_merge
    from .planning.table import print_plan

    if not is_plain(recipe):
        from . import pipeline  # noqa: F401 (its seconds of import are the merge's as well)
    imports = time.perf_counter() - began
    report = plan_merge(recipe, args.out, device=args.device, threads=args.threads, progress=_progress(args),
                        restart=getattr(args, "restart", False), imports=imports)  # fmt: skip
    if not args.quiet and args.log_format == "text":
        print_plan(report)
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


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # idle OpenMP threads that spin steal the core from those that work: tenfold slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    tame_allocator()
    with suppress(ValueError):  # not the main thread: then its owner hears the signals
        signal.signal(signal.SIGTERM, _terminated)
    try:
        args.run(args)
    except StreamMergeError as error:
        return _failed(args, f"error: {error}{_unfinished(args)}", error.exit_code)
    except OSError as error:  # the system's refusal where nobody expected one
        what = f"{error.filename}: " if error.filename is not None else ""
        return _failed(args, f"error: {what}{error.strerror or error}{_unfinished(args)}", ResourceError.exit_code)
    except KeyboardInterrupt as stop:
        left = _unfinished(args)
        terminated = isinstance(stop, _Terminated)
        return _failed(args, "interrupted" + (left or "; nothing was left behind"), 75 if left and terminated else 130)
    return 0


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


def _failed(args: argparse.Namespace, message: str, exit_code: int) -> int:
    """Tell the user on stderr, in the format of the log."""
    if args.log_format == "json":
        record = {"ts": round(time.time(), 3), "level": "error", "event": message, "exit_code": exit_code}
        print(json.dumps(record), file=sys.stderr)
    else:
        print(f"streammerge: {message}", file=sys.stderr)
    return exit_code
