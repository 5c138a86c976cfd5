"""After a merge: reopen the output, compare it with the plan, and hash it for the manifest, in one reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError, StreamMergeError, VerificationError, listed, overflow
from .io.checkpoint import INDEX, Checkpoint, open_checkpoint
from .plan import Plan, distinct
from .scan import Digest, dealt, file_pieces, opened, scan, tensor_pieces
from .threads import usable_cores


def verify_output(plan: Plan, out: Path, threads: int | None = None) -> dict[str, Any]:
    """Reopen the written checkpoint: names, dtypes and shapes as planned, untouched bytes the LRM's, all finite.

    Returns counts, and the size and SHA256 of every file. Raises VerificationError, or InputError where the LRM
    itself holds what is wrong, listing everything.
    """
    written = open_checkpoint(out, "output")
    planned = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    problems = [
        f"{name}: written as {found.get(name)}, planned as {planned.get(name)}"
        for name in sorted(planned.keys() | found.keys())
        if planned.get(name) != found.get(name)
    ]
    files = {} if problems else _look(plan, written, threads or usable_cores(), problems)
    written.close()
    if problems:
        raise VerificationError(listed(f"{out} is not what was planned:", problems, "Please report this as a bug."))
    copied = sum(1 for name in found if name not in plan.merged)
    return {"tensors": len(found), "merged": len(found) - copied, "copied_identical": copied, "files": files}


def _look(plan: Plan, written: Checkpoint, threads: int, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Read every file of the output once -> {name: its size, and sha256 if wanted}. Adds to `problems`; InputError for
    an LRM with NaN or infinite values."""
    shards: dict[Path, list] = {}
    for info in written.tensors.values():
        shards.setdefault(info.file, []).append(info)
    sides = {source.name: source for source in plan.lrm.sides}
    index, hashed = written.path / INDEX, plan.recipe.manifest != "none"
    others = [written.path / name for name in sides] + ([index] if index.exists() else [])
    with opened([*shards, *others], hashed) as digests, opened(sides.values()) as sources:

        def twin(name: str) -> Checkpoint | Digest | None:
            return None if name in plan.merged else plan.lrm if name in plan.lrm.tensors else sources.get(name)

        for name, source in sources.items():
            if source.error or digests[name].error or digests[name].size != source.size:
                problems.append(f"{name}: not a byte copy of {source.file}")
        if problems:
            return {}
        lanes = (file_pieces(d, shards.get(d.file, ()), twin) for d in digests.values())
        seen = scan(dealt(lanes, threads), threads)
        files = {name: ({"sha256": d.hexdigest()} if hashed else {}) | {"size": d.size}
                 for name, d in sorted(digests.items())}  # fmt: skip
    for name in (n for n in (*written.tensors, *sides) if n in seen.changed):
        problems.append(f"{name}: not a byte copy of {sides[name]}" if name in sides else
                        f"{name}: should be the LRM's bytes and is not")  # fmt: skip
    told = {name: f"{name} has NaN or infinite values" for name in written.tensors if name in seen.infinite}
    problems += [line for name, line in told.items() if name in plan.merged]
    inherited = [f"{line} in {plan.lrm.tensors[name].file.name}" for name, line in told.items()
                 if name not in plan.merged and name not in seen.changed]  # fmt: skip
    if inherited and not problems:
        raise InputError(listed(f"reasoning_model: {plan.lrm.path} is damaged:", inherited, "Download it again."))
    return files


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """No NaN and no infinity in a stored float tensor; integers always pass."""
    return not scan(tensor_pieces(checkpoint, name), 1).infinite


def non_finite_everywhere(plan: Plan, otherwise: StreamMergeError | None = None) -> StreamMergeError:
    """The error for non-finite weights: once one was met, the rest are looked for, so that all are named.

    `otherwise`: the error for the case that every stored weight is finite.
    """
    weights = [
        (checkpoint, name)
        for checkpoint in distinct(plan.lrm, plan.itm, plan.base)
        for name in (checkpoint.tensors if checkpoint is plan.lrm else plan.merged)
    ]
    infinite = scan(piece for weight in weights for piece in tensor_pieces(*weight)).infinite
    problems = [f"{c.role}: {name} in {c.tensors[name].file}" for c, name in weights if (c.role, name) in infinite]
    if not problems:
        return otherwise or overflow("the token embeddings in the compute dtype")
    return InputError(
        listed("Weights with NaN or infinite values cannot be merged:", problems, "Download or save these files again.")
    )
