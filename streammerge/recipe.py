"""The recipe: strict YAML into frozen dataclasses. Every default of a merge lives here and only here.

A key that is not a field below is an error that names the file, the line and the nearest field; a value of the wrong
type, or out of its range, likewise. All mistakes of a file are reported at once. Paths in a recipe are relative to
the recipe's own directory; a name that is no directory there is taken for a model id of the Hub cache.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from .adapter import is_no_adapter
from .errors import RecipeError, listed
from .gradient import Setting, read_numbers
from .memory import parse_size
from .strict import TEXT_LIMIT, build, compose, read_limited, setting

MODULES = ("q", "k", "v", "o", "gate", "up", "down")


def size(raw: Any) -> str:
    """A size as people write it; it stays as written. Raises RecipeError."""
    if type(raw) not in (int, str):
        raise ValueError("a size, such as 8GiB")
    parse_size(raw)
    return str(raw)


def size_or_auto(raw: Any) -> str:
    """A size, or 'auto'."""
    return "auto" if raw == "auto" else size(raw)


def layer_indices(raw: Any) -> tuple[int, ...] | None:
    """'0-3, 7' or [0, 1, '5-8'] -> sorted layer numbers (ranges include both ends); null: all layers."""
    if raw is None:
        return None
    chosen: set[int] = set()
    for item in raw if isinstance(raw, list) else str(raw).split(","):
        found = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", str(item) if type(item) in (int, str) else "")
        if not found or int(found[1]) > int(found[2] or found[1]):
            raise ValueError("layer numbers and ranges, such as '0-3, 7'")
        chosen.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not chosen:
        raise ValueError("at least one layer (or leave the key out: all layers)")
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Calibration:
    """The two calibration sets, in the schemas of the authors' files (method.md, sections 2 and 3)."""

    reasoning: str = ""
    instruction: str = ""
    holdout: float = setting(0.1, least=0.0, most=0.9)  # share of the reasoning set kept for L_think
    limit_reasoning: int | None = setting(None, least=1)  # use only the first so many samples
    limit_instruction: int | None = setting(None, least=1)
    max_tokens: int | None = setting(None, least=8)  # longer samples: see on_long
    on_long: Literal["error", "drop"] = "error"  # drop: left out and counted in the report


@dataclass(frozen=True)
class Thinking:
    """The markers and the window Ω_think around them. `auto`: found from the LRM's template and tokenizer."""

    open: str = "auto"
    close: str = "auto"
    before: int = setting(1, least=0)  # positions before each marker; 1 = the position that predicts it
    inside: int = setting(0, least=0)  # positions next to each marker on the inner side
    after: int = setting(0, least=0)  # positions past the closer: costs instruction following (findings.md, 1)
    random: int = setting(4, least=0)  # random positions inside the thinking, a sample
    attended_values: bool = True  # v_proj also keeps the attention outputs at Ω_think (findings.md, 3)
    min_share: float = setting(0.9, least=0.0, most=1.0)  # of samples that must hold both markers


@dataclass(frozen=True)
class Basis:
    """How the bases of the protected feature spaces are chosen and computed (Eqs. 4-8)."""

    rank: Literal["energy", "exact", "fixed", "none"] = "energy"  # none: no projection (Stage 1 off)
    energy: float = setting(0.97, above=0.0, most=1.0)
    size: int | None = setting(None, least=1)  # for rank: fixed
    method: Literal["auto", "qr", "randomized", "covariance"] = "auto"  # rank: exact always factorises in full
    oversample: int = setting(16, least=1)
    power_iterations: int = setting(2, least=0, most=100)


@dataclass(frozen=True)
class Coefficients:
    """Attention statistics -> α per head (Eqs. 9-15; findings.md, 5 and 6)."""

    rule: Literal["standardized", "literal", "prior", "uniform"] = "standardized"
    scope: Literal["layer", "model"] = "model"
    kappa: float = setting(0.75, least=0.0)
    rho: float = setting(1.0, least=0.0)
    bounds: tuple[float, float] = (0.0, 2.0)
    value: float = setting(1.0, least=0.0)  # α of the uniform rule
    rows: Literal["predicting", "token"] = "predicting"  # attention rows at t-1, which predicts token t, or at t


@dataclass(frozen=True)
class Sparsify:
    """Most elements of the task vector set to zero, before it is scaled and projected (sparsify.py). `density`: the
    share of each tensor's elements that stays, in the notation of λ. `rescale`: dare divides them by the density."""

    method: Literal["none", "magnitude", "dare"] = "none"
    density: Setting = setting(0.2, read=partial(read_numbers, wanted="a number above 0, up to 1", above=0.0, most=1.0))
    rescale: bool = True


