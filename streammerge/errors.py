"""Errors that a user can act on. Each carries the exit code that the command line returns.

A message names the file, the key, what was found, what was wanted and the next step. Where several things are wrong
at once, `listed` puts all of them into one message, so that a user fixes them in one go.
"""

from __future__ import annotations

from collections.abc import Iterable


class StreamMergeError(Exception):
    """A mistake that the user can mend; anything else that escapes is a bug (exit code 1)."""

    exit_code = 3
    final = False  # whether going on later cannot help: then nothing is left of what was written


class RecipeError(StreamMergeError):
    """The recipe or the command line cannot be understood."""

    exit_code = 2


class InputError(StreamMergeError):
    """A checkpoint, tokenizer or calibration file is missing, broken or does not fit the others."""

    exit_code = 3


class Refused(InputError):
    """OUT holds what this command cannot go on with: another merge, or a damaged one."""


class ResourceError(StreamMergeError):
    """Not enough memory or disk for the job."""

    exit_code = 4


class OutOfMemory(ResourceError):
    """Memory ran out while layers ran, though the plan had fitted it: other work has it. `tokens`: of the batch."""

    def __init__(self, tokens: int, what: str):
        self.tokens = tokens
        super().__init__(f"out of memory with batches of {tokens} tokens ({what}). Lower --tokens-per-batch, or give "
                         "--device-memory or --host-memory what is really free, so that the plan fits it")


class VerificationError(StreamMergeError):
    """The written checkpoint is not what was planned."""

    exit_code = 5
    final = True


class UnchangedError(StreamMergeError):
    """The merge changed nothing: the result is the LRM to rounding."""

    exit_code = 6
    final = True


class MarkersError(StreamMergeError):
    """Too few calibration samples hold the thinking markers."""

    exit_code = 7


class Overflow(InputError):
    """Activations that are not finite though all weights are. `where`: which."""

    def __init__(self, where: str):
        self.where = where
        super().__init__(f"{where} are not finite: the compute dtype overflows; set compute_dtype: float32 (or "
                         "bfloat16) in the recipe")


def overflow(where: str) -> InputError:
    """The error for activations that are not finite though all weights are."""
    return Overflow(where)


def listed(headline: str, problems: Iterable[str], advice: str = "", most: int = 20) -> str:
    """One screen of text: a headline, one line a problem (the first `most`, then a count), then what to do."""
    problems = list(problems)
    lines = [headline] + [f"  - {p}" for p in problems[:most]]
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more of the same kind")
    if advice:
        lines.append(advice)
    return "\n".join(lines)
