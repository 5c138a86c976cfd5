"""YAML into frozen dataclasses, strictly: what the fields and their annotations do not allow is an error.

Every mistake is appended to a list with its file and line, none is raised, so that one run shows all of them. A
field's annotation is its type (bool, int, float, str, Literal, tuple, an optional, another dataclass); `setting` adds
a range, a notation of its own, or another name in YAML.

`compose` comes first: YAML lets a page of text stand for gigabytes (aliases of aliases) or for a stack overflow
(nesting), so a document is limited in length, depth and written-out size before a value is constructed from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import RecipeError

TEXT_LIMIT = 256_000  # characters; PyYAML reads some 100 kB a second
_DEPTH, _NODES = 32, 20_000
_WORDS = 2**63  # whole numbers end up in tensors' sizes and seeds


class _Shallow(yaml.SafeLoader):
    """Refuses what is nested deeper than _DEPTH while it is read, long before the interpreter's own stack ends."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > _DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(text: str, source: str) -> yaml.MappingNode:
    """A YAML text -> its top mapping, not yet constructed. RecipeError for anything else, and for what is too much."""
    if len(text) > TEXT_LIMIT:
        raise RecipeError(f"{source}: holds {len(text)} characters, a recipe has at most {TEXT_LIMIT}: is this the "
                          "right file?")
    try:
        node = yaml.compose(text, Loader=_Shallow)
        nodes = _written_out(node, {}) if node else 0
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values; see `streammerge merge --help`")
    if nodes > _NODES:
        raise RecipeError(f"{source}: its aliases stand for more than {_NODES} values; write the values out")
    return node


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes this one stands for when every alias is replaced by a copy of what it names."""
    if sizes.get(id(node)) == 0:
        raise yaml.MarkedYAMLError(problem="a value that contains itself", problem_mark=node.start_mark)
    if id(node) not in sizes:
        sizes[id(node)] = 0  # being counted
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]


def read_limited(path: Path, limit: int, encoding: str = "utf-8") -> str:
    """The text of a regular file of at most `limit` bytes. OSError where it is no such file (a pipe would wait for
    ever, a device never end), UnicodeDecodeError where it is not text."""
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):  # open() says what is wrong with these
        with open(path, "rb") as stream:
            raw = stream.read(limit + 1)
        if len(raw) <= limit:
            return raw.decode(encoding)
        raise OSError(errno.EFBIG, f"it holds more than {limit} bytes", str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def setting(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    read: Callable[[Any], Any] | None = None,
    name: str | None = None,
    hidden: bool = False,
    node: Callable[[yaml.Node, str, str, list[str]], Any] | None = None,
) -> Any:
    """A field with a range (`above` is exclusive), a reader for its own notation, or a name of its own in YAML.

    `read` takes what YAML gives and raises ValueError whose text says what was wanted. `node` takes what `build` takes
    after its class, for values with keys and lines of their own. A hidden field is no key.
    """
    told = {"above": above, "least": least, "most": most, "read": read, "name": name, "hidden": hidden, "node": node}
    return field(default=default, metadata=told)


_short = reprlib.Repr()  # of a value in a message: a few aliases can make one whose repr is gigabytes
_short.maxlevel, _short.maxstring, _short.maxother = 2, 60, 60


def _shown(value: Any) -> str:
    try:
        return _short.repr(value)
    except ValueError:  # CPython writes out no number of more than 4300 digits
        return "a number of thousands of digits"


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
            problems.append(f"{where}: unknown key '{prefix}{key[:80]}'; {hint}")
        elif name in values:
            problems.append(f"{where}: key '{prefix}{key}' is given twice")
        else:
            at = f"{source}:{value_node.start_mark.line + 1}"
            values[name] = _value(hints[name], fields[name], value_node, at, prefix + key, source, problems)
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in values:
            problems.append(f"{source}: the key '{prefix}{name}' is missing")
    return None if problems else cls(**values)


def construct(node: yaml.Node, where: str, problems: list[str]) -> Any:
    """A node's plain value; None, and a problem that begins with `where`, if it has none."""
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except Exception as error:  # a tag such as !!timestamp raises whatever its parser trips over
        problems.append(f"{where}: cannot be read as YAML ({type(error).__name__}: {str(error)[:100]})")
        return None


def _value(hint: Any, f: dataclasses.Field, node: yaml.Node, at: str, key: str, source: str, problems: list[str]):
    """One field's value, checked against its annotation and its range."""
    if f.metadata.get("node"):
        return f.metadata["node"](node, source, key, problems)
    if dataclasses.is_dataclass(hint):
        return build(hint, node, source, key + ".", problems)
    before = len(problems)
    raw = construct(node, f"{at}: {key}", problems)
    if len(problems) > before:
        return None
    try:
        read = f.metadata.get("read")
        value = read(raw) if read else _coerce(hint, raw)
    except RecipeError as error:
        problems.append(f"{at}: {key}: {error}")
        return None
    except (TypeError, ValueError, OverflowError) as error:
        problems.append(f"{at}: {key} is {_shown(raw)}; wanted {error}")
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


def _text(raw: str | int | float) -> str:
    """A scalar as text that files and terminals can hold; a number of thousands of digits raises ValueError itself."""
    text = str(raw)
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("a text without NUL and surrogate characters")
    return text


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
        return _text(raw)
    if hint in (int, bool) and type(raw) is hint and abs(raw) < _WORDS:
        return raw
    names = {int: "a whole number below 2**63", float: "a finite number", bool: "true or false", str: "a text"}
    raise ValueError(names[hint])
