"""Damage: bytes, JSON and text, changed at random. The same dice give the same damage."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 63, 64, 255, 4096, 10**6, 10**9, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e16, 1e308, math.inf, -math.inf, math.nan, True, False,
]  # fmt: skip
TEXTS = [
    "", " ", "a", "auto", "null", "true", "0", "-1", "1e999", "NaN", "x" * 300, "x" * 5000, "\x00", "\x1b[2J",
    "\ud800", "é", "字", "🙂", "\u202e", "..", "../..", "../secret.safetensors", "/etc/passwd", "/dev/zero", "~",
    "~root", "~nobody!", "C:\\x", "a/b", "file:///etc/passwd", "{{ 7 * 7 }}", "{% for %}", "%s%n", "<think>",
    "</think>", "__metadata__", "F32", "BF16", "U8", "F4", "llama", "qwen3", "gpt2", "config.json", "model.safetensors",
    "org/model", "dtype",
]  # fmt: skip
_SNIPPETS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud800", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n",
             b"\t", b"-", b"0", b"9" * 30, b"1e999", b"NaN", b"null", b"true", b"[" * 3000, b'{"a":' * 300, b"&a ",
             b"*a", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"---\n", b"# ", b"? ", b"| ", b"\r",
             b"\x85"]  # fmt: skip


def leaf(dice: random.Random) -> Any:
    """A value that nobody expects."""
    kind = dice.randrange(8)
    if kind < 3:
        return dice.choice(NUMBERS)
    if kind < 6:
        return dice.choice(TEXTS)
    deep: Any = dice.choice([None, [], {}, [[]], [1], ["a"], {"a": 1}, [None] * 70, {"": {}}])
    for _ in range(dice.choice([0, 0, 1, 3, 40])):
        deep = [deep] if dice.random() < 0.5 else {"a": deep}
    return deep


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found.append((*path, key))
        if len(path) < 8:
            found += _places(inner, (*path, key))
    return found


def mutate_value(value: Any, dice: random.Random) -> Any:
    """A JSON value with one of its nodes replaced, dropped, renamed, doubled, swapped or nudged. Not in place."""
    value = json.loads(json.dumps(value))
    places = _places(value)
    if not places or dice.random() < 0.01:
        return leaf(dice)
    *parents, key = dice.choice(places)
    owner = value
    for step in parents:
        owner = owner[step]
    how = dice.randrange(7)
    old = owner[key]
    if type(old) in (int, float) and dice.random() < 0.5:  # sizes and limits: most of what a program believes
        owner[key] = dice.choice(NUMBERS)
        return value
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, dict):  # renamed, in place: the order of keys stays
        new = dice.choice([str(leaf(dice))[:400], key[:-1], key + "s", key.upper(), dice.choice(list(owner))])
        pairs = [(new if k == key else k, v) for k, v in owner.items()]
        owner.clear()
        owner.update(pairs)
    elif how == 2 and isinstance(owner, list):
        owner.insert(dice.randrange(len(owner) + 1), dice.choice([old, leaf(dice)]))
    elif how == 3:  # the value of another place
        *elsewhere, last = dice.choice(places)
        other = value
        for step in elsewhere:
            other = other[step]
        owner[key] = json.loads(json.dumps(other[last]))
    elif how == 4:  # another type for the same content
        owner[key] = dice.choice([[old], {"a": old}, str(old), None, bool(old), [old, old]])
    elif how == 5 and type(old) in (int, float) and abs(old) < 2**64:
        owner[key] = dice.choice([old + 1, old - 1, -old, old * 2, str(old), [old]])
    else:
        owner[key] = leaf(dice)
    return value


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to four of: bit flips, cuts, copies, insertions, splices, other numbers."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at, size = dice.randrange(len(out) + 1), dice.choice([1, 2, 8, 40, 400])
        how = dice.randrange(8)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at : at + size]
        elif how == 3:
            out[at:at] = out[at : at + size]
        elif how == 4:
            out[at:at] = dice.choice(_SNIPPETS)
        elif how == 5:  # a piece from elsewhere
            begin = dice.randrange(len(out) + 1)
            out[at : at + size] = out[begin : begin + size]
        elif how == 6 and at < len(out):
            out[at] = dice.randrange(256)
        else:
            found = list(re.finditer(rb"\d+(\.\d+)?", bytes(out)))
            if found:
                one = dice.choice(found)
                out[one.start() : one.end()] = _number(dice)
    return bytes(out)


def _number(dice: random.Random) -> bytes:
    value = dice.choice(NUMBERS)
    return json.dumps(value).encode()


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    """A JSON text: its structure (1 to 3 nodes) twice as often as its bytes."""
    if dice.random() < 0.35:
        return mutate_bytes(data, dice)
    value = json.loads(data)
    for _ in range(dice.choice([1, 1, 2, 3])):
        value = mutate_value(value, dice) if isinstance(value, (dict, list)) else leaf(dice)
    return json.dumps(value, ensure_ascii=dice.random() < 0.7).encode("utf-8", "surrogatepass")


def mutate_lines(data: bytes, dice: random.Random) -> bytes:
    """JSON Lines: one line as JSON, or the lines' order and number, or bytes."""
    lines = data.splitlines()
    how = dice.randrange(4)
    if how < 2:
        at = dice.randrange(len(lines))
        lines[at] = mutate_json(lines[at], dice)
    elif how == 2:
        at = dice.randrange(len(lines))
        lines[at : at + 1] = dice.choice([[], [lines[at]] * 2, [b""], [b"null"], lines[:1], [lines[at][:-1]]])
    else:
        return mutate_bytes(data, dice)
    return b"\n".join(lines) + b"\n"


def mutate_header(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file: header as JSON (with its length put right), the length, the header's bytes, or the data."""
    length = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + length], data[8 + length :]
    how = dice.randrange(10)
    if how < 5:
        head = mutate_json(head, dice)
    elif how < 7:
        head = mutate_bytes(head, dice)
    elif how == 7:
        return dice.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, dice.randrange(10**6)]).to_bytes(
            8, "little") + head + body  # fmt: skip
    elif how == 8:
        body = mutate_bytes(body, dice)
    else:
        return mutate_bytes(data, dice)
    return len(head).to_bytes(8, "little") + head + body


def mutate_yaml(data: bytes, dice: random.Random) -> bytes:
    """A YAML text: structure by way of JSON (which is YAML), lines, or bytes."""
    import yaml

    how = dice.randrange(4)
    if how < 2:
        value = yaml.safe_load(data)
        for _ in range(dice.choice([1, 1, 2, 3])):
            value = mutate_value(value, dice) if isinstance(value, (dict, list)) else leaf(dice)
        if how == 0:
            return json.dumps(value).encode("utf-8", "surrogatepass")
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    if how == 2:
        lines = data.splitlines()
        at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
        given = lines[at].partition(b":")[0] + b": " + str(leaf(dice)).encode("utf-8", "replace")
        changed = [lines[other], b"  " + lines[at], lines[at].lstrip(), lines[at] + b" &a", b"<<: *a", given]
        lines[at] = dice.choice(changed)
        return b"\n".join(lines) + b"\n"
    return mutate_bytes(data, dice)
