"""The plan: what happens to every tensor, checked on headers before the first byte is computed, and what it will take.

`make_plan` opens the three checkpoints' headers, compares them, and lists everything that does not fit in one error.
Every LRM tensor is either merged or copied; nothing is skipped. `predict` states the memory that a test then measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .arch import Family, HeadLayout, family_of, head_layout
from .calibration import CalibrationSet
from .errors import InputError, ResourceError, StreamMergeError, listed
from .io.checkpoint import TORCH_DTYPES, Checkpoint, open_checkpoint, resolve_model
from .io.writer import OutTensor
from .memory import format_size, parse_size
from .recipe import Recipe

_SAME = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
).split()
_TOLD = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "vocab_size", "sliding_window")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTERPRETER = 64 << 20  # what loads after the meter's start: a tokenizer (40 MB for 50k tokens), a family's modules
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Job:
    """One tensor that is merged: which module of which decoder layer it is."""

    layer: int
    module: str


@dataclass(frozen=True)
class Plan:
    """A checked merge. `base` is the LRM's own checkpoint where the recipe says proxy_base."""

    recipe: Recipe
    lrm: Checkpoint
    itm: Checkpoint
    base: Checkpoint
    family: Family
    layout: HeadLayout
    layers: int
    merged: dict[str, Job]
    tensors: tuple[OutTensor, ...]  # the whole output, in the LRM's order of names
    warnings: tuple[str, ...]

    @property
    def copied(self) -> list[str]:
        """Names of tensors that stay the LRM's, byte for byte."""
        return [t.name for t in self.tensors if t.name not in self.merged]

    @property
    def head(self) -> str:
        """The key of the output embedding: the input embedding where they are tied."""
        return self.family.head if self.family.head in self.lrm.tensors else self.family.embedding

    def layer_tensors(self, layer: int) -> list[str]:
        """Every LRM tensor of a decoder layer."""
        prefix = self.family.layer_prefix(layer)
        return [name for name in self.lrm.tensors if name.startswith(prefix)]


def distinct(*checkpoints: Checkpoint) -> list[Checkpoint]:
    """Without repeats, in order: with a proxy base the LRM stands in two places."""
    return list({id(c): c for c in checkpoints}.values())


def make_plan(recipe: Recipe) -> Plan:
    """Open and compare the checkpoints. Raises InputError that lists everything that does not fit."""
    lrm, itm, base = _open_all(recipe)
    family, layers = family_of(lrm.config, str(lrm.path / "config.json")), lrm.config["num_hidden_layers"]
    problems = [p for other in distinct(itm, base) for p in _unlike(lrm, other)]
    for checkpoint in distinct(lrm, itm, base):
        if "quantization_config" in checkpoint.config:
            problems.append(f"{checkpoint.role}: {checkpoint.path} is quantized; give the full-precision checkpoint")
    chosen = range(layers) if recipe.layers is None else recipe.layers
    if [i for i in chosen if i >= layers]:
        problems.append(f"layers: {max(chosen)} is asked for; {lrm.path} has {layers} layers, 0 to {layers - 1}")
    merged = {family.weight(i, m): Job(i, m) for i in chosen if i < layers for m in recipe.modules}
    if not problems:
        problems = _unfit(merged, lrm, (lrm, itm, base))
    for needed in (family.embedding, family.norm):
        if needed not in lrm.tensors:
            problems.append(f"reasoning_model: {lrm.path} has no tensor {needed}")
    if problems:
        raise InputError(
            listed("The models do not fit together:", problems, "RAIN needs three checkpoints of one architecture.")
        )
    code = _CODES.get(recipe.dtype)
    tensors = tuple(
        OutTensor(t.name, (code or t.dtype) if t.name in merged else t.dtype, t.shape) for t in lrm.tensors.values()
    )
    layout = head_layout(lrm.config)
    return Plan(recipe, lrm, itm, base, family, layout, layers, merged, tensors, tuple(_warnings(lrm, itm, base)))


