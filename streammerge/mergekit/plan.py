"""From a configuration to resolved jobs: models opened, tensors matched, every parameter one value for one tensor.

All is decided on headers: what does not fit is one InputError before any work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError, RecipeError, StreamMergeError, listed
from ..gradient import resolve
from ..io.checkpoint import Checkpoint, TensorInfo
from ..io.encoded import notes, open_model
from ..io.shards import OutTensor
from ..jobs import Source, TensorJob, TensorPlan
from ..methods import Parameter
from .config import CONVERT, Config, Given, Reference, base_of, parts
from .names import Names, bad_layers, sort_out
from .outline import Slot, outline
from .ranges import out_of_range
from .release import out_config, side_sources
from .vocabulary import Vocabulary, find_model, read_vocabulary

_WIDTH = {"BF16": 1, "F16": 1, "F32": 2, "F64": 3}


def make_tensor_plan(config: Config) -> TensorPlan:
    """Open and compare the models. Raises InputError that lists everything that does not fit, RecipeError for
    parameters that have no value, or no possible one, for some tensor."""
    models = _open_all(config)
    problems = [p for names in models.values() for p in bad_layers(names)]
    problems += _unlike([names.checkpoint for names in models.values()])
    checkpoints = {model: names.checkpoint for model, names in models.items()}
    vocabulary = None if problems else read_vocabulary(config, checkpoints, problems)
    slots = [] if problems else outline(config, models, problems)
    if not problems:
        problems = [p for slot in slots for p in _unfit(slot, models, vocabulary)]
    if problems:
        raise InputError(listed("The models do not fit together:", problems, "Nothing was read beyond headers and "
                                "tokenizers, nothing was written."))
    wrong: dict[str, list[str]] = {}
    jobs = tuple(_job(config, slot, models, vocabulary, wrong) for slot in slots)
    if wrong:
        told = [f"{what} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")") for what, names in
                wrong.items()]  # fmt: skip
        raise RecipeError(listed(f"{config.source}: the parameters do not fit every tensor:", told))
    donor, warnings = checkpoints[config.references[0]], _warnings(config, models, vocabulary)
    warnings += notes(checkpoints.values())
    content = out_config(config, models, slots, jobs, vocabulary, warnings)
    sides = side_sources(config, checkpoints, content, vocabulary, warnings)
    return TensorPlan(config.text, config.source, config.merge_method, tuple(checkpoints.values()), donor, content,
                      sides, jobs, tuple(warnings))  # fmt: skip


def _open_all(config: Config) -> dict[Reference, Names]:
    """Every model that is referred to; everything wrong with any of them in one error."""
    roles = {item.model: f"models[{i}].model" for i, item in reversed(list(enumerate(config.models)))}
    for i, part in reversed(list(enumerate(config.slices))):
        roles |= {s.model: f"slices[{i}].sources[{j}].model" for j, s in reversed(list(enumerate(part.sources)))}
    if config.base_model:
        roles[config.base_model] = "base_model"
    found, problems = {}, []
    for model in config.references:
        try:
            found[model] = sort_out(open_model(find_model(model, config), roles[model]))
        except StreamMergeError as error:
            problems.append(str(error).replace("\n", "\n    "))
    if problems:
        raise InputError(problems[0] if len(problems) == 1 else listed("The models cannot be used:", problems))
    return found


def _unlike(checkpoints: list[Checkpoint]) -> Iterator[str]:
    """Models of another architecture than the first."""
    first = checkpoints[0]
    for checkpoint in checkpoints:
        mine, theirs = (c.config.get("model_type") for c in (checkpoint, first))
        if mine != theirs:
            yield (f"{checkpoint.role}: {checkpoint.path}/config.json has model_type {mine!r}, {first.role} has "
                   f"{theirs!r}: only models of one architecture can be merged")


def _infos(slot: Slot, models: dict[Reference, Names]) -> list[TensorInfo]:
    """Headers of a slot's inputs."""
    sources = zip(slot.part.sources, slot.keys, strict=True)
    return [models[item.model].checkpoint.tensors[key] for item, key in sources]


def _unfit(slot: Slot, models: dict[Reference, Names], vocabulary: Vocabulary | None) -> Iterator[str]:
    """Shapes and dtypes of one tensor's inputs that do not fit together."""
    infos = _infos(slot, models)
    mapped = vocabulary is not None and slot.vocabulary
    shapes = [info.shape[1:] if mapped else info.shape for info in infos]
    for item, info, shape in zip(slot.part.sources, infos, shapes, strict=True):
        where = f"{item.model}: {info.name} in {info.file}"
        if shape != shapes[0]:
            hint = ""
            if slot.vocabulary and info.shape[1:] == infos[0].shape[1:]:
                hint = "; the vocabularies differ: set tokenizer_source to base, or to one of the models"
            yield (f"{where} has shape {list(info.shape)}; {slot.part.sources[0].model} has "
                   f"{list(infos[0].shape)}{hint}")
        elif mapped and info.shape[0] <= vocabulary.rows[item.model].max():
            yield (f"{where} has {info.shape[0]} rows; its tokenizer has ids up to "
                   f"{vocabulary.rows[item.model].max()}")
        if info.dtype not in _WIDTH and len({info.dtype for info in infos}) > 1:
            yield f"{where} is {info.dtype}; {slot.part.sources[0].model} has {infos[0].dtype}"
        elif info.dtype.startswith("F8"):
            yield f"{where} is {info.dtype}; give a checkpoint in {', '.join(_WIDTH)}"
    if infos[0].dtype not in _WIDTH and len({(i.dtype, i.shape) for i in infos}) == 1:
        for item in slot.part.sources[1:]:
            if not _same_bytes(slot.name, slot, item.model, models):
                yield f"{item.model}: {slot.name} is {infos[0].dtype}, which cannot be merged, and differs"


