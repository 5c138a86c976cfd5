"""A mergekit configuration as frozen dataclasses: its keys, and how each is read. Facts from mergekit 0.1.5."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..gradient import Setting, read_setting, to_bool, to_float, to_int
from ..methods import METHODS, MethodSpec
from ..strict import build, construct, setting
from .refused import reason

CONVERT: dict[type, Callable[[Any], Any]] = {float: to_float, int: to_int, bool: to_bool}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Reference:
    """A model as the configuration names it: a directory or a Hub id, with '@revision' where one is given. Two are
    the same where their texts are, as in mergekit. `at` is file and line."""

    name: str
    at: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Given:
    """A parameter's setting and where it stands."""

    setting: Setting
    at: str = field(default="", compare=False)


Parameters = Mapping[str, Given]


def _scalar(node: yaml.Node, source: str, key: str, problems: list[str]) -> Any:
    """A YAML scalar's value; None also where it is a problem."""
    if isinstance(node, yaml.ScalarNode):
        return construct(node, f"{source}:{node.start_mark.line + 1}: {key}", problems)
    problems.append(f"{source}:{node.start_mark.line + 1}: {key} must be a single value")
    return None


def _reference(node: yaml.Node, source: str, key: str, problems: list[str]) -> Reference | None:
    """'path', 'id@revision', or mergekit's mappings of the same; LoRA and override_architecture are refused."""
    at = f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        keys = {k.value: v for k, v in node.value if isinstance(k, yaml.ScalarNode)}
        for refused in sorted(keys.keys() & {"lora", "override_architecture"}):
            problems.append(f"{at}: {key}.{refused} {reason(refused)}")
        inner = keys.keys() - {"lora", "override_architecture"}
        if inner == {"model"}:
            return _reference(keys["model"], source, key, problems)
        if inner in ({"path"}, {"path", "revision"}):
            words = [_scalar(keys[word], source, f"{key}.{word}", problems) for word in ("path", "revision") if word in
                     keys]  # fmt: skip
            return Reference("@".join(str(word) for word in words if word is not None), at)
        problems.append(f"{at}: {key} has the keys {', '.join(sorted(map(str, keys)))[:80]}; wanted the path or the "
                        "Hub id of a model")
        return None
    value = _scalar(node, source, key, problems)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or "\0" in value:
        problems.append(f"{at}: {key} is {str(value)[:60]!r}; wanted the path or the Hub id of a model (in quotes "
                        "where it looks like a number)")
        return None
    return Reference(value, at)


def _model(node: yaml.Node, source: str, key: str, problems: list[str]) -> Reference | None:
    """`_reference` where there must be one."""
    before = len(problems)
    found = _reference(node, source, key, problems)
    if found is None and len(problems) == before:
        at = f"{source}:{node.start_mark.line + 1}"
        problems.append(f"{at}: {key} is empty; wanted the path or the Hub id of a model")
    return found


def _lender(node: yaml.Node, source: str, key: str, problems: list[str]) -> Reference | None:
    """The model that lends its tokenizer, 'base' among them; a union is refused."""
    found = _reference(node, source, key, problems)
    if found and found.name == "union":
        problems.append(f"{found.at}: {key}: union {reason('union')}")
    return found


def _tokenizer(node: yaml.Node, source: str, key: str, problems: list[str]) -> TokenizerIn | None:
    return None if _is_null(node) else build(TokenizerIn, node, source, key + ".", problems)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _parameters(node: yaml.Node, source: str, key: str, problems: list[str]) -> Parameters:
    """A mapping of parameter names to scalars, gradients and filters; which there are is the method's matter."""
    if _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{source}:{node.start_mark.line + 1}: {key} must be a mapping of keys")
        return {}
    found: dict[str, Given] = {}
    for name_node, value in node.value:
        at = f"{source}:{name_node.start_mark.line + 1}"
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else None
        if name is None or name in found:
            problems.append(f"{at}: {key}: a key must be a plain word" if name is None else f"{at}: key '{key}.{name}' "
                            "is given twice")
            continue
        raw = construct(value, f"{at}: {key}.{name}", problems)
        try:
            found[name] = Given(read_setting(raw), at)
        except ValueError as error:
            problems.append(f"{at}: {key}.{name}: wanted {error}")
    return found


def _each(cls: type) -> Callable[..., tuple]:
    """A reader of lists of mappings, each a `cls`."""

    def read(node: yaml.Node, source: str, key: str, problems: list[str]) -> tuple:
        if _is_null(node):
            return ()
        if not isinstance(node, yaml.SequenceNode):
            problems.append(f"{source}:{node.start_mark.line + 1}: {key} must be a list")
            return ()
        return tuple(build(cls, item, source, f"{key}[{i}].", problems) for i, item in enumerate(node.value))

    return read


