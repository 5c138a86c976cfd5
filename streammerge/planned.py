"""The plan: what happens to every tensor, checked on headers before the first byte is computed.

`make_plan` opens the three checkpoints' headers, compares them, and lists everything that does not fit in one error.
Every LRM tensor is either merged or copied; nothing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .adapter import Adapter, is_adapter, open_adapter
from .arch import Family, HeadLayout, family_of, head_layout
from .errors import InputError, StreamMergeError, listed
from .io.checkpoint import Checkpoint, resolve_model
from .io.encoded import notes, open_model
from .io.shards import OutTensor
from .output import Output
from .recipe import Recipe, resolved
from .strengths import Job, jobs_of, live, misplaced, untouched
from .tokens import other_meanings

_SAME = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
).split()
_NEEDED = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_TOLD = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "vocab_size", "sliding_window")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Plan:
    """A checked merge. `base` is the LRM's own checkpoint where the recipe says proxy_base, and the ITM itself where
    that is an adapter, whose Δ needs none."""

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
    def adapter(self) -> Adapter | None:
        """The ITM, if it is an adapter."""
        return self.itm if isinstance(self.itm, Adapter) else None

    def sources(self, name: str) -> list[tuple[Checkpoint, str]]:
        """What is read for a merged tensor besides the LRM's own: the ITM's and the base's, or an adapter's A and B."""
        if self.adapter:
            found = self.adapter.factors[name.removesuffix(".weight")]
            return [(self.itm, found.a), (self.itm, found.b)]
        return [(self.itm, name), (self.base, name)]

    @property
    def copied(self) -> list[str]:
        """Names of tensors that stay the LRM's, byte for byte."""
        return [t.name for t in self.tensors if t.name not in self.merged]

    @property
    def head(self) -> str:
        """The key of the output embedding: the input embedding where they are tied, even if a head is stored too."""
        tied = self.lrm.config.get("tie_word_embeddings") or self.family.head not in self.lrm.tensors
        return self.family.embedding if tied else self.family.head

    @property
    def output(self) -> Output:
        """What the end of the merge needs to know of it."""
        recipe = self.recipe
        sets = {"reasoning": recipe.calibration.reasoning, "instruction": recipe.calibration.instruction}
        return Output(
            method=recipe.merge_method,
            recipe=resolved(recipe),
            source=recipe.source,
            inputs={c.role: c for c in distinct(self.lrm, self.itm, self.base)},
            donor=self.lrm,
            tensors=self.tensors,
            copies={name: (self.lrm, name) for name in self.copied},
            sides={file.name: file for file in self.lrm.sides} | dict(self.lrm.rewritten),
            names=dict(recipe.names),
            calibration={kind: path for kind, path in sets.items() if path},
            hashed=recipe.manifest != "none",
            card=recipe.card,
            sbom=recipe.sbom,
            hash_inputs=recipe.hash_inputs,
        )

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
    code = _CODES.get(recipe.dtype)
    family, layers = family_of(lrm.config, str(lrm.path / "config.json")), lrm.config["num_hidden_layers"]
    models = [c for c in distinct(lrm, itm, base) if not isinstance(c, Adapter)]
    problems = [p for other in models if other is not lrm for p in _unlike(lrm, other)]
    chosen = range(layers) if recipe.layers is None else recipe.layers
    if [i for i in chosen if i >= layers]:
        problems.append(f"layers: {max(chosen)} is asked for; {lrm.path} has {layers} layers, 0 to {layers - 1}")
    jobs = jobs_of(recipe, family, [i for i in chosen if i < layers], layers)
    if not problems:
        problems = _unfit(jobs, lrm, models)
    if isinstance(itm, Adapter):
        problems += misplaced(itm, lrm, family, layers)
    merged = live(jobs, itm)
    if not merged and not problems:
        problems.append(f"instruct_model: the adapter {itm.path} adapts none of the modules and layers that are merged")
    for needed in (family.embedding, family.norm):
        if needed not in lrm.tensors:
            problems.append(f"reasoning_model: {lrm.path} has no tensor {needed}")
    if problems:
        raise InputError(
            listed("The models do not fit together:", problems, "RAIN needs three checkpoints of one architecture.")
        )
    tensors = tuple(
        OutTensor(t.name, (code or t.dtype) if t.name in merged else t.dtype, t.shape) for t in lrm.tensors.values()
    )
    layout = head_layout(lrm.config)
    warnings = (*_warnings(recipe, lrm, models), *untouched(recipe, jobs, merged, itm))
    return Plan(recipe, lrm, itm, base, family, layout, layers, merged, tensors, warnings)


