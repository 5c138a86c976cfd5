"""Verifiable checks of one answer: is the format constraint obeyed, is the answer right.

What: `follows(name, text)` for six constraints and `answer_is_right(text, answer)`.
Holds in memory: nothing but the text that it is given.
Why this way: the checks are strict and blind to each other.  A reply can obey the format and be wrong, or be right and
ignore the format; the evaluator reports both, and their conjunction.  Nothing here knows how the prompts were worded,
so the world that generates them (benchmarks/world.py) cannot leak into the judgement.
"""

from __future__ import annotations

import re
from collections.abc import Callable

THINK_CLOSE = "</think>"

# A statement is what every task's answer sentence looks like: "The sum is 85." -> "85".
_STATEMENT = re.compile(r"\bthe (?:sum|order|count|largest|animal) is ([^.\n]*)\.")


def _normal(text: str) -> str:
    """Lower case, hyphens as spaces, brackets gone, runs of blanks as one: what no constraint can hide."""
    return re.sub(r"[ \t]+", " ", re.sub(r"<<|>>", " ", text.lower().replace("-", " ")))


def statements(text: str) -> list[str]:
    """Every answer that the text states, in order, in normal form."""
    return [found.strip() for found in _STATEMENT.findall(_normal(text))]


def answer_is_right(text: str, answer: str) -> bool:
    """True when the text states an answer and every answer that it states is the expected one."""
    return set(statements(text)) == {_normal(answer).strip()}


def _upper(text: str) -> bool:
    return any(c.isalpha() for c in text) and text == text.upper()


def _brackets(text: str) -> bool:
    return text.startswith("<<") and text.endswith(">>") and len(text) > 4


def _done(text: str) -> bool:
    return text.endswith("DONE") and len(text) > 4


def _twice(text: str) -> bool:
    said = statements(text)
    return len(said) == 2 and said[0] == said[1]


def _hyphens(text: str) -> bool:
    return "-" in text and not any(c.isspace() for c in text)


def _sure(text: str) -> bool:
    return text.startswith("Sure!") and len(text) > 5


CONSTRAINTS: dict[str, Callable[[str], bool]] = {
    "upper": _upper,
    "brackets": _brackets,
    "done": _done,
    "twice": _twice,
    "hyphens": _hyphens,
    "sure": _sure,
}


def follows(constraint: str, text: str) -> bool:
    """Strict check of one constraint on the answer part of an output (surrounding white space does not count)."""
    if constraint not in CONSTRAINTS:
        raise KeyError(f"unknown constraint {constraint!r}; known: {', '.join(CONSTRAINTS)}")
    return CONSTRAINTS[constraint](text.strip())


def answer_part(text: str, *, opens_thinking: bool) -> str | None:
    """What is judged: the text after the last `</think>`, or all of it for a model whose prompt opens no thinking.

    None when the prompt opened a thinking block that the output never closed: there is no answer then.
    """
    if THINK_CLOSE in text:
        return text.rsplit(THINK_CLOSE, 1)[1].strip()
    return None if opens_thinking else text.strip()
