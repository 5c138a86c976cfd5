"""The licence of a merge, from what its inputs say of theirs: the metadata of a card, or the text of a LICENSE.

Nothing is guessed. Among permissive licences the one with the most conditions stands for all; a single other licence
stands for itself; where two others meet, or an input does not say, the card says that instead of a licence. What a
licence asks of whoever publishes (a notice, a name) is theirs to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..io.checkpoint import Checkpoint, bad_file
from ..strict import read_limited

_CARD_LIMIT = 4 << 20  # bytes of a card; its metadata are the first few
_TEXT_LIMIT = 1 << 20
_FILES = ("license", "licence", "notice", "copying", "use_policy", "usage_policy")  # beginnings of names
# by how much they ask for: nothing; the text; the text, the notices and what was changed
_PERMISSIVE = (
    ("cc0-1.0", "unlicense", "0bsd", "wtfpl", "zlib"),
    ("mit", "isc", "bsd-2-clause", "bsd-3-clause", "bsd", "ncsa", "postgresql"),
    ("apache-2.0",),
)
_TEXTS = {  # how the text of a licence begins, blanks made one
    r"apache license,? version 2\.0": "apache-2.0",
    r"(the )?mit license|permission is hereby granted, free of charge, to any person obtaining a copy": "mit",
}


@dataclass(frozen=True)
class Stated:
    """What one input says: `licence` is the Hub's identifier, '' where nothing was found; `files` are its licence's."""

    licence: str = ""
    name: str = ""  # of a licence that has no identifier, where `licence` is 'other'
    link: str = ""
    source: str = ""  # the file that says so
    files: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """The licence as one would say it."""
        return f"{self.licence} ({self.name})" if self.name else self.licence


@dataclass(frozen=True)
class Licence:
    """Of the merge: keys of a card's metadata, and a sentence that says where they come from."""

    metadata: Mapping[str, str]
    why: str


def stated(checkpoint: Checkpoint) -> Stated:
    """What an input says of its licence; nothing is an answer, too. Files that leave its directory are not read."""
    folder = checkpoint.path
    found = [p.name for p in folder.iterdir() if p.name.lower().startswith(_FILES) and not bad_file(folder, p.name)]
    files = tuple(sorted(n for n in found if (folder / n).is_file()))
    card = _metadata(folder)
    licence = card.get("license")
    licence = licence[0] if isinstance(licence, list) and len(licence) == 1 else licence
    if isinstance(licence, str) and re.fullmatch(r"[A-Za-z0-9.+_-]{1,60}", licence):
        more = {key: card[f"license_{key}"] for key in ("name", "link") if _plain(card.get(f"license_{key}"))}
        return Stated(licence.lower(), more.get("name", ""), more.get("link", ""), "README.md", files)
    texts = [name for name in files if name.lower().startswith(("licen", "copying"))]
    known = {_recognised(folder / name) for name in texts}
    if len(known) == 1 and "" not in known:  # a licence of the code beside one of the weights tells nothing
        return Stated(known.pop(), source=texts[0], files=files)
    return Stated(files=files)


def of_merge(inputs: Mapping[str, Stated], donor: str) -> Licence:
    """The licence of a merge of `inputs` ({shown name: what it says}); `donor`: whose licence files are copied."""
    rank = {name: n for n, names in enumerate(_PERMISSIVE) for name in names}
    each = "; ".join(f"{name}: {found.told or 'not stated'}" for name, found in inputs.items())
    silent = [name for name, found in inputs.items() if found.licence in ("", "unknown")]
    if silent:
        why = f"Nothing was found about the licence of {_and(silent)}, so none is given for the merge ({each})."
        return Licence({"license": "unknown"}, why)
    named = {(found.licence, found.name or found.link or found.licence == "other" and shown): found
             for shown, found in inputs.items()}  # fmt: skip
    strict = [found for found in named.values() if found.licence not in rank]
    if len(strict) > 1:
        why = (f"The inputs have licences that are not known to go together ({each}): whoever publishes this merge has "
               "to see what they allow.")  # fmt: skip
        return Licence({"license": "other", "license_name": "undetermined"}, why)
    chosen = strict[0] if strict else max(named.values(), key=lambda found: (rank[found.licence], found.licence))
    metadata = {"license": chosen.licence}
    if chosen.licence == "other":
        metadata["license_name"] = chosen.name or "undetermined"
        link = next((n for n in inputs[donor].files if n.lower().startswith("licen")), "") or chosen.link
        metadata |= {"license_link": link} if link else {}
    if len(named) == 1:
        return Licence(metadata, f"The licence of all inputs ({each}).")
    return Licence(metadata, f"The inputs' licence that asks for the most ({each}); the notices of the others go with "
                             "it.")  # fmt: skip


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> bool:
    """A short line of text: what a card of somebody else may put into ours."""
    return isinstance(value, str) and bool(value.strip()) and len(value) <= 200 and value.isprintable()


def _metadata(folder: Path) -> dict[str, Any]:
    """The YAML at the head of README.md, {} where there is none that can be read."""
    if bad_file(folder, "README.md"):
        return {}
    try:
        text = read_limited(folder / "README.md", _CARD_LIMIT, "utf-8-sig")
        found = re.match(r"---\s*\n(.{0,65536}?)\n---\s*(\n|$)", text, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # somebody else's card may be anything
        return {}
    return data if isinstance(data, dict) else {}


def _recognised(file: Path) -> str:
    """The identifier of a licence by its text, '' where it is none of the few that are known."""
    try:
        text = re.sub(r"[\s#*]+", " ", read_limited(file, _TEXT_LIMIT)).strip().lower()
    except (OSError, ValueError):
        return ""
    return next((known for pattern, known in _TEXTS.items() if re.match(pattern, text)), "")
