"""Synthetic calibration sets: token ids and positions as a tokenizer would have given them, of the authors' sizes.

A sample of natural length has eight positions in Ω_think. A set of few tokens has few of them, and its bases would cost
nothing: short samples that are all Ω_think then make up for the rows of the full set. Half of their tokens are markers
that recur from sample to sample, half are random, as in Ω_think itself.
"""

from __future__ import annotations

import random

from ..calibration import CalibrationSet, Instruction, InstructionSample, ReasoningSample

REASONING, THOUGHT = 150, 1400  # the authors' reasoning set: samples, and mean tokens of one
INSTRUCTION, ORDER = 365, 600  # their instruction set
AUTHORS = REASONING * THOUGHT + INSTRUCTION * ORDER  # tokens of both
_OMEGA, _MARKERS, _SHORT = 8, 4, 64  # positions a sample; ids 0 to 3 are markers; tokens of a short sample


def calibration(tokens: int, vocabulary: int, holdout: float, rows: int = 0) -> CalibrationSet:
    """Sets of about `tokens` tokens in the authors' proportions, and at least one sample of each kind.

    `rows`: positions of Ω_think that the bases are to have (0: as many as come of themselves).
    """
    dice = random.Random(0)
    count = max(2, round(REASONING * tokens / AUTHORS))
    thoughts = [_thought(f"r{i}", length, vocabulary, dice) for i, length in enumerate(_lengths(count, THOUGHT))]
    random.Random(0).shuffle(thoughts)  # the same split whatever the vocabulary
    held = min(max(1, round(holdout * count)), count - 1)
    orders = max(1, round(INSTRUCTION * tokens / AUTHORS))
    missing = rows - _OMEGA * (count - held)
    short = [_short(f"s{at}", min(_SHORT, missing - at), vocabulary, dice) for at in range(0, max(0, missing), _SHORT)]
    instruction = [_order(f"i{i}", length, vocabulary, dice) for i, length in enumerate(_lengths(orders, ORDER))]
    return CalibrationSet((*thoughts[held:], *short), tuple(thoughts[:held]), tuple(instruction), {})


def rows(data: CalibrationSet) -> int:
    """Positions of Ω_think that the bases are built from."""
    return sum(len(s.omega) for s in data.reasoning)


def _lengths(count: int, mean: int) -> list[int]:
    """Spread evenly over 0.4 to 1.6 of the mean."""
    return [round(mean * (0.4 + 1.2 * (i + 0.5) / count)) for i in range(count)]


def _ids(length: int, vocabulary: int, dice: random.Random) -> list[int]:
    return [dice.randrange(_MARKERS, vocabulary) for _ in range(length)]


def _thought(name: str, length: int, vocabulary: int, dice: random.Random) -> ReasoningSample:
    """One with its opener near the start, its closer at the end, and random positions between them."""
    ids, opener, closer = _ids(length, vocabulary, dice), length // 10, length - 1
    ids[opener], ids[closer] = 0, 1
    inside = dice.sample(range(opener + 1, closer - 1), _OMEGA - 4)
    omega = sorted([opener - 1, opener, closer - 1, closer, *inside])
    return ReasoningSample(name, tuple(ids), tuple(omega), opener, closer - 1, closer)


def _short(name: str, length: int, vocabulary: int, dice: random.Random) -> ReasoningSample:
    ids = _ids(length, vocabulary, dice)
    ids[::2] = [i % _MARKERS for i in range(len(ids[::2]))]
    return ReasoningSample(name, tuple(ids), tuple(range(length)), 0, max(0, length - 2), length - 1)


def _order(name: str, length: int, vocabulary: int, dice: random.Random) -> InstructionSample:
    """Two instructions; the response is the last quarter, and they constrain half of it."""
    response = range(3 * length // 4, length)
    asked = (tuple(range(8, 18)), tuple(range(20, 30)))
    found = tuple(Instruction(f"rule{n}", asked[n], tuple(response[n::4]), tuple(response[n + 2 :: 4])) for n in (0, 1))
    return InstructionSample(name, tuple(_ids(length, vocabulary, dice)), found)