def _open_all(recipe: Recipe) -> list[Checkpoint]:
    """The three checkpoints; everything wrong with any of them, or with the inputs' names, in one error."""
    names = {"reasoning_model": recipe.reasoning_model, "instruct_model": recipe.instruct_model}
    names["base_model"] = recipe.base_model
    opened, problems = {}, []
    for role, name in names.items():
        if role == "base_model" and recipe.proxy_base:
            continue
        try:
            opened[role] = open_checkpoint(resolve_model(name, role), role)
            wrong = _bad_numbers(opened[role])
        except StreamMergeError as error:
            wrong = [str(error)]
        problems += wrong
    for kind in ("reasoning", "instruction"):
        name = getattr(recipe.calibration, kind)
        if name and not Path(name).is_file():
            problems.append(f"calibration.{kind}: {name}: no such file; give a path relative to the recipe")
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(listed("The inputs cannot be used:", map(_indented, problems)))
    return [opened.get(role, opened["reasoning_model"]) for role in names]


def _indented(problem: str, most: int = 9) -> str:
    """A problem of several lines as one item of a list; three broken checkpoints still fit one screen."""
    lines = problem.splitlines()
    if len(lines) > most:
        lines = [*lines[: most - 1], f"… and {len(lines) - most + 1} more lines"]
    return "\n    ".join(line.strip() for line in lines)


def _bad_numbers(checkpoint: Checkpoint) -> list[str]:
    """Sizes in config.json that are missing or make no sense: everything else is derived from them.

    Raises InputError for a family that is not known.
    """
    config, where = checkpoint.config, f"{checkpoint.role}: {checkpoint.path}/config.json"
    family_of(config, where)
    problems = []
    for key in _SAME[1:]:
        value = config.get(key)
        optional = key in ("num_key_value_heads", "head_dim") and value is None
        if not optional and (type(value) is not int or value < 1):
            found = f"is {str(value)[:40]!r}" if key in config else "is missing"
            problems.append(f"{where}: {key} {found}; wanted a whole number above 0")
    if not problems and config["num_attention_heads"] % (config.get("num_key_value_heads") or 1):
        problems.append(f"{where}: num_attention_heads is no multiple of num_key_value_heads")
    return problems


def _unlike(lrm: Checkpoint, other: Checkpoint) -> list[str]:
    """Config values that must be the same in all three."""
    a, b = dict(lrm.config), dict(other.config)
    for config in (a, b):
        layout = head_layout(config)
        config["num_key_value_heads"], config["head_dim"] = layout.kv_heads, layout.head_dim
    return [
        f"{other.role}: {key} is {b.get(key)!r} in {other.path}/config.json; the LRM has {a.get(key)!r}"
        for key in _SAME
        if a.get(key) != b.get(key)
    ]