@dataclass(frozen=True)
class Budget:
    """Memory limits that size the token batches. `auto`: nine tenths of what the machine has in all."""

    device_memory: str = setting("auto", read=size_or_auto)
    host_memory: str = setting("auto", read=size_or_auto)
    tokens_per_batch: int | None = setting(None, least=64)  # overrides what the budgets give
    scratch_dir: str | None = setting(None)  # where activations are spilled; None: OUT/.streammerge
    scratch_space: str = setting("auto", read=size_or_auto)  # the most they may take; auto: what is free there


@dataclass(frozen=True)
class Recipe:
    """One merge. `λ` is written `lambda` in YAML."""

    merge_method: Literal["rain", "task_arithmetic"]
    instruct_model: str
    reasoning_model: str
    base_model: str = ""
    proxy_base: bool = False  # no published base: the LRM stands in for it, Δ = θ_I − θ_R
    lam: Setting = setting(1.0, read=partial(read_numbers, wanted="a finite number", above=-1e300), name="lambda")
    sparsify: Sparsify = Sparsify()
    modules: tuple[str, ...] = MODULES
    layers: tuple[int, ...] | None = setting(None, read=layer_indices)  # None: all decoder layers
    calibration: Calibration = Calibration()
    thinking: Thinking = Thinking()
    basis: Basis = Basis()
    coefficients: Coefficients = Coefficients()
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of merged tensors; auto: the LRM's own
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the calibration forwards
    capture_weights: Literal["native", "int8", "nf4"] = "native"  # the LRM's, in the calibration forwards alone
    capture_cache: str = "auto"  # where they wait for the next merge of the same LRM
    seed: int = setting(0, least=0)
    shard_size: str = setting("5GB", read=size)
    manifest: Literal["sha256", "none"] = "sha256"  # none: `streammerge verify` has nothing to compare with
    card: bool = True  # README.md in OUT, a model card
    sbom: bool = True  # streammerge_sbom.cdx.json in OUT; needs the manifest's hashes
    hash_inputs: bool = False  # read all of them once more, for the manifest and the SBOM
    allow_unchanged: bool = False
    budget: Budget = Budget()
    source: str = setting("<recipe>", hidden=True)  # the file it was read from
    names: tuple[tuple[str, str], ...] = setting((), hidden=True)  # absolute path -> as the file has it

    @property
    def needs_reasoning(self) -> bool:
        """Stage 1 runs: bases are wanted."""
        return self.merge_method == "rain" and self.basis.rank != "none"

    @property
    def needs_instruction(self) -> bool:
        """Stage 2 runs: coefficients come from attention."""
        return self.merge_method == "rain" and self.coefficients.rule != "uniform"

    @property
    def adapts(self) -> bool:
        """instruct_model is an adapter, which needs no base."""
        return not self.base_model and not self.proxy_base

    @property
    def surveys(self) -> bool:
        """A first pass over the LRM alone, for coefficients over the whole model."""
        return self.needs_instruction and self.coefficients.scope == "model"


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read, check and resolve a recipe file. `overrides` replace top-level fields.

    Raises RecipeError that lists every mistake with file and line.
    """
    path = Path(path)
    try:
        text = read_limited(path, TEXT_LIMIT)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error}); give the path of a YAML file") from None
    return parse_recipe(text, str(path), directory=path.parent, **overrides)


def parse_recipe(text: str, source: str, directory: Path | None = None, **overrides: Any) -> Recipe:
    """`load_recipe` for a text. `directory` resolves relative paths (none: the working directory)."""
    node = compose(text, source)
    problems: list[str] = []
    recipe = build(Recipe, node, source, "", problems)
    if not problems:
        recipe = dataclasses.replace(recipe, source=source, **overrides)
        recipe = _with_paths(recipe, directory or Path.cwd())
        problems = [f"{source}: {p}" for p in _contradictions(recipe)]
    if problems:
        raise RecipeError(listed("The recipe has mistakes:", problems))
    return recipe


def _with_paths(recipe: Recipe, directory: Path) -> Recipe:
    """Relative paths that exist beside the recipe become absolute; anything else stays as written."""

    names: dict[str, str] = {}

    def absolute(name: str) -> str:
        found = str(directory.absolute() / os.path.expanduser(name))  # unlike pathlib's, this takes any text
        names[found] = name
        return found

    def resolve(name: str) -> str:
        return absolute(name) if name and os.path.exists(directory / os.path.expanduser(name)) else name

    roles = ("base_model", "instruct_model", "reasoning_model")
    models: dict[str, Any] = {key: resolve(getattr(recipe, key)) for key in roles}
    if recipe.capture_cache not in ("", "auto"):  # it need not exist yet
        models["capture_cache"] = absolute(recipe.capture_cache)
    sets = {key: resolve(getattr(recipe.calibration, key)) for key in ("reasoning", "instruction")}
    models["calibration"] = dataclasses.replace(recipe.calibration, **sets)
    if recipe.budget.scratch_dir:
        models["budget"] = dataclasses.replace(recipe.budget, scratch_dir=absolute(recipe.budget.scratch_dir))
    return dataclasses.replace(recipe, **models, names=tuple(names.items()))


def _contradictions(recipe: Recipe) -> list[str]:
    """What is wrong between keys that are each right."""
    out = []
    if (recipe.base_model and recipe.proxy_base) or (recipe.adapts and is_no_adapter(recipe.instruct_model)):
        out.append("give base_model, or proxy_base: true where no base was published (the LRM stands in for it)")
    unknown = [m for m in recipe.modules if m not in MODULES]
    if unknown or not recipe.modules:
        out.append(f"modules has {', '.join(unknown) or 'nothing'}; choose from {', '.join(MODULES)}")
    default = Sparsify()
    if recipe.sparsify.method == "none" and recipe.sparsify != default:
        out.append("sparsify.density and .rescale have no effect with method: none; write a method, or drop them")
    if recipe.sparsify.method == "magnitude" and recipe.sparsify.rescale != default.rescale:
        out.append("sparsify.rescale has no effect with sparsify.method: magnitude, which never rescales; drop it")
    if recipe.basis.rank == "fixed" and recipe.basis.size is None:
        out.append("basis.rank is fixed: give basis.size, the number of directions to protect")
    if recipe.basis.size is not None and recipe.basis.rank != "fixed":
        out.append(f"basis.size is given but basis.rank is {recipe.basis.rank}: write rank: fixed, or drop size")
    if recipe.basis.energy != Basis().energy and recipe.basis.rank != "energy":
        out.append(f"basis.energy is given but basis.rank is {recipe.basis.rank}: write rank: energy, or drop energy")
    if recipe.coefficients.value != Coefficients().value and recipe.coefficients.rule != "uniform":
        out.append(f"coefficients.value is given but the rule is {recipe.coefficients.rule}: write rule: uniform")
    unused = {"uniform": ("scope", "kappa", "rho", "rows"), "literal": ("kappa",), "prior": ("kappa",)}
    for key in unused.get(recipe.coefficients.rule, ()):
        if getattr(recipe.coefficients, key) != getattr(Coefficients(), key):
            out.append(f"coefficients.{key} has no effect with rule: {recipe.coefficients.rule}; drop it")
    if recipe.merge_method == "task_arithmetic" and (recipe.basis, recipe.coefficients) != (Basis(), Coefficients()):
        out.append("basis and coefficients belong to merge_method: rain; task_arithmetic would ignore them: drop them")
    if recipe.capture_weights != "native" and not (recipe.needs_reasoning or recipe.surveys):
        out.append("capture_weights has no effect without Stage 1 and with no pass over the LRM alone; drop it")
    if recipe.capture_cache != "auto" and (recipe.capture_weights == "native" or not recipe.surveys):
        out.append("capture_cache has no effect without capture_weights: int8 or nf4, and a pass over the LRM alone "
                   "(coefficients.scope: model, and a rule other than uniform); drop it")
    if not recipe.capture_cache:
        out.append("capture_cache is empty; give a directory, or drop it")
    low, high = recipe.coefficients.bounds
    if not 0 <= low <= high:
        out.append(f"coefficients.bounds is [{low}, {high}]; wanted 0 <= low <= high")
    elif recipe.coefficients.rule == "uniform" and not low <= recipe.coefficients.value <= high:
        out.append(f"coefficients.value is {recipe.coefficients.value}; wanted a value inside coefficients.bounds, "
                   f"[{low}, {high}]")
    if recipe.needs_reasoning and not recipe.calibration.reasoning:
        out.append("calibration.reasoning is missing: the null space needs reasoning samples (or basis.rank: none)")
    if recipe.needs_instruction and not recipe.calibration.instruction:
        out.append("calibration.instruction is missing: coefficients need instruction samples (or rule: uniform)")
    return out


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML: what the report stores, and what reproduces the run."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """`to_yaml` before it is text: every key in its YAML name, values that YAML and JSON know."""
    data = dataclasses.asdict(recipe)
    del data["source"], data["names"]
    data["lambda"] = data.pop("lam")
    return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
