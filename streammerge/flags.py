"""What the command line takes: every subcommand's flags, their types, and the help that teaches them."""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from pathlib import Path

from . import __version__
from .environment import Parser
from .errors import StreamMergeError

_EXIT_CODES = """exit codes:
  0  done                       5  the written checkpoint failed verification
  1  a bug in streammerge       6  the merge changed nothing
  2  recipe or usage            7  thinking markers missing from too many samples
  3  invalid input             75  interrupted (SIGTERM); the same command goes on
  4  not enough memory or disk  130  interrupted (Ctrl-C)

environment: STREAMMERGE_HOST_MEMORY=16GiB is --host-memory 16GiB, and so on for every flag; the command line wins
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


_QUANTIZE = """A checkpoint once more in 4 or 8 bits, as bitsandbytes stores it: transformers loads it as it is.

What `streammerge merge --also` does at its end. Codes and scales are those that transformers makes of the same weights;
embeddings, norms and the output head are byte copies. Streamed: memory does not know the size of the model.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(
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
    merge.add_argument("--also", type=_methods, default=(), metavar="FORM[,FORM]", help="besides OUT write OUT-nf4, "
                       "OUT-int8: bitsandbytes checkpoints that transformers loads as they are")
    _add_resume_flags(merge)
    plan = commands.add_parser(
        "plan", help="what a merge would do and take", description=_PLAN, epilog=_EXIT_CODES, formatter_class=raw
    )
    _add_merge_flags(plan, out="?")

    demo = commands.add_parser(
        "demo", help="merge the bundled trio and compare methods", formatter_class=raw,
        description="Merge the small trained trio that ships with the package with RAIN and its ablations, evaluate "
        "every result on the test split, and print them side by side.",
    )  # fmt: skip
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the merged models here (default: discarded)")
    demo.add_argument("--split", choices=("test", "validation"), default="test", help="rows to evaluate on")
    demo.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")
    _add_output_flags(demo)
    _add_bench(commands, raw)
    _add_verify(commands, raw)
    _add_quantize(commands, raw)
    return top


def _add_quantize(commands: argparse._SubParsersAction, raw: type) -> None:
    """`streammerge quantize` and its flags."""
    quantize = commands.add_parser(
        "quantize", help="a finished merge in 4 or 8 bits", description=_QUANTIZE, epilog=_EXIT_CODES,
        formatter_class=raw,
    )  # fmt: skip
    quantize.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint in full precision, such as a merge's")
    quantize.add_argument("out", type=Path, metavar="OUT", help="output directory, new or empty")
    quantize.add_argument("--to", required=True, choices=("nf4", "int8"), help="the form")
    quantize.add_argument("--shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    quantize.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: all cores)")
    _add_output_flags(quantize)


def _methods(text: str) -> tuple[str, ...]:
    """'nf4,int8' -> the forms of a quantised copy, each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in ("nf4", "int8")]
    if unknown:
        raise argparse.ArgumentTypeError(f"{text!r}: {unknown[0]!r} is no form; choose nf4, int8 or nf4,int8")
    return names


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
    to.add_argument("--shard-size", type=_size, metavar="SIZE", help="largest file of weights (default: recipe's)")
    to.add_argument("--hash-inputs", action="store_true", default=None, help="SHA256 of every shard of the inputs in "
                    "manifest and SBOM: they are read once more, and a resume compares them (the recipe's hash_inputs)")
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