def _same_bytes(name: str, slot: Slot, model: Reference, models: dict[Reference, Names]) -> bool:
    """Whether a buffer of integers has the first source's bytes: it is small, and copied."""
    keys = {item.model: key for item, key in zip(slot.part.sources, slot.keys, strict=True)}
    first = slot.part.sources[0].model
    pairs = zip(*(models[m].checkpoint.chunks(keys[m]) for m in (first, model)), strict=True)
    return all(a == b for a, b in pairs)


def _job(
    config: Config, slot: Slot, models: dict[Reference, Names], vocabulary: Vocabulary | None,
    wrong: dict[str, list[str]],
) -> TensorJob:  # fmt: skip
    """One tensor of the output, with its parameters. What they lack is added to `wrong` under the tensor's name."""
    spec, base, infos = config.spec, base_of(config, slot.part), _infos(slot, models)
    if infos[0].dtype not in _WIDTH:
        item, out = slot.part.sources[0], OutTensor(slot.name, infos[0].dtype, infos[0].shape)
        return TensorJob(out, "passthrough", (Source(models[item.model].checkpoint, slot.keys[0]),))
    inputs = [(i.model, models[i.model].checkpoint, key) for i, key in zip(slot.part.sources, slot.keys, strict=True)]
    mapped = vocabulary is not None and slot.vocabulary
    maps = vocabulary.maps(inputs, slot.part.base_model or config.base_model) if mapped else [(None, ())] * len(inputs)
    found = []
    each = zip(slot.part.sources, inputs, slot.asked, maps, strict=True)
    for item, (_, checkpoint, key), asked, (rows, fills) in each:
        values = {}
        if item.model != base:
            scopes = (item.parameters, slot.part.parameters, config.parameters)
            values = resolved(spec.model_parameters, scopes, asked, slot.t, f" of {item.model}", wrong)
        found.append((item.model, Source(checkpoint, key, values, rows, fills)))
    shared = resolved(spec.parameters, (slot.part.parameters, config.parameters), slot.name, slot.t, "", wrong)
    sources = tuple(source for model, source in found if model != base)
    for problem in out_of_range(spec.name, shared, [dict(source.parameters) for source in sources]):
        wrong.setdefault(problem, []).append(slot.name)
    code = config.out_dtype or config.dtype or promoted(infos)
    shape = (vocabulary.size, *infos[0].shape[1:]) if mapped else infos[0].shape
    return TensorJob(OutTensor(slot.name, code, shape), spec.name, sources,
                     next((source for model, source in found if model == base), None), shared, config.dtype)


def resolved(
    parameters: Mapping[str, Parameter], scopes: tuple[Mapping[str, Given] | None, ...], name: str, t: float,
    whose: str, wrong: dict[str, list[str]],
) -> dict[str, Any]:  # fmt: skip
    """Every parameter's value for the tensor `name`: from the first scope (the nearest comes first) that has one for
    it, else its default. What has none, and no default, is added to `wrong`."""
    values = {}
    for key, parameter in parameters.items():
        value = None
        for scope in scopes:
            if value is None and scope and key in scope:
                try:
                    value = resolve(scope[key].setting, name, t, CONVERT[parameter.type])
                except ValueError as error:
                    wrong.setdefault(f"{scope[key].at}: {key}{whose}: wanted {error} in every layer", []).append(name)
                    value = parameter.default
        if value is None and parameter.required:
            wrong.setdefault(f"{key}{whose} has no value: no filter fits, and there is no value without a filter",
                             []).append(name)
        values[key] = parameter.default if value is None else value
    return values


def promoted(infos: list[TensorInfo]) -> str:
    """The narrowest dtype that holds all inputs, as torch.promote_types has it: BF16 and F16 make F32."""
    widest = max((info.dtype for info in infos), key=_WIDTH.__getitem__)
    return "F32" if {info.dtype for info in infos} == {"BF16", "F16"} else widest


def _warnings(config: Config, models: dict[Reference, Names], vocabulary: Vocabulary | None) -> list[str]:
    """What does not stop the merge but its user should know."""
    out = []
    for key, part in parts(config):
        base = base_of(config, part)
        for item in part.sources:
            if item.model == base and item.parameters:
                told = ", ".join(item.parameters)
                out.append(f"{item.model.at}: {key}: parameters of the base have no effect ({told})")
    for names in models.values():
        if names.computed:
            out.append(f"{names.checkpoint.role}: {len(names.computed)} buffers that models compute when they are "
                       f"loaded are left out ({names.computed[0]}, …)")
    return out
