"""YAML into frozen dataclasses, strictly: what the fields and their annotations do not allow is an error.

Every mistake is appended to a list with its file and line, none is raised, so that one run shows all of them. A
field's annotation is its type (bool, int, float, str, Literal, tuple, an optional, another dataclass); `setting` adds
a range, a notation of its own, or another name in YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

import yaml

from .errors import RecipeError


def setting(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    read: Callable[[Any], Any] | None = None,
    name: str | None = None,
    hidden: bool = False,
) -> Any:
    """A field with a range (`above` is exclusive), a reader for its own notation, or a name of its own in YAML.

    `read` takes what YAML gives and raises ValueError whose text says what was wanted. A hidden field is no key.
    """
    told = {"above": above, "least": least, "most": most, "read": read, "name": name, "hidden": hidden}
    return field(default=default, metadata=told)


_short = reprlib.Repr()  # of a value in a message: a few aliases can make one whose repr is gigabytes
_short.maxlevel, _short.maxstring, _short.maxother = 2, 60, 60


def build(cls: type, node: yaml.Node, source: str, prefix: str, problems: list[str]) -> Any:
    """A dataclass from a YAML mapping; appends to `problems` and returns None where it cannot."""
    if not isinstance(node, yaml.MappingNode):
        problems.append(f"{source}:{node.start_mark.line + 1}: {prefix.rstrip('.')} must be a mapping of keys")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("hidden")}
    shown = {f.metadata.get("name") or name: name for name, f in fields.items()}
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be a plain word")
            continue
        key = key_node.value
        name = shown.get(key)
        if name is None:
            near = difflib.get_close_matches(key, shown, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "keys here: " + ", ".join(sorted(shown))
            problems.append(f"{where}: unknown key '{prefix}{key}'; {hint}")
        elif name in values:
            problems.append(f"{where}: key '{prefix}{key}' is given twice")
        else:
            at = f"{source}:{value_node.start_mark.line + 1}"
            values[name] = _value(hints[name], fields[name], value_node, at, prefix + key, source, problems)
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in values:
            problems.append(f"{source}: the key '{prefix}{name}' is missing")
    return None if problems else cls(**values)


def _value(hint: Any, f: dataclasses.Field, node: yaml.Node, at: str, key: str, source: str, problems: list[str]):
    """One field's value, checked against its annotation and its range."""
    if dataclasses.is_dataclass(hint):
        return build(hint, node, source, key + ".", problems)
    loader = yaml.SafeLoader("")
    try:
        raw = loader.construct_object(node, deep=True)
    except Exception as error:  # a tag such as !!timestamp raises whatever its parser trips over
        problems.append(f"{at}: {key}: cannot be read as YAML ({type(error).__name__}: {str(error)[:100]})")
        return None
    try:
        read = f.metadata.get("read")
        value = read(raw) if read else _coerce(hint, raw)
    except RecipeError as error:
        problems.append(f"{at}: {key}: {error}")
        return None
    except (TypeError, ValueError, OverflowError) as error:
        problems.append(f"{at}: {key} is {_short.repr(raw)}; wanted {error}")
        return None
    limits = f.metadata
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "above" in limits:
        above, least, most = limits["above"], limits["least"], limits["most"]
        if (above is not None and value <= above) or (least is not None and value < least):
            problems.append(f"{at}: {key} is {value}; wanted {'more than' if above is not None else 'at least'} "
                            f"{above if above is not None else least}")
        if most is not None and value > most:
            problems.append(f"{at}: {key} is {value}; wanted at most {most}")
    return value


def _coerce(hint: Any, raw: Any) -> Any:
    """`raw` as the annotated type; raises ValueError whose text says what was wanted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if raw is None else _coerce(next(a for a in args if a is not type(None)), raw)
    if origin is Literal:
        if raw not in args:
            raise ValueError("one of " + ", ".join(map(str, args)))
        return raw
    if origin is tuple:
        if not isinstance(raw, list) or (Ellipsis not in args and len(raw) != len(args)):
            raise ValueError("a list" if Ellipsis in args else f"a list of {len(args)} numbers")
        return tuple(_coerce(args[0], item) for item in raw)
    if hint is float and isinstance(raw, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}", raw):
        return float(raw)  # YAML 1.1 takes 1e-3 for a text
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool) and abs(raw) < 1e300:
        return float(raw)
    if hint is str and isinstance(raw, (str, int, float)) and not isinstance(raw, bool):
        return str(raw)
    if hint in (int, bool) and type(raw) is hint:
        return raw
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    raise ValueError(names[hint])
