"""Which tensors a merge changes, and how strongly: λ and density of each, by layer and by name.

λ and density are resolved once, here, for the tensors that a recipe's modules and layers choose. A tensor that an
adapter does not touch, or whose λ is 0, is not merged at all: it stays the LRM's, byte for byte, and is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .adapter import Adapter, unfit
from .arch import Family
from .gradient import Choice, Setting, place, resolve, to_float
from .io.checkpoint import Checkpoint
from .recipe import MODULES, Recipe, Sparsify


@dataclass(frozen=True)
class Job:
    """One tensor that is merged: which module of which decoder layer it is, its λ, and the share of its task vector's
    elements that stays."""

    layer: int
    module: str
    lam: float = 1.0
    density: float = 1.0


def jobs_of(recipe: Recipe, family: Family, chosen: Iterable[int], layers: int) -> dict[str, Job]:
    """{weight: its job} for a recipe's modules in the `chosen` ones of a model's `layers`. A gradient goes over all of
    the layers; where no filter fits a name, the key's default counts."""

    def value(setting: Setting, layer: int, name: str, otherwise: float) -> float:
        found = resolve(setting, name, place(layer, layers), to_float)
        return otherwise if found is None else found

    jobs, sparse = {}, recipe.sparsify.method != "none"
    for layer in chosen:
        for module in recipe.modules:
            name = family.weight(layer, module)
            density = value(recipe.sparsify.density, layer, name, Sparsify.density) if sparse else 1.0
            jobs[name] = Job(layer, module, value(recipe.lam, layer, name, Recipe.lam), density)
    return jobs


def live(jobs: dict[str, Job], itm: Checkpoint) -> dict[str, Job]:
    """The tensors that change: those that an adapter touches, and whose λ is not 0 (unless all are)."""
    if isinstance(itm, Adapter):
        jobs = {name: job for name, job in jobs.items() if name.removesuffix(".weight") in itm.factors}
    return {name: job for name, job in jobs.items() if job.lam} or jobs


def misplaced(itm: Adapter, lrm: Checkpoint, family: Family, layers: int) -> list[str]:
    """What an adapter adapts that the LRM does not have, or has in another shape."""
    known = [family.weight(i, m) for i in range(layers) for m in MODULES]
    shapes = {name.removesuffix(".weight"): lrm.tensors[name].shape for name in known if name in lrm.tensors}
    return unfit(itm, shapes, (name.removesuffix(".weight") for name in known))


def untouched(recipe: Recipe, jobs: dict[str, Job], merged: dict[str, Job], itm: Checkpoint) -> list[str]:
    """What a user of gradients, filters and adapters should know: what stays as it is, and what has no effect."""
    out = []
    if isinstance(itm, Adapter):
        trained, paths = itm.config.get("base_model_name_or_path"), {name.removesuffix(".weight") for name in jobs}
        outside = len(itm.factors.keys() - paths)
        out.append(f"instruct_model is an adapter of {str(trained)[:200]}, whose Δ is added to "
                   f"{recipe.reasoning_model}; it adapts {len(paths & itm.factors.keys())} of the {len(jobs)} tensors "
                   "that may be merged, the others stay the LRM's, byte for byte")
        if outside:
            out.append(f"{outside} of the adapter's modules are outside of modules and layers: they are not merged")
    still = sum(not job.lam for job in jobs.values())
    if still and merged and all(job.lam for job in merged.values()):
        out.append(f"lambda is 0 for {still} tensors: they stay the LRM's, byte for byte")
    settings = {"lambda": recipe.lam, "sparsify.density": recipe.sparsify.density}
    for key, setting in settings.items():
        choices = setting if isinstance(setting, tuple) and isinstance(setting[0], Choice) else ()
        used = {next((c for c in choices if c.fits(name)), None) for name in jobs}
        out += [f"{key}: the filter {choice.filter!r} decides for no tensor that may be merged" for choice in choices
                if choice not in used]  # fmt: skip
    return out
