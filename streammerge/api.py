"""The Python API: what the command line does, as three functions.

    import streammerge
    streammerge.plan("recipe.yml", "merged", host_memory="16GiB")["plan"]["host_total"]
    report = streammerge.merge("recipe.yml", "merged", host_memory="16GiB", progress=print)
    assert streammerge.verify("merged").error() is None

Nothing is printed and no signal is caught: what goes wrong is a StreamMergeError, whose `exit_code` is the command
line's; a KeyboardInterrupt leaves what was saved, and the same call goes on from there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .progress import Progress, Step
from .recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from .findings import Findings
    from .tensor_merging import Request

Listener = Callable[[Step], None]


class MergeReport(TypedDict, total=False):
    """What a merge returns, and writes to OUT/streammerge_report.json: JSON-able, sizes in bytes, times in seconds."""

    streammerge: str  # the version that merged
    recipe: dict[str, Any]  # resolved, every default filled in
    models: dict[str, str]  # role -> where it was found
    versions: dict[str, str]
    tensors: dict[str, int]  # merged, copied
    alpha: dict[str, Any]  # min, mean, max, share at a bound; of every head
    totals: dict[str, float]  # norms over the whole model
    modules: list[dict[str, Any]]  # the same by module, with ranks and leaks
    per_tensor: dict[str, dict[str, Any]]
    l_think: dict[str, float]  # nats; empty where there were no held-out samples
    attention: dict[str, Any]  # alignment and leakage of every head
    calibration: dict[str, Any]  # samples used and left out, markers
    warnings: list[str]
    verified: dict[str, Any]  # what was compared after writing; files with sizes and hashes
    plan: dict[str, Any]  # predicted memory, by term
    memory: dict[str, Any]  # measured peaks
    seconds: dict[str, float]
    device: str
    compute_dtype: str
    kernels: Any  # what ran each kernel, and why


def with_budget(
    recipe: Recipe | str | Path,
    *,
    lam: float | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    tokens_per_batch: int | None = None,
    scratch_dir: str | None = None,
    scratch_space: str | None = None,
    shard_size: str | None = None,
    hash_inputs: bool | None = None,
) -> Recipe | Request:
    """A recipe, read where it is a path, with what is given here in place of its own; a Request where the file is a
    mergekit configuration. Raises RecipeError."""
    if not isinstance(recipe, Recipe):
        from .tensor_merging import request

        asked = request(recipe, lam=lam, device_memory=device_memory, host_memory=host_memory, scratch_dir=scratch_dir,
                        tokens_per_batch=tokens_per_batch, scratch_space=scratch_space,
                        shard_size=shard_size, hash_inputs=hash_inputs)  # fmt: skip
        if asked is not None:
            return asked
        recipe = load_recipe(recipe)
    given = {
        "device_memory": device_memory, "host_memory": host_memory, "tokens_per_batch": tokens_per_batch,
        "scratch_dir": scratch_dir, "scratch_space": scratch_space,
    }  # fmt: skip
    budget = dataclasses.replace(recipe.budget, **{k: v for k, v in given.items() if v is not None})
    own = {k: v for k, v in {"lam": lam, "shard_size": shard_size, "hash_inputs": hash_inputs}.items() if v is not None}
    return dataclasses.replace(recipe, budget=budget, **own)


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | Listener | None = None,
    restart: bool = False,
    save_every: float = 30.0,
    artifacts: str | Path | None = None,
    also: Sequence[str] = (),
    **budget: Any,
) -> MergeReport:
    """Merge as `recipe` says (a Recipe, or the path of its file) into `out`, a directory that is new, empty, or holds
    this very merge unfinished.

    `progress`: a callback that hears of every Step, or a Progress; `budget`: device_memory, host_memory (sizes such as
    "8GiB"), tokens_per_batch, scratch_dir, scratch_space, lam, shard_size, hash_inputs, in place of the recipe's; the
    others: merging.merge. With `also` ("nf4", "int8") the report's key `also` tells of each copy: path, bytes, counts,
    seconds. Raises StreamMergeError; `out` then holds nothing, or what was saved for a resume.
    """
    from .merging import merge as merge_resolved

    return merge_resolved(
        with_budget(recipe, **budget), out, device=device, threads=threads, progress=_heard(progress), restart=restart,
        save_every=save_every, artifacts=artifacts, also=also,
    )  # fmt: skip


def plan(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | Listener | None = None,
    restart: bool = False,
    **budget: Any,
) -> dict[str, Any]:
    """What `merge` would do with the same arguments, what it would take, and for how long; writes nothing.

    Raises what the merge would raise before it computes. Keys: groups, per_tensor, disk, plan (memory by term), time.
    """
    began, recipe = time.perf_counter(), with_budget(recipe, **budget)
    if not isinstance(recipe, Recipe):
        from .tensor_merging import plan_config

        return plan_config(recipe, None if out is None else Path(out), threads=threads)
    from .plain import is_plain
    from .planning.run import plan_merge

    if not is_plain(recipe):
        from . import pipeline  # noqa: F401 (its seconds of import are the merge's as well)
    imports = time.perf_counter() - began
    out = None if out is None else Path(out)
    return plan_merge(recipe, out, device=device, threads=threads, restart=restart, progress=_heard(progress),
                      imports=imports)  # fmt: skip


def verify(
    out: str | Path,
    *,
    quick: bool = False,
    generate: str | None = None,
    tokens: int = 64,
    insist: bool = False,
    l_think: bool = False,
    threads: int | None = None,
    progress: Progress | Listener | None = None,
) -> Findings:
    """Is `out` still what a merge wrote? All that is wrong is in the Findings; `error()` has it as one exception.

    `quick` reads no weights; `generate`: a prompt to answer with so many `tokens`, for a model above 4 GiB only where
    one `insist`s; `l_think` measures it anew. Raises InputError where there is nothing to compare with.
    """
    from .checking import check

    return check(Path(out), quick=quick, generate=generate, tokens=tokens, insist=insist, l_think=l_think,
                 threads=threads, progress=_heard(progress))  # fmt: skip


def _heard(progress: Progress | Listener | None) -> Progress:
    return progress if isinstance(progress, Progress) else Progress("quiet", progress)
