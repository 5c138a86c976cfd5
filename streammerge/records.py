"""The two calibration files, read as the authors wrote them and checked key by key (method.md, sections 2 and 3).

JSON and JSON Lines are told apart by content. Mistakes are collected, not raised, so that one run shows all of them;
the text of a span is looked up here already, before any tokenizer comes in.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .io.header import unique_keys
from .strict import read_limited

FILE_LIMIT = 256 << 20  # bytes: a thousand times the authors' sets, and what parsing may take is a multiple of it
Kind = Literal["reasoning", "instruction"]
_TEXTS = {"reasoning": ("prompt", "reasoning", "response"), "instruction": ("prompt", "reason", "response")}
_SPAN_KEYS = ("prompt_spans", "response_spans", "unrelated_response_spans")


@dataclass(frozen=True)
class Spans:
    """One instruction's spans, as texts."""

    name: str
    prompt: tuple[str, ...]
    response: tuple[str, ...]
    unrelated: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """One sample of either set. `thinking` is the key `reasoning` of one and `reason` of the other."""

    index: int  # place in the file: seeds of a sample's random positions depend on nothing else
    sample_id: str
    where: str  # for messages: file, sample id, line or item
    prompt: str
    thinking: str
    response: str
    instructions: tuple[Spans, ...] = ()
    unrelated: tuple[str, ...] = ()


def read_set(path: str, kind: Kind, limit: int | None, problems: list[str]) -> list[Record]:
    """The first `limit` samples of a calibration file; whatever is wrong is appended to `problems`."""
    start = len(problems)
    items = _items(path, f"calibration.{kind}", problems)
    if len(problems) > start:
        return []
    if not items:
        problems.append(f"{path}: the set of calibration.{kind} is empty; wanted a list of samples")
        return []
    if _swapped(items[0][1], kind):
        other = "an instruction" if kind == "reasoning" else "a reasoning"
        keys = _keys(items[0][1])
        problems.append(f"{path}: given as calibration.{kind}, but this is {other} set (its samples have the keys "
                        f"{keys}); are the two files of the recipe exchanged?")
        return []
    records = [_record(path, kind, n, place, item, problems) for n, (place, item) in enumerate(items[:limit])]
    return [record for record in records if record is not None]


def _items(path: str, key: str, problems: list[str]) -> list[tuple[str, Any]]:
    """(place in the file, parsed value) of each sample; the place is a line of JSONL or an item of a JSON list."""
    try:
        text = read_limited(Path(path), FILE_LIMIT, "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: {key} cannot be read ({error}); wanted a JSON or JSON Lines file in UTF-8")
        return []
    try:
        data = _parsed(text)
    except ValueError as error:
        whole_file = f"{path}: {key} is neither JSON nor JSON Lines ({error})"
    else:
        if isinstance(data, list):
            return [(f"item {n}", item) for n, item in enumerate(data, 1)]
        if isinstance(data, dict) and "prompt" in data:
            return [("line 1", data)]  # JSON Lines of one sample
        found = f"one object with the keys {_keys(data)}" if isinstance(data, dict) else _type(data)
        problems.append(f"{path}: {key} holds {found}; wanted a list of samples, or one sample a line")
        return []
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines or lines[0][1].lstrip()[:1] != "{":  # begun like a JSON list: the error of the whole file tells more
        if lines:
            problems.append(whole_file)
        return []
    items = []
    for n, line in lines:
        try:
            items.append((f"line {n}", _parsed(line)))
        except ValueError as error:
            problems.append(f"{path}, line {n}: not JSON ({error}); wanted one sample a line")
    return items


def _parsed(text: str) -> Any:
    """JSON in which no key is given twice. ValueError that says what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _swapped(item: Any, kind: Kind) -> bool:
    if not isinstance(item, dict):
        return False
    if kind == "reasoning":
        return "reasoning" not in item and "related_prompt_list" in item
    return "related_prompt_list" not in item and "reasoning" in item


def _record(path: str, kind: Kind, index: int, place: str, item: Any, problems: list[str]) -> Record | None:
    """One checked sample, or None with what is wrong in `problems`."""
    start = len(problems)
    if not isinstance(item, dict):
        problems.append(f"{path}, {place}: {_type(item)}; wanted an object with a sample's keys")
        return None
    sample_id = _name(item.get("sample_id", item.get("id", index)))
    where = f"{path}, sample {sample_id} ({place})"
    for key in _TEXTS[kind]:
        if not isinstance(item.get(key), str):
            problems.append(f"{where}: {_missing(item, key)}; wanted a text")
        elif not _is_unicode(item[key]):
            problems.append(f"{where}: {key!r} holds half a surrogate pair (\\ud800 to \\udfff), no character; wanted "
                            "a text that a tokenizer can read")
    if isinstance(item.get("prompt"), str) and not item["prompt"].strip():
        problems.append(f"{where}: 'prompt' is empty; wanted the user's message")
    instructions: tuple[Spans, ...] = ()
    unrelated: tuple[str, ...] = ()
    if kind == "instruction":
        instructions = tuple(_instructions(item, where, problems))
        unrelated = _texts(item, "unrelated_response_spans", where, problems)
    if len(problems) > start:
        return None
    record = Record(index, sample_id, where, *(item[key] for key in _TEXTS[kind]), instructions, unrelated)
    problems.extend(_lost_spans(record))
    return record


def _instructions(item: dict, where: str, problems: list[str]) -> Iterator[Spans]:
    entries = item.get("related_prompt_list")
    if not isinstance(entries, list):
        problems.append(f"{where}: {_missing(item, 'related_prompt_list')}; wanted a list of instructions")
        return
    for n, entry in enumerate(entries, 1):
        at = f"{where}, instruction {n}"
        if not isinstance(entry, dict):
            problems.append(f"{at}: {_type(entry)}; wanted an object with {', '.join(_SPAN_KEYS)}")
            continue
        yield Spans(_name(entry.get("instruction_id", n)), *(_texts(entry, key, at, problems) for key in _SPAN_KEYS))


def _texts(item: dict, key: str, where: str, problems: list[str]) -> tuple[str, ...]:
    value = item.get(key)
    if isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value):
        return tuple(value)
    found = "holds entries that are empty or no text" if isinstance(value, list) else ""
    problems.append(f"{where}: {f'{key!r} {found}' if found else _missing(item, key)}; wanted a list of texts")
    return ()


def _lost_spans(record: Record) -> Iterator[str]:
    """A line for each span that is not in the text it is said to be from."""
    listed = [(record.unrelated, "unrelated_response_spans", "response", "")]
    for n, spans in enumerate(record.instructions, 1):
        listed += [(spans.prompt, "prompt_spans", "prompt", f", instruction {n}"),
                   (spans.response, "response_spans", "response", f", instruction {n}"),
                   (spans.unrelated, "unrelated_response_spans", "response", f", instruction {n}")]
    for texts, key, part, which in listed:
        for span in texts:
            if span not in getattr(record, part):
                short = span if len(span) <= 60 else span[:57] + "…"
                yield f"{record.where}{which}: {key} has {short!r}, which is not in the {part}"


def _is_unicode(text: str) -> bool:
    """JSON's escapes can spell halves of surrogate pairs, which UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _name(value: Any) -> str:
    """The name of a sample or instruction as messages and the report show it."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= 80 else text[:79] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _keys(item: dict) -> str:
    names = sorted(item)
    return ", ".join(_name(name) for name in names[:6]) + (", …" if len(names) > 6 else "")


def _missing(item: dict, key: str) -> str:
    return f"{key!r} is {_type(item[key])}" if key in item else f"the key {key!r} is missing"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