def _unfit(merged: dict[str, Job], lrm: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    """Tensors to merge that are missing, of another shape, or not floats."""
    problems = []
    for checkpoint in distinct(*models):
        for key in merged:
            found, wanted = checkpoint.tensors.get(key), lrm.tensors.get(key)
            if found is None:
                problems.append(f"{checkpoint.role}: {checkpoint.path} has no tensor {key}")
            elif wanted is not None and found.shape != wanted.shape:
                shapes = f"{list(found.shape)}; the LRM's is {list(wanted.shape)}"
                problems.append(f"{checkpoint.role}: {key} in {found.file} has shape {shapes}")
            elif found.dtype not in _FLOATS:
                problems.append(f"{checkpoint.role}: {key} in {found.file} is {found.dtype}; wanted a float tensor")
    return problems


def _warnings(lrm: Checkpoint, itm: Checkpoint, base: Checkpoint) -> list[str]:
    """Differences that do not stop a merge but that its user should know."""
    out = []
    for other in distinct(itm, base):
        for key in _TOLD:
            mine, theirs = lrm.config.get(key), other.config.get(key)
            if mine != theirs:
                out.append(f"{key} is {theirs!r} in {other.role} and {mine!r} in the LRM; the LRM's is kept")
    return out


@dataclass(frozen=True)
class Estimate:
    """Predicted peaks beyond the imports, in bytes, with the terms of each sum, and the batch size they follow from."""

    tokens_per_batch: int
    device: dict[str, int]  # empty on the CPU, where everything is on the host
    host: dict[str, int]
    disk: int

    def as_dict(self) -> dict:
        """For the report."""
        totals = {"device_total": sum(self.device.values()), "host_total": sum(self.host.values())}
        return {"tokens_per_batch": self.tokens_per_batch, "device": self.device, "host": self.host, **totals} | {
            "disk": self.disk
        }


def predict(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The largest token batch that the budgets allow, and the memory it takes.

    Raises ResourceError that names the minimum when even the smallest batch does not fit.
    """
    budget = plan.recipe.budget
    longest = max((len(s.ids) for s in (*data.reasoning, *data.heldout, *data.instruction)), default=1)
    tokens = max(longest, budget.tokens_per_batch or (8192 if device.type == "cuda" else 2048))
    limits = {"device": budget.device_memory, "host": budget.host_memory}
    while True:
        estimate = _estimate(plan, data, device, dtype, tokens)
        over = {
            side: (sum(getattr(estimate, side).values()), limit)
            for side, limit in limits.items()
            if limit != "auto" and sum(getattr(estimate, side).values()) > parse_size(limit)
        }
        if not over:
            return estimate
        if tokens <= max(longest, 256) or budget.tokens_per_batch:
            needs = [f"{s} memory: {format_size(need)} needed, {limit} given" for s, (need, limit) in over.items()]
            raise ResourceError(listed("The merge does not fit the memory budget:", needs, "Raise the budget, or drop "
                                       "the longest calibration samples (calibration.max_tokens with on_long: drop)."))
        tokens = max(longest, 256, tokens // 2)


def _estimate(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, tokens: int) -> Estimate:
    config, layout = plan.lrm.config, plan.layout
    width, wide = config["hidden_size"], config["intermediate_size"]
    item = torch.empty(0, dtype=dtype).element_size()
    infos = [[plan.lrm.tensors[n] for n in plan.layer_tensors(i)] for i in range(plan.layers)]
    native = max(sum(t.nbytes for t in layer) for layer in infos)
    elements = max(sum(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for t in layer) for layer in infos)
    largest = max(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for layer in infos for t in layer)
    rows = sum(len(s.omega) for s in data.reasoning)
    attn = layout.heads * layout.head_dim
    features = sum(4 * w * min(max(rows, 1), w) for w in (width, attn, width, wide)) if rows else 0
    if rows and plan.recipe.thinking.attended_values:
        features += 4 * layout.kv_heads * width * min(rows * (1 + layout.group), width)
    held = sum(len(s.ids) for s in (*data.reasoning, *data.instruction)) + 2 * sum(len(s.ids) for s in data.heldout)
    sets = (data.reasoning, data.heldout, data.instruction)
    batch = min(tokens, int(1.25 * max(sum(len(s.ids) for s in samples) for samples in sets)))  # padding: a quarter
    streams = batch * (8 * width + 3 * attn + 3 * wide) * item
    composing = 4 * 4 * largest  # W* in fp32 and, for the leak as written, two fp32 copies and their difference
    copied = device.type != "cpu" or any(TORCH_DTYPES[t.dtype] != dtype for layer in infos for t in layer)
    copy = elements * item if copied else 0
    passing = {
        "compute copies of two layers": 2 * copy,
        "features and bases": 3 * features,
    }
    staging = {
        "staged layers of the trio": 3 * native,
        "the merged layer": elements * 4 if plan.recipe.dtype == "float32" else native,
        "offloaded activations": int(1.25 * held * width * item),
        "tokenizer and model code": _INTERPRETER,
    }
    disk = sum(t.nbytes for t in plan.lrm.tensors.values())
    if device.type == "cpu":
        passing["a token batch, or composing"] = max(streams, composing - copy)  # when composing, one copy is there
        return Estimate(tokens, {}, staging | passing, disk)
    passing |= {"one token batch": streams, "composing the largest tensor": composing}
    return Estimate(tokens, passing, staging | {"one tensor in flight": 4 * largest}, disk)
