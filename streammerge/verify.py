"""After a merge: reopen the output and compare it with the plan.

Everything is read again, in large pieces, by as many threads as there are cores; memory is two pieces a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .codec import all_finite
from .errors import InputError, StreamMergeError, VerificationError, listed, overflow
from .io.checkpoint import Checkpoint, open_checkpoint, side_files
from .io.disk import byte_buffer
from .plan import Plan, distinct
from .threads import in_parallel, usable_cores

_PIECE = 1 << 21  # bytes, a multiple of every element's size: stays in a core's cache between reading and checking


class _Piece(NamedTuple):
    """A stretch of a stored tensor to look at, and the checkpoint that must hold the same bytes, if there is one."""

    checkpoint: Checkpoint
    name: str
    offset: int
    nbytes: int
    twin: Checkpoint | None


def verify_output(plan: Plan, out: Path, threads: int | None = None) -> dict[str, int]:
    """Reopen the written checkpoint: names, dtypes and shapes as planned, untouched bytes the LRM's, all finite.

    Raises VerificationError, or InputError where the LRM itself holds what is wrong, listing everything.
    """
    written = open_checkpoint(out, "output")
    problems, inherited = [], []
    planned = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            problems.append(f"{name}: written as {found.get(name)}, planned as {planned.get(name)}")
    if not problems:
        pieces = (p for n in found for p in _pieces(written, n, None if n in plan.merged else plan.lrm))
        changed, infinite = _look(pieces, threads)
        for name in found:
            if (written.role, name) in changed:
                problems.append(f"{name}: should be the LRM's bytes and is not")
            elif (written.role, name) in infinite:
                told = f"{name} has NaN or infinite values"
                problems += [told] if name in plan.merged else []
                inherited += [] if name in plan.merged else [f"{told} in {plan.lrm.tensors[name].file.name}"]
    for source in side_files(plan.lrm.path):
        copy = out / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            problems.append(f"{source.name}: not a byte copy of {source}")
    written.close()
    if problems:
        raise VerificationError(listed(f"{out} is not what was planned:", problems, "Please report this as a bug."))
    if inherited:
        raise InputError(listed(f"reasoning_model: {plan.lrm.path} is damaged:", inherited, "Download it again."))
    copied = sum(1 for name in found if name not in plan.merged)
    return {"tensors": len(found), "merged": len(found) - copied, "copied_identical": copied}


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """No NaN and no infinity in a stored float tensor; integers always pass."""
    return not _look(_pieces(checkpoint, name), 1)[1]


def _pieces(checkpoint: Checkpoint, name: str, twin: Checkpoint | None = None) -> Iterator[_Piece]:
    """A tensor, piece by piece."""
    size = checkpoint.tensors[name].nbytes
    for offset in range(0, size, _PIECE):
        yield _Piece(checkpoint, name, offset, min(_PIECE, size - offset), twin)


def _look(pieces: Iterable[_Piece], threads: int | None) -> tuple[set, set]:
    """-> (role, name) of the tensors that differ from their twin, and of those with non-finite values."""
    changed: set[tuple[str, str]] = set()
    infinite: set[tuple[str, str]] = set()

    def start() -> Callable[[_Piece], int]:
        mine, other, differ = byte_buffer(_PIECE), byte_buffer(_PIECE), np.empty(_PIECE // 8 + 1, bool)

        def look(piece: _Piece) -> int:
            here = mine[: piece.nbytes]
            piece.checkpoint.read_into(piece.name, memoryview(here), piece.offset)
            if piece.twin:
                there = other[: piece.nbytes]
                piece.twin.read_into(piece.name, memoryview(there), piece.offset)
                if not _equal(here, there, differ):
                    changed.add((piece.checkpoint.role, piece.name))
            if not all_finite(here, piece.checkpoint.tensors[piece.name].dtype):
                infinite.add((piece.checkpoint.role, piece.name))
            return piece.nbytes

        return look

    in_parallel(pieces, start, threads or usable_cores())
    return changed, infinite


def _equal(a: np.ndarray, b: np.ndarray, differ: np.ndarray) -> bool:
    """The same bytes, eight at a time; `differ` is a scratch of bools."""
    whole = len(a) // 8
    words = (x[: 8 * whole].view(np.uint64) for x in (a, b))
    different = np.not_equal(*words, out=differ[:whole])
    return not different.any() and bool((a[8 * whole :] == b[8 * whole :]).all())


def non_finite_everywhere(plan: Plan, otherwise: StreamMergeError | None = None) -> StreamMergeError:
    """The error for non-finite weights: once one was met, the rest are looked for, so that all are named.

    `otherwise`: the error for the case that every stored weight is finite.
    """
    weights = [
        (checkpoint, name)
        for checkpoint in distinct(plan.lrm, plan.itm, plan.base)
        for name in (checkpoint.tensors if checkpoint is plan.lrm else plan.merged)
    ]
    infinite = _look((piece for weight in weights for piece in _pieces(*weight)), None)[1]
    problems = [f"{c.role}: {name} in {c.tensors[name].file}" for c, name in weights if (c.role, name) in infinite]
    if not problems:
        return otherwise or overflow("the token embeddings in the compute dtype")
    return InputError(
        listed("Weights with NaN or infinite values cannot be merged:", problems, "Download or save these files again.")
    )
