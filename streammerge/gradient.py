"""Parameters that differ from layer to layer and from tensor to tensor, in mergekit's notation and with its meaning.

A setting is one of
- a scalar: the same everywhere;
- a list of scalars: a gradient over the layers. With t = layer / (layers − 1), and t = 1 where there is one layer, t is
  scaled to the list and its neighbours are interpolated linearly; what is no number (true, a text) is selected, not
  interpolated. Tensors outside of the layers have t = 0: they take the first element;
- {filter: TEXT, value: …}, or a list of these: the first whose filter occurs in the tensor's name decides. `*` and no
  filter fit every name; the value is a scalar or a gradient.

Where no filter fits, or a list is empty, there is no value: None. Facts from mergekit 0.1.5, whose own answers
tests/test_gradient.py holds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Choice:
    """The value of tensors whose names contain `filter`; None and '*': of every tensor."""

    filter: str | None
    value: Scalar | tuple[Scalar, ...]

    def fits(self, name: str) -> bool:
        """Whether a tensor of this name takes the value."""
        return self.filter in (None, "*") or (bool(name) and self.filter in name)


Setting = Scalar | tuple[Scalar, ...] | tuple[Choice, ...]

_WANTED = "a value, a list of values (a gradient over the layers), or {filter: TEXT, value: …} and lists of these"


def read_setting(raw: Any, convert: Callable[[Any], Any] | None = None) -> Setting:
    """What YAML gives -> a setting. `convert` checks each scalar and raises ValueError (as below, or a range of one's
    own); it is applied for the error alone, the setting keeps what was written. Raises ValueError that says what was
    wanted."""
    if isinstance(raw, dict):
        return (_choice(raw, convert),)
    if isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
        return tuple(_choice(item, convert) for item in raw)
    return _values(raw, convert)


def _choice(raw: dict, convert: Callable[[Any], Any] | None) -> Choice:
    unknown = [str(key) for key in raw if key not in ("filter", "value")]
    if unknown or "value" not in raw:
        found = f"unknown key {unknown[0][:40]!r}" if unknown else "no value"
        raise ValueError(f"{{filter: TEXT, value: …}} in each item (found: {found})")
    wanted = raw.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise ValueError(f"a text as filter (found: {str(wanted)[:40]})")
    return Choice(wanted, _values(raw["value"], convert))


def _values(raw: Any, convert: Callable[[Any], Any] | None) -> Scalar | tuple[Scalar, ...]:
    """A scalar or a gradient."""
    for item in raw if isinstance(raw, list) else [raw]:
        if not isinstance(item, (bool, int, float, str)):
            raise ValueError(_WANTED)
        if convert:
            convert(item)
    return tuple(raw) if isinstance(raw, list) else raw


def read_numbers(raw: Any, wanted: str, above: float, most: float = 1e300) -> Setting:
    """`read_setting` for a number of one's own recipes: in a range, never true or false, and no list is empty. A number
    alone becomes a float. Raises ValueError with `wanted`."""

    def number(value: Any) -> float:
        with contextlib.suppress(ValueError):
            found = to_float(value)
            if above < found <= most and not isinstance(value, bool):
                return found
        raise ValueError(wanted)

    if not isinstance(raw, (list, dict)):
        return number(raw)
    found = read_setting(raw, number)
    if not found or any(isinstance(item, Choice) and item.value == () for item in found):
        raise ValueError(f"{wanted}, or a list that is not empty")
    return found


def resolve(setting: Setting, name: str, t: float, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """The setting's value for a tensor, through `convert` (to_float, to_int…); None where it has none.

    `t` in [0, 1] is `place` of the tensor's layer. Raises ValueError of `convert`.
    """
    if not isinstance(setting, tuple):
        return convert(setting)
    if setting and isinstance(setting[0], Choice):
        fitting = next((choice for choice in setting if choice.fits(name)), None)
        return None if fitting is None else resolve(fitting.value, name, t, convert)
    if not setting:
        return None
    values, scaled = [convert(item) for item in setting], t * (len(setting) - 1)
    first = int(scaled)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return values[first]
    second, share = min(len(values) - 1, first + 1), scaled - first
    return convert((1 - share) * values[first] + share * values[second])


def scalars(setting: Setting) -> list[Scalar]:
    """Every scalar that a setting is made of, in its order."""
    if not isinstance(setting, tuple):
        return [setting]
    return [value for item in setting for value in (scalars(item.value) if isinstance(item, Choice) else [item])]


def written(setting: Setting) -> Any:
    """The setting as YAML would have it: the inverse of `read_setting`."""
    if not isinstance(setting, tuple):
        return setting
    return [
        ({"filter": item.filter} if item.filter is not None else {}) | {"value": written(item.value)}
        if isinstance(item, Choice)
        else item
        for item in setting
    ]


def shown(setting: Any) -> str:
    """A setting as YAML has it, in short: '0.5', '0 to 1 by layer', 'mlp: 0.5; *: 0 to 1 by layer'."""
    if isinstance(setting, dict):
        return f"{'*' if setting.get('filter') is None else setting['filter']}: {shown(setting['value'])}"
    if not isinstance(setting, list):
        return str(setting)
    if any(isinstance(item, dict) for item in setting):
        return "; ".join(map(shown, setting))
    return " to ".join(map(str, setting)) + " by layer"


def place(layer: int, layers: int) -> float:
    """t of a layer, counted from the first of a slice, among `layers`."""
    return layer / (layers - 1) if layers > 1 else 1.0


# What mergekit takes for a scalar of a type, where YAML gives another (it validates with pydantic). Infinity, NaN and
# numbers of hundreds of digits, which it takes too, are refused here.

_WHOLE = re.compile(r"[+-]?\d+(_\d+)*(\.0+)?")
_WHOLE_WANTED = "a whole number below 2**63"
_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*\.?(\d+(_\d+)*)?|\.\d+(_\d+)*)([eE][+-]?\d+)?")
_TRUE, _FALSE = {"1", "true", "t", "yes", "y", "on"}, {"0", "false", "f", "no", "n", "off"}


def to_float(value: Any) -> float:
    """A finite number, true and false as 1 and 0, or a text such as '1e-3', which YAML 1.1 takes for no number."""
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and _NUMBER.fullmatch(value.strip())):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            if abs(number := float(value)) < float("inf"):
                return number
    raise ValueError("a finite number")


def to_int(value: Any) -> int:
    """A whole number, also one that is written as 2.0, as a text, or as true."""
    if isinstance(value, str) and not _WHOLE.fullmatch(value.strip()):
        raise ValueError(_WHOLE_WANTED)
    number = to_float(value)
    if not number.is_integer() or abs(number) >= 2**63:
        raise ValueError(_WHOLE_WANTED)
    return int(value) if isinstance(value, (bool, int)) else int(number)


def to_bool(value: Any) -> bool:
    """true or false, or one of the words and numbers that stand for them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError("true or false")


def to_text(value: Any) -> str:
    """A text; nothing else is one."""
    if not isinstance(value, str):
        raise ValueError("a text")
    return value
