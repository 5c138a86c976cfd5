"""What is wrong between keys that are each right: models that a method cannot take, parameters that it does not have.

mergekit ignores a parameter that it does not know, or finds where it does not look. Here each is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from ..gradient import Setting, scalars
from ..methods import METHODS
from .config import CONVERT, Config, SliceOut, base_of, beside, parts
from .refused import METHOD_REASONS, reason


def contradictions(config: Config) -> Iterator[str]:
    """One line for everything that is wrong, with file and line."""
    source = config.source
    if config.merge_method not in METHODS:
        yield _unknown_method(config)
        return
    if bool(config.models) == bool(config.slices):
        yield f"{source}: give either models or slices, and not both"
        return
    if config.tokenizer and config.tokenizer_source:
        yield f"{source}: tokenizer and tokenizer_source are both given; keep one"
    if config.tokenizer and not config.tokenizer.source:
        yield f"{source}: tokenizer.source is missing, which mergekit takes for union; a union {reason('union')}"
    for model in (*config.references, *(part.base_model for part in config.slices), config.vocabulary):
        if model and "+" in model.name and not beside(model.name, config.directory):
            yield f"{model.at}: {model}: a LoRA adapter behind '+' {reason('lora')}"
    for i, part in enumerate(config.slices):
        if len({end - first for first, end in (item.layer_range for item in part.sources)}) > 1:
            ranges = ", ".join(f"[{a}, {b}]" for a, b in (item.layer_range for item in part.sources))
            yield f"{source}: slices[{i}]: its sources have layer ranges of different lengths: {ranges}"
    for key, part in parts(config):
        yield from _inputs(config, key, part)
    yield from _names(config)


def _inputs(config: Config, key: str, part: SliceOut) -> Iterator[str]:
    """Whether a slice has the models that the method needs, and their parameters."""
    spec, base = config.spec, base_of(config, part)
    names = [item.model for item in part.sources]
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        yield f"{name.at}: {key}: {name} is listed twice; give it once, with the sum of its weights"
    if spec.needs_base and base is None:
        yield f"{config.source}: merge_method {spec.name} needs base_model"
    if base is not None and base not in names:
        yield f"{base.at}: {key}: base_model {base} is not among its sources, and {spec.name} needs it there"
    count, (least, most) = len([n for n in names if n != base]), spec.count
    if count < least or (most is not None and count > most):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"at most {most}"
        besides = " besides the base" if base else " (base_model counts as one)" if config.base_model else ""
        yield f"{config.source}: {key}: {spec.name} merges {wanted} models{besides}; {count} are given"
    for item in part.sources:
        for name, parameter in spec.model_parameters.items():
            scopes = (item.parameters, part.parameters, config.parameters)
            if parameter.required and item.model != base and not any(name in (scope or {}) for scope in scopes):
                yield f"{item.model.at}: {key}: {spec.name} needs the parameter {name} of {item.model}"
    for name, parameter in spec.parameters.items():
        if parameter.required and not any(name in (scope or {}) for scope in (part.parameters, config.parameters)):
            yield f"{config.source}: {key}: {spec.name} needs the parameter {name}; give it under parameters"


def _names(config: Config) -> Iterator[str]:
    """Parameters that the method does not know, or not there, or not with that value."""
    spec = config.spec
    both = {**spec.parameters, **spec.model_parameters}
    scopes = [("parameters", config.parameters, both)]
    scopes += [(f"models[{i}].parameters", m.parameters, spec.model_parameters) for i, m in enumerate(config.models)]
    for i, part in enumerate(config.slices):
        scopes.append((f"slices[{i}].parameters", part.parameters, both))
        scopes += [(f"slices[{i}].sources[{j}].parameters", s.parameters, spec.model_parameters) for j, s in
                   enumerate(part.sources)]  # fmt: skip
    for key, given, known in scopes:
        for name, value in (given or {}).items():
            if name in known:
                yield from _value(f"{value.at}: {key}.{name}", value.setting, CONVERT[known[name].type])
            elif name in both:
                yield f"{value.at}: {key}.{name} has no effect there; {name} belongs under the top-level parameters"
            else:
                near = difflib.get_close_matches(name, both, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "it has " + (", ".join(sorted(both)) or "none")
                yield f"{value.at}: {key}.{name} is no parameter of {spec.name} and would have no effect; {hint}"


def _value(where: str, value: Setting, convert: Callable[[Any], Any]) -> Iterator[str]:
    for item in scalars(value):
        try:
            convert(item)
        except ValueError as error:
            yield f"{where} has {str(item)[:60]!r}; wanted {error}"


def _unknown_method(config: Config) -> str:
    name, why = config.merge_method, METHOD_REASONS.get(config.merge_method)
    if why:
        return f"{config.source}: merge_method {name} {why}; there are " + ", ".join(METHODS)
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "there are " + ", ".join(METHODS)
    return f"{config.source}: merge_method {name[:60]!r} is not known; {hint}"
