"""Every flag by its environment variable: STREAMMERGE_HOST_MEMORY=16GiB is --host-memory 16GiB.

For containers and pipelines, whose commands are fixed and whose settings are not. The command line wins over the
environment, the environment over the recipe. An empty variable counts as not set; a switch takes yes or no.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

PREFIX = "STREAMMERGE_"
_YES, _NO = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags take their defaults from the environment. Subcommands are of this class too."""

    variables: ClassVar[set[str]] = set()  # of every flag of every command

    def __init__(self, *args: Any, **settings: Any):
        self._unfit: list[str] = []
        super().__init__(*args, **settings)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse's."""
        action = super().add_argument(*names, **settings)
        name = variable(action)
        self.variables.update(filter(None, [name]))
        raw = os.environ.get(name, "") if name else ""
        if raw:
            try:
                action.default = _value(action, raw)
                action.required = False
            except (argparse.ArgumentTypeError, ValueError) as error:
                self._unfit.append(f"{name}: {error}")
        return action

    def parse_known_args(self, *args: Any, **settings: Any) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; a variable that does not fit one of this command's flags is a mistake of usage."""
        if self._unfit:
            self.error("; ".join(self._unfit))
        return super().parse_known_args(*args, **settings)


def variable(action: argparse.Action) -> str:
    """The environment variable of a flag; '' for what is none, such as OUT and --help."""
    long = next((n for n in action.option_strings if n.startswith("--")), "")
    if not long or action.default == argparse.SUPPRESS:  # --help and --version have no value
        return ""
    return PREFIX + long.removeprefix("--").replace("-", "_").upper()


def _value(action: argparse.Action, raw: str) -> Any:
    """What the flag would have made of the text. ValueError, or what the flag's type raises, where it is none."""
    if action.nargs == 0:
        if raw.lower() not in _YES | _NO:
            raise ValueError(f"{raw!r}: wanted {', '.join(sorted(_YES))} or {', '.join(sorted(_NO))}")
        return raw.lower() in _YES
    value = action.type(raw) if callable(action.type) else raw
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{raw!r}: choose from {', '.join(map(str, action.choices))}")
    return value


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line for every variable with our prefix that is no flag of any command, with the nearest that is."""
    told, known = [], Parser.variables
    for name in sorted(n for n in environ if n.startswith(PREFIX) and n not in known and environ[n]):
        near = difflib.get_close_matches(name, known, 1)
        told.append(f"{name} is no flag of streammerge" + (f"; did you mean {near[0]}?" if near else ""))
    return told
