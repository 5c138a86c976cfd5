"""The added tokens of two models side by side: ids that stand for different tokens in the parents of a merge.

A base and the reasoning model made from it often share a vocabulary size and not the meaning of its last ids. A merge
keeps the LRM's tokenizer and embeddings, so it is right all the same; but what the ITM learned about its own tokens (of
a chat template, say) does not come along, and its user should know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .io.header import JSON_LIMIT

_SHOWN = 3


def added_tokens(folder: Path) -> dict[int, str]:
    """id -> token, of those that tokenizer.json adds to its vocabulary; {} where there is no such file or list.

    The list stands before the vocabulary of megabytes, which is not parsed.
    """
    try:
        with open(folder / "tokenizer.json", "rb") as file:
            text = file.read(JSON_LIMIT).decode("utf-8", errors="replace")
        start = text.index("[", text.index('"added_tokens"'))
        listed: Any = json.JSONDecoder().raw_decode(text, start)[0]
        return {token["id"]: token["content"] for token in listed if isinstance(token["id"], int)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # whoever needs the tokenizer says what is wrong with it


def other_meanings(lrm: Path, other: Path) -> str:
    """A sentence on ids that both models add and that stand for different tokens; '' where there are none."""
    mine, theirs = added_tokens(lrm), added_tokens(other)
    differ = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
    if not differ:
        return ""
    shown = ", ".join(f"{i} is {str(theirs[i])[:40]!r} there and {str(mine[i])[:40]!r} in the LRM"
                      for i in differ[:_SHOWN])  # fmt: skip
    more = f", and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    return f"stands for other tokens at {len(differ)} ids: {shown}{more}; the LRM's tokenizer and embeddings are kept"