def _open_all(recipe: Recipe) -> list[Checkpoint]:
    """The three checkpoints; everything wrong with any of them, or with the inputs' names, in one error."""
    names = {"reasoning_model": recipe.reasoning_model, "instruct_model": recipe.instruct_model}
    names["base_model"] = recipe.base_model
    opened, problems, adapter = {}, [], False
    for role, name in names.items():
        if role == "base_model" and not name:  # a proxy base, or an adapter
            if recipe.adapts and not adapter:
                problems.append("base_model is missing: give it, or proxy_base: true where no base was published (the "
                                "LRM stands in for it); an adapter as instruct_model needs neither")
            continue
        try:
            path = resolve_model(name, role)
            if role == "instruct_model" and is_adapter(path):
                adapter = True
                opened[role] = open_adapter(path, role)
                if not recipe.adapts:
                    problems.append(f"instruct_model: {path} is an adapter, whose task vector needs no base: drop "
                                    "base_model and proxy_base")
                continue
            opened[role] = open_model(path, role)
            if role == "reasoning_model" and opened[role].encoded:
                opened[role] = opened[role].decoded_to(_CODES.get(recipe.dtype))  # of what is not merged, too
            wrong = _bad_numbers(opened[role])
        except StreamMergeError as error:
            wrong = [str(error)]
        problems += wrong
    for kind in ("reasoning", "instruction"):
        name = getattr(recipe.calibration, kind)
        if name and not os.path.isfile(name):  # unlike pathlib's, it takes any text
            problems.append(f"calibration.{kind}: {name}: no such file; give a path relative to the recipe")
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(listed("The inputs cannot be used:", map(_indented, problems)))
    lrm, itm = opened["reasoning_model"], opened["instruct_model"]
    return [lrm, itm, opened.get("base_model", itm if isinstance(itm, Adapter) else lrm)]


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
    for key in (*_SAME[1:], "vocab_size", "max_position_embeddings"):
        value = config.get(key)
        optional = key not in _NEEDED and value is None
        if not optional and (type(value) is not int or not 0 < value < 2**31):
            found = f"is {str(value)[:40]!r}" if key in config else "is missing"
            problems.append(f"{where}: {key} {found}; wanted a whole number above 0 (and below 2**31)")
    if not problems and config["num_attention_heads"] % (config.get("num_key_value_heads") or 1):
        problems.append(f"{where}: num_attention_heads is no multiple of num_key_value_heads")
    if not problems and config["num_hidden_layers"] > len(checkpoint.tensors):  # a plan of 10**9 layers never ends
        problems.append(f"{where}: num_hidden_layers is {config['num_hidden_layers']}; the checkpoint has only "
                        f"{len(checkpoint.tensors)} tensors")
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


def _warnings(recipe: Recipe, lrm: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    """Differences that do not stop a merge but that its user should know."""
    out = notes(models)
    stated = lrm.config.get("dtype") or lrm.config.get("torch_dtype")
    if recipe.dtype != "auto" and stated and stated != recipe.dtype:
        out.append(f"merged tensors are written as {recipe.dtype}, but config.json, a copy of the LRM's, says "
                   f"{stated}: transformers will load them as {stated} unless it is told otherwise")
    for other in (c for c in models if c is not lrm):
        for key in _TOLD:
            mine, theirs = lrm.config.get(key), other.config.get(key)
            if mine != theirs:
                out.append(f"{key} is {theirs!r} in {other.role} and {mine!r} in the LRM; the LRM's is kept")
        meanings = other_meanings(lrm.path, other.path)
        out += [f"{other.role} {meanings}"] if meanings else []
    return out