def _layer_range(raw: Any) -> tuple[int, int]:
    """[first, end), at least one layer."""
    if not isinstance(raw, list) or len(raw) != 2 or not all(type(n) is int and 0 <= n < 10_000 for n in raw):
        raise ValueError("[first, end]: two whole numbers; the end is not included")
    if raw[0] >= raw[1]:
        raise ValueError("an end beyond the first layer (the end is not included)")
    return raw[0], raw[1]


def _dtype(raw: Any) -> str:
    """The name of a float dtype -> its safetensors code; '' for none."""
    code = "" if raw is None else DTYPES.get(str(raw).removeprefix("torch."))
    if code is None:
        raise ValueError("one of " + ", ".join(DTYPES))
    return code


def _refused(node: yaml.Node, source: str, key: str, problems: list[str]) -> None:
    """A key of mergekit's that is not supported; null means the same as its absence."""
    if not _is_null(node):
        problems.append(f"{source}:{node.start_mark.line + 1}: {key} {reason(key.rpartition('.')[2])}")


@dataclass(frozen=True)
class ModelIn:
    """An item of `models`."""

    model: Reference = setting(dataclasses.MISSING, node=_model)
    parameters: Parameters = setting(None, node=_parameters)


@dataclass(frozen=True)
class SourceIn:
    """An item of a slice's `sources`: layers [first, end) of a model."""

    model: Reference = setting(dataclasses.MISSING, node=_model)
    layer_range: tuple[int, int] = setting(dataclasses.MISSING, read=_layer_range)
    parameters: Parameters = setting(None, node=_parameters)


@dataclass(frozen=True)
class SliceOut:
    """An item of `slices`: as many layers of the output as each of its sources has."""

    sources: tuple[SourceIn, ...] = setting(dataclasses.MISSING, node=_each(SourceIn))
    base_model: Reference | None = setting(None, node=_reference)
    residual_weight: None = setting(None, node=_refused)
    parameters: Parameters = setting(None, node=_parameters)


@dataclass(frozen=True)
class TokenizerIn:
    """The long form of `tokenizer_source`."""

    source: Reference | None = setting(None, node=_lender)
    tokens: None = setting(None, node=_refused)
    pad_to_multiple_of: int | None = setting(None, least=1)


@dataclass(frozen=True)
class Config:
    """A configuration that is right in itself; models are not opened yet. `text` is what its user wrote."""

    merge_method: str
    models: tuple[ModelIn, ...] = setting((), node=_each(ModelIn))
    slices: tuple[SliceOut, ...] = setting((), node=_each(SliceOut))
    modules: None = setting(None, node=_refused)
    base_model: Reference | None = setting(None, node=_reference)
    parameters: Parameters = setting(None, node=_parameters)
    dtype: str = setting("", read=_dtype)  # a safetensors code, '' for as stored
    out_dtype: str = setting("", read=_dtype)
    tokenizer_source: Reference | None = setting(None, node=_lender)
    tokenizer: TokenizerIn | None = setting(None, node=_tokenizer)
    chat_template: str | None = None
    source: str = setting("<config>", hidden=True)
    text: str = setting("", hidden=True)
    directory: Path = setting(Path("."), hidden=True)  # what relative paths are relative to

    @property
    def spec(self) -> MethodSpec:
        """What its method takes."""
        return METHODS[self.merge_method]

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model, once, in the order of the recipe, the base first: the first one lends config and tokenizer.
        (mergekit takes this order from a set, so that without a base it is another from run to run.)"""
        found = [self.base_model] if self.base_model else []
        found += [item.model for item in self.models]
        found += [item.model for part in self.slices for item in part.sources]
        return tuple(dict.fromkeys(found))

    @property
    def vocabulary(self) -> Reference | None:
        """The model whose vocabulary the output gets, or Reference('base'); None: tokens are not looked at."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source


def beside(name: str, directory: Path) -> Path | None:
    """The directory of that name beside the configuration, or None."""
    found = directory / os.path.expanduser(name)
    return found if os.path.isdir(found) else None


def parts(config: Config) -> list[tuple[str, SliceOut]]:
    """(key, slice) of the output: of `models` one over all layers, the base its last source where it is not listed.
    Its layer ranges are (0, 0): how many there are is not known before the models are opened."""
    if config.slices:
        return [(f"slices[{i}]", part) for i, part in enumerate(config.slices)]
    sources = [SourceIn(item.model, (0, 0), item.parameters) for item in config.models]
    if config.base_model and config.base_model not in [item.model for item in config.models]:
        sources.append(SourceIn(config.base_model, (0, 0)))
    return [("models", SliceOut(tuple(sources)))]


def base_of(config: Config, part: SliceOut) -> Reference | None:
    """The base where it has a meaning for the method; elsewhere it is one of the inputs, or none at all."""
    return None if config.spec.needs_base is False else part.base_model or config.base_model
