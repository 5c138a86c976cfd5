"""The output's tensors: which tensor of which model each is made of, and at which t of the gradients.

Everything that does not fit is collected: missing tensors, shapes, dtypes, layer ranges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..gradient import place
from .config import Config, Reference, SliceOut, parts
from .names import Names, count_key, is_before, is_vocabulary


@dataclass(frozen=True)
class Slot:
    """One tensor of the output. `keys`: the tensor's key in each of the slice's sources, as it is stored; `asked`: its
    name there, which filters are compared with; `t`: its place in the slice."""

    name: str
    part: SliceOut
    asked: tuple[str, ...]
    keys: tuple[str, ...]
    t: float = 0.0

    @property
    def vocabulary(self) -> bool:
        """Its rows are tokens."""
        return is_vocabulary(self.name)


def outline(config: Config, models: dict[Reference, Names], problems: list[str]) -> list[Slot]:
    """Every tensor of the output in its order: before the layers, the layers, after them. Adds to `problems`."""
    pieces = [part for _, part in parts(config)]
    if config.slices:
        stacked = _stack_of(pieces, models, problems)
        if stacked is None:
            return []
        prefixes = [stacked]
    else:
        prefixes = sorted({prefix for names in models.values() for prefix in names.stacks})
    slots = [*_loose(pieces[0], models, True, problems)]
    for prefix in prefixes:
        number = 0
        for part in pieces:
            ranged = part if config.slices else _whole(part, prefix, models, problems)
            for slot in _layers(ranged, prefix, number, models, problems) if ranged else ():
                slots.append(slot)
            number += ranged.sources[0].layer_range[1] - ranged.sources[0].layer_range[0] if ranged else 0
    return [*slots, *_loose(pieces[-1], models, False, problems)]


def _stack_of(pieces: list[SliceOut], models: dict[Reference, Names], problems: list[str]) -> str | None:
    """The one stack that slices are cut from, with all layer ranges inside it; None where something is wrong."""
    before = len(problems)
    used = {item.model: models[item.model] for part in pieces for item in part.sources}
    prefixes = dict.fromkeys(prefix for names in used.values() for prefix in names.stacks)
    if len(prefixes) != 1:
        found = ", ".join(prefix + "N" for prefix in prefixes)
        problems.append(f"slices need models with one stack of layers, found {found}: use "
                        "models instead, which merges every stack over all of its layers")
        return None
    (prefix,) = prefixes
    for i, part in enumerate(pieces):
        for j, item in enumerate(part.sources):
            count, end = len(used[item.model].stacks[prefix]), item.layer_range[1]
            if end > count:
                problems.append(f"slices[{i}].sources[{j}].layer_range ends at {end}; {item.model} has {count} layers, "
                                f"so that at most [0, {count}] can be asked for")
    for names in used.values():
        if count_key(names.checkpoint.config) is None:
            problems.append(f"{names.checkpoint.path}/config.json has no num_hidden_layers, which stacking must change")
    return None if len(problems) > before else prefix


def _whole(part: SliceOut, prefix: str, models: dict[Reference, Names], problems: list[str]) -> SliceOut | None:
    """The slice over all layers of one stack; None, and a problem, where the models' layers are not as many."""
    counts = {item.model: len(models[item.model].stacks.get(prefix, ())) for item in part.sources}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{model} has {count}" for model, count in counts.items())
        problems.append(f"the layers {prefix}N are not as many in all models ({told}): choose them with slices and "
                        "layer_range")
        return None
    sources = (dataclasses.replace(item, layer_range=(0, counts[item.model])) for item in part.sources)
    return dataclasses.replace(part, sources=tuple(sources))


def _layers(
    part: SliceOut, prefix: str, number: int, models: dict[Reference, Names], problems: list[str]
) -> Iterator[Slot]:
    """The tensors of one slice's layers, which are numbered from `number` on in the output."""
    first, end = part.sources[0].layer_range
    for offset in range(end - first):
        at = [item.layer_range[0] + offset for item in part.sources]
        layers = [models[item.model].stacks[prefix][n] for item, n in zip(part.sources, at, strict=True)]
        for suffix in sorted(frozenset().union(*layers)):
            names = tuple(f"{prefix}{n}.{suffix}" for n in at)
            lacking = [(i, n) for i, (n, layer) in enumerate(zip(names, layers, strict=True)) if suffix not in layer]
            for i, name in lacking:
                owner = next(part.sources[k].model for k, layer in enumerate(layers) if suffix in layer)
                problems.append(f"{part.sources[i].model} has no tensor {name}; {owner} has one")
            if not lacking:
                yield Slot(f"{prefix}{number + offset}.{suffix}", part, names, names, place(offset, end - first))


def _loose(part: SliceOut, models: dict[Reference, Names], before: bool, problems: list[str]) -> Iterator[Slot]:
    """The tensors outside of the layers, of the first slice's models or of the last's."""
    sources = [models[item.model] for item in part.sources]
    for name in dict.fromkeys(name for names in sources for name in names.loose):
        if is_before(name) != before:
            continue
        keys = [names.stored(name) for names in sources]
        for item, key in zip(part.sources, keys, strict=True):
            if key is None:
                owner = next(i.model for i, n in zip(part.sources, sources, strict=True) if name in n.loose)
                problems.append(f"{item.model} has no tensor {name}; {owner} has one")
        if None not in keys:
            yield Slot(name, part, (name,) * len(keys), tuple(keys))
