"""After a merge: reopen the output and compare it, in one reading, with the plan and with what was written.

Files whose hash was not taken as they were written are hashed here, for the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .errors import InputError, StreamMergeError, VerificationError, listed, overflow
from .io.checkpoint import INDEX, Checkpoint, open_checkpoint
from .output import Output
from .planned import Plan, distinct
from .scan import Shard, dealt, file_pieces, opened, scan, tensor_pieces
from .threads import usable_cores


def verify_output(
    output: Output, out: Path, threads: int | None = None, shards: Mapping[str, Shard] | None = None
) -> dict[str, Any]:
    """Reopen the written checkpoint: names, dtypes and shapes as planned, copied bytes their input's, all finite; and
    of the `shards`, by file name, the bytes that were put there.

    Returns counts, and the size and SHA256 of every file. Raises VerificationError, or InputError where an input
    itself holds what is wrong, listing everything.
    """
    written = open_checkpoint(out, "output")
    planned = {t.name: (t.dtype, t.shape) for t in output.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    problems = [
        f"{name}: written as {found.get(name)}, planned as {planned.get(name)}"
        for name in sorted(planned.keys() | found.keys())
        if planned.get(name) != found.get(name)
    ]
    files = {} if problems else _look(output, written, threads or usable_cores(), shards or {}, problems)
    written.close()
    if problems:
        raise VerificationError(listed(f"{out} is not what was planned:", problems, "Please report this as a bug."))
    copied, decoded = len(output.copies), len(output.decoded)
    return {"tensors": len(found), "merged": len(found) - copied, "copied_identical": copied - decoded,
            **({"decoded": decoded} if decoded else {}), "files": files}  # fmt: skip


def _look(
    output: Output, written: Checkpoint, threads: int, known: Mapping[str, Shard], problems: list[str]
) -> dict[str, dict[str, Any]]:
    """Read every file of the output once -> {name: its size, and sha256 if wanted}. Adds to `problems`; InputError for
    inputs with NaN or infinite values."""
    shards: dict[Path, list] = {}
    for info in written.tensors.values():
        shards.setdefault(info.file, []).append(info)
    copied = {name: source for name, source in output.sides.items() if isinstance(source, Path)}
    index = written.path / INDEX
    others = [written.path / name for name in output.sides] + ([index] if index.exists() else [])
    unhashed = known if output.hashed else {*known, *(file.name for file in (*shards, *others))}
    with opened([*shards, *others], unhashed) as digests, opened(copied.values()) as opened_sources:
        sources = {name: opened_sources[source.name] for name, source in copied.items()}

        def twin(name: str) -> Callable[..., None] | None:
            if name in output.copies:
                checkpoint, key = output.copies[name]
                return partial(checkpoint.read_into, key)
            return sources[name].read if name in sources else None

        for name, source in sources.items():
            if source.error or digests[name].error or digests[name].size != source.size:
                problems.append(f"{name}: not a byte copy of {source.file}")
        for name in output.sides.keys() - sources.keys():
            if (written.path / name).read_bytes() != output.sides[name]:
                problems.append(f"{name}: holds other bytes than were written")
        if problems:
            return {}
        lanes = (file_pieces(d, shards.get(d.file, ()), twin, known.get(name)) for name, d in digests.items())
        seen = scan(dealt(lanes, threads), threads)
        files = {name: ({"sha256": known.get(name, d).hexdigest()} if output.hashed else {}) | {"size": d.size}
                 for name, d in sorted(digests.items())}  # fmt: skip
    for name in (n for n in (*written.tensors, *sources) if n in seen.changed):
        source = "{1} of {0.role} {0.path}".format(*output.copies[name]) if name in output.copies else copied[name]
        problems.append(f"{name}: not a byte copy of {source}")
    infinite = [name for name in written.tensors if name in seen.infinite]
    problems += [f"{name} has NaN or infinite values" for name in infinite if name not in output.copies]
    told = seen.changed | set(infinite)
    problems += [f"{name}: holds other bytes than were written" for name in (*known, *written.tensors)
                 if name in seen.altered and name not in told]  # fmt: skip
    if not problems:
        _refuse_damaged(output.copies[name] for name in infinite)
    return files


def _refuse_damaged(stored: Iterable[tuple[Checkpoint, str]]) -> None:
    """InputError for tensors of the inputs, each a checkpoint and a name, that hold NaN or infinite values."""
    lines: dict[str, list[str]] = {}
    for checkpoint, name in stored:
        where = f"{checkpoint.role}: {checkpoint.path} is damaged:"
        file = checkpoint.tensors[name].file.name
        lines.setdefault(where, []).append(f"{name} has NaN or infinite values in {file}")
    if lines:
        raise InputError("\n".join(listed(where, told, "Download it again.") for where, told in lines.items()))


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """No NaN and no infinity in a stored float tensor; integers always pass."""
    return not scan(tensor_pieces(checkpoint, name), 1).infinite


def non_finite_everywhere(plan: Plan, otherwise: StreamMergeError | None = None) -> StreamMergeError:
    """The error for non-finite weights: once one was met, the rest are looked for, so that all are named.

    `otherwise`: the error for the case that every stored weight is finite.
    """
    read = [source for name in plan.merged for source in plan.sources(name)]
    weights = [(plan.lrm, name) for name in plan.lrm.tensors]
    weights += [(c, name) for other in distinct(plan.itm, plan.base) for c, name in read if c is other is not plan.lrm]
    infinite = scan(piece for weight in weights for piece in tensor_pieces(*weight)).infinite
    problems = [f"{c.role}: {name} in {c.tensors[name].file}" for c, name in weights if (c.role, name) in infinite]
    if not problems:
        return otherwise or overflow("the token embeddings in the compute dtype")
    return InputError(
        listed("Weights with NaN or infinite values cannot be merged:", problems, "Download or save these files again.")
    )
