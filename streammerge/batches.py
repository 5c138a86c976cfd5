"""Samples of unequal length -> token batches under a budget. The plan is part of a run's identity: it is deterministic.

Holds the ids of all batches at once: a few bytes a token, nothing beside one layer's activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class HasIds(Protocol):
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that run together, padded on the right.

    The padding id is 0, a valid id and no special one: causality keeps a position from seeing anything to its right,
    so padding changes no real position and needs no attention mask. Rows past `lengths` mean nothing.
    """

    ids: torch.LongTensor  # [samples, tokens]
    lengths: tuple[int, ...]  # real tokens of each row
    samples: tuple[int, ...]  # index of each row in the list that was batched


def groups(samples: Sequence[HasIds], tokens_per_batch: int) -> list[list[int]]:
    """Indices of the samples of each batch, longest first (stable), samples x longest <= `tokens_per_batch`; a sample
    longer than that runs alone.

    What comes last is short, so that workers end together.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))
    found: list[list[int]] = []
    for i in order:  # descending, so the first is the longest of its group
        if found and (len(found[-1]) + 1) * len(samples[found[-1][0]].ids) <= tokens_per_batch:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def make_batches(samples: Sequence[HasIds], tokens_per_batch: int) -> list[Batch]:
    """The batches of `groups`."""
    return [_batch(samples, group) for group in groups(samples, tokens_per_batch)]


def _batch(samples: Sequence[HasIds], group: list[int]) -> Batch:
    lengths = tuple(len(samples[i].ids) for i in group)
    ids = torch.zeros(len(group), max(lengths), dtype=torch.long)
    for row, i in enumerate(group):
        ids[row, : lengths[row]] = torch.tensor(samples[i].ids, dtype=torch.long)
    return Batch(ids, lengths, tuple(group))
