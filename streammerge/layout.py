"""A calibration sample as one text, in the LRM's own chat format, and its tokens by character offsets.

Everything is placed in characters first. The text is then tokenised once, and a character range becomes the tokens
that overlap it: markers and spans that share a token with their neighbours are found like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .markers import Markers, answered, render_prompt
from .records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = "streammerge looks for the user's message"
Range = tuple[int, int]  # characters, end excluded


@dataclass(frozen=True)
class Tokens:
    """One tokenisation: ids [T] and the characters [starts, ends) of each."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    def over(self, span: Range) -> list[int]:
        """Positions of the tokens that overlap a character range; byte tokens of one character all count."""
        return np.nonzero((self.starts < span[1]) & (self.ends > span[0]))[0].tolist()

    def over_all(self, spans: Iterable[Range]) -> set[int]:
        return {position for span in spans for position in self.over(span)}


@dataclass(frozen=True)
class Layout:
    """A sample's full text and where its parts begin, in characters."""

    text: str
    body: Range  # the prompt, as rendered
    prompt: int  # text[prompt + i] is the i-th character of the record's own prompt
    open: Range
    thinking: str  # without markers
    close: Range
    response: int


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """The text's tokens [T] with their characters, nothing added."""
    # The template has written the special tokens already; verbose would warn about lengths, which are checked here.
    with answered(f"{tokenizer.name_or_path}: the tokenizer cannot read a text that begins {text[:60]!r}",
                  "copy it from where the checkpoint came from"):
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Tokens(coded["input_ids"], offsets[:, 0], offsets[:, 1])


def layouter(tokenizer: PreTrainedTokenizerFast, markers: Markers) -> Callable[[Record], Layout | None]:
    """The function that writes a record out as one text; it returns None where the spans of a prompt
    cannot be placed because the template altered it."""
    before, found, _ = render_prompt(tokenizer, _PROBE).partition(_PROBE)

    def lay(record: Record) -> Layout | None:
        try:
            head = render_prompt(tokenizer, record.prompt)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from error
        body = _locate(head, record.prompt, before if found else None)
        if body is None and record.instructions:
            return None
        body = body or (0, 0)  # a reasoning sample has no spans to place
        # Asked of each rendering: some templates read switches such as /no_think out of the message.
        if markers.opener_in_prompt and head.rstrip().endswith(markers.open):
            open_at = head.rindex(markers.open)
            head += _rest(markers.after_open, head[open_at + len(markers.open):])
        else:
            open_at = len(head)
            head += markers.open + markers.after_open
        thinking = _bare(record.thinking, markers)
        close_at = len(head) + len(thinking) + len(markers.before_close)
        response = close_at + len(markers.close) + len(markers.after_close)
        text = head + thinking + markers.before_close + markers.close + markers.after_close + record.response
        prompt = body[0] - record.prompt.index(text[slice(*body)])
        return Layout(text, body, prompt, (open_at, open_at + len(markers.open)), thinking,
                      (close_at, close_at + len(markers.close)), response)

    return lay


def _locate(rendered: str, prompt: str, before: str | None) -> Range | None:
    """The prompt, or what a trimming template left of it, in the rendered text. Where a known message appeared
    (after `before`) is tried first: a short prompt may also occur in the frame."""
    texts = (prompt, prompt.strip())
    if before is not None and rendered.startswith(before):
        for text in texts:
            if rendered.startswith(text, len(before)):
                return len(before), len(before) + len(text)
    for text in texts:
        at = rendered.rfind(text)
        if at >= 0:
            return at, at + len(text)
    return None


def _rest(wanted: str, there: str) -> str:
    """What is missing of `wanted` after `there`; a template that writes something else there has the last word."""
    return wanted[len(there):] if wanted.startswith(there) else ""


def _bare(thinking: str, markers: Markers) -> str:
    """Reasoning without the markers that some data sets leave around it, so that none is written twice."""
    if thinking.lstrip().startswith(markers.open):
        thinking = thinking.lstrip()[len(markers.open):].removeprefix(markers.after_open)
    if thinking.rstrip().endswith(markers.close):
        thinking = thinking.rstrip()[: -len(markers.close)].removesuffix(markers.before_close)
    return thinking


def occurrences(text: str, spans: Iterable[str]) -> list[Range]:
    """Character ranges of spans that are all in `text`. A span listed k times takes its first k occurrences; where
    there are fewer, the last one again."""
    found: dict[str, int] = {}
    ranges = []
    for span in spans:
        at = text.find(span, found[span] + len(span)) if span in found else text.find(span)
        at = found[span] if at < 0 else at
        found[span] = at
        ranges.append((at, at + len(span)))
    return ranges
