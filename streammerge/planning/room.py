"""The output directory and its disk, looked at without leaving a trace: no folder, no lock, no changed time.

The writer's own refusals, in its own words (io/claim.py, io/writer.py; tests/test_plan_command.py holds them equal).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, ResourceError
from ..fingerprint import fingerprint
from ..io.claim import STATE, refuse_finished
from ..io.header import encode_header, tensor_bytes
from ..io.shards import plan_shards
from ..journal import Journal, read
from ..memory import format_size, parse_size
from ..planned import Plan

RESUMED, DROPPED = "is resumed", "is dropped, the merge begins anew"

def weights_bytes(plan: Plan) -> int:
    """Size of the output's weight files, headers included."""
    total = 0
    for members in plan_shards(plan.tensors, parse_size(plan.recipe.shard_size)).values():
        raw, _ = encode_header([(t.name, t.dtype, tuple(t.shape)) for t in members])
        total += len(raw) + sum(tensor_bytes(t.dtype, t.shape) for t in members)
    return total


def look(plan: Plan, out: Path | None, circumstances: dict[str, Any], *, restart: bool = False) -> dict[str, Any]:
    """Bytes needed and free, and what becomes of an unfinished merge in OUT; without OUT only what is needed.

    `circumstances`: of this merge's fingerprint; `restart`: an unfinished merge is to be dropped. Raises InputError
    where OUT is a file, in use, not empty or holds another merge, ResourceError where it cannot be made or is too
    small.
    """
    needed = weights_bytes(plan)
    if out is None:
        return {"output": needed, "free": None, "where": None, "unfinished": None}
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"{out}: is a file, wanted a new directory: choose another name")
    record = _record(out)
    unfinished = _resumes(plan, out, circumstances, restart) if record else None
    ours = [n for n in dict.fromkeys(record) if Path(n).name == n]
    found = sorted(e for e in os.listdir(out) if e != STATE and e not in ours) if out.exists() else []
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(f"{out} is not empty: found {', '.join(found[:5])}{more}; choose a new directory")
    where = existing(out)
    _writable(out, where)
    free = shutil.disk_usage(where).free
    for name in ours:  # the merge goes on with them or removes them
        with suppress(OSError):
            free += (out / name).lstat().st_blocks * 512
    if needed > free and unfinished != RESUMED:
        raise ResourceError(
            f"{out}: not enough disk: the weights need {format_size(needed)} ({needed} bytes), {format_size(free)} "
            f"({free} bytes) were free at the start. Free some space, or choose an output directory on another disk"
        )
    return {"output": needed, "free": free, "where": str(where), "unfinished": unfinished}


def _resumes(plan: Plan, out: Path, circumstances: dict[str, Any], restart: bool) -> str:
    """What becomes of an unfinished merge. InputError that lists the differences where it is another one."""
    folder = out / STATE
    if restart or read(folder) is None:
        return DROPPED
    Journal(folder, fingerprint(plan.output, circumstances)).open(restart=False)  # such a journal is read, no more
    return RESUMED


def existing(out: Path) -> Path:
    """OUT itself, or the nearest of its parents that is there."""
    return next(p for p in (out.absolute(), *out.absolute().parents) if os.path.lexists(p))


def _record(out: Path) -> list[str]:
    """The names that an unfinished merge recorded in OUT. InputError where that merge still runs."""
    try:
        fd = os.open(out / STATE / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return []
    try:
        record = os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace").splitlines()
        try:  # shared, and given back at once: whoever asks does not become a second writer
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InputError(f"another merge (pid {record[0] if record else 'unknown'}) is writing to {out}: wait for "
                             "it to end, or choose another output directory") from None
    finally:
        os.close(fd)
    refuse_finished(out, record)
    return record[1:]


def _writable(out: Path, where: Path) -> None:
    if not where.is_dir():
        why = os.strerror(errno.ENOTDIR)
    elif os.access(where, os.W_OK | os.X_OK):
        return
    else:
        why = os.strerror(errno.EROFS if os.statvfs(where).f_flag & os.ST_RDONLY else errno.EACCES)
    raise ResourceError(f"{out}: cannot be written: {why}. Check the disk and its permissions, or choose another "
                        "output directory")
