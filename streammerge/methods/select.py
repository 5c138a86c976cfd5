"""Which entries are among the k smallest or largest, exactly, without sorting: counting over the bits of magnitudes.

The bits of a non-negative float are an integer in the same order. 15 bits of it are counted in one pass over the
tensor, which is all of a 16-bit dtype; fp32 takes a second pass over the next 16 bits, fp64 four passes. Entries equal
to the threshold are taken in the order of their positions, as a stable sort takes them; the counts are kept for up to
32 stretches of the tensor, so that only one stretch is read again to find where their quota ends.

Memory: 32 histograms of 2^15 (2^16) counters a threshold, 4 MiB (8 MiB), whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from ..stream import Chunk, Merge, Span

if TYPE_CHECKING:
    import torch

_STRETCHES = 32
_PASSES = {2: ((0, 15),), 4: ((16, 15), (0, 16)), 8: ((48, 15), (32, 16), (16, 16), (0, 16))}  # shift, bits by itemsize


def magnitude_bits(x: torch.Tensor) -> torch.Tensor:
    """|x| as integers in the order of |x|: int16, int32 or int64."""
    import torch

    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.abs().view(signed)


@dataclass(frozen=True)
class Rank:
    """The k entries of model `model` (of `key`'s list) that are largest, or smallest."""

    model: int
    k: int
    largest: bool


class Threshold:
    """What tells the entries of a Rank from the others: `bits` of the last one taken, and how many of its equals go in
    each chunk."""

    def __init__(self, rank: Rank, count: int):
        self.rank, self.count = rank, count
        self.bits, self.quota = 0, 0  # of the entries equal to `bits` the first `quota` are taken
        self.ends: tuple[int, int] | None = None  # the chunks [a, b) in which the quota may end
        self.before: dict[int, int] = {}  # of those: equals in the chunks before

    def holds(self, bits: torch.Tensor, index: int) -> torch.Tensor:
        """int mask, −1 where an entry of the chunk `index` is taken, else 0, from its magnitude_bits."""
        if not 0 < self.rank.k < self.count:
            return bits.new_full(bits.shape, -1 if self.rank.k > 0 else 0)
        shift = 8 * bits.element_size() - 1  # an arithmetic shift spreads the sign of a difference: a fast comparison
        left = self._left(index)
        equal = left < 0  # all of the equals go with those beyond: an integer further
        beyond = (self.bits - equal - bits if self.rank.largest else bits - (self.bits + equal)) >> shift
        if left > 0:
            equals = bits == self.bits
            beyond |= -(equals & (equals.cumsum(0) <= left)).to(bits.dtype)
        return beyond

    def _left(self, index: int) -> int:
        """How many of the chunk's equals are taken at most; −1: all."""
        first, end = self.ends
        if index < first or index >= end:
            return -1 if index < first else 0
        return max(0, self.quota - self.before[index])


def thresholds(
    merge: Merge, key: Callable[[Chunk], dict[int, torch.Tensor]], ranks: Sequence[Rank]
) -> list[Threshold]:
    """The thresholds of `ranks`. `key(chunk)` -> {model: values in D whose magnitudes are ranked}."""
    import torch

    found = [Threshold(rank, merge.count) for rank in ranks]
    asked = [t for t in found if 0 < t.rank.k < merge.count]
    if not asked:
        return found
    spans = merge.spans()
    stretch = -(-len(spans) // _STRETCHES)
    left = {id(t): t.rank.k - 1 if not t.rank.largest else merge.count - t.rank.k for t in asked}  # ascending, from 0
    for shift, width in _PASSES[torch.empty(0, dtype=merge.dtype).element_size()]:
        counts = _count(merge, key, asked, spans, stretch, shift, width)
        for threshold, table in zip(asked, counts, strict=True):
            sums = table.sum(0, dtype=torch.int64).cumsum(0)
            digit = int(torch.searchsorted(sums, left[id(threshold)], right=True))
            left[id(threshold)] -= int(sums[digit - 1]) if digit else 0
            threshold.bits |= digit << shift
            if shift == 0:
                _share_out(threshold, table[:, digit], left[id(threshold)], stretch, len(spans))
    _find_ends(merge, key, asked, spans)
    return found


def _count(
    merge: Merge,
    key: Callable[[Chunk], dict[int, torch.Tensor]],
    asked: Sequence[Threshold],
    spans: Sequence[Span],
    stretch: int,
    shift: int,
    width: int,
) -> list[torch.Tensor]:
    """Histograms of one digit, [stretches, 2^width] a threshold, of the entries that agree with the digits before."""
    import torch

    tables = [torch.zeros(-(-len(spans) // stretch), 1 << width, dtype=torch.int32) for _ in asked]
    lock = Lock()

    def work(chunk: Chunk) -> None:
        bits = {model: magnitude_bits(values) for model, values in key(chunk).items()}
        for threshold, table in zip(asked, tables, strict=True):
            own = bits[threshold.rank.model]
            if own.element_size() > 2:
                high = shift + width
                agreeing = own if high >= 8 * own.element_size() - 1 else own[(own >> high) == threshold.bits >> high]
                own = (agreeing >> shift) & ((1 << width) - 1)
            counts = torch.bincount(own, minlength=1 << width).cpu()
            with lock:  # integers: the order in which chunks come does not matter
                table[chunk.span.index // stretch] += counts

    merge.each(work, spans)
    return tables


def _share_out(threshold: Threshold, equals: torch.Tensor, rank: int, stretch: int, chunks: int) -> None:
    """The quota of equals, and the stretch in which it ends. `equals`: by stretch; `rank`: the ascending rank of the
    k-th entry among its equals."""
    total = int(equals.sum())
    threshold.quota = total - rank if threshold.rank.largest else rank + 1
    threshold.ends = (chunks, chunks)
    if threshold.quota < total:
        before = 0
        for i, some in enumerate(equals.tolist()):
            if before + some >= threshold.quota:
                threshold.ends = (i * stretch, min((i + 1) * stretch, chunks))
                threshold.before = {i * stretch: before}
                return
            before += some


def _find_ends(
    merge: Merge, key: Callable[[Chunk], dict[int, torch.Tensor]], asked: Sequence[Threshold], spans: Sequence[Span]
) -> None:
    """Count the equals of every chunk of the stretches in which a quota ends."""
    import torch

    wanted = sorted({i for t in asked for i in range(*t.ends)})

    def work(chunk: Chunk) -> list[int]:
        bits = {model: magnitude_bits(values) for model, values in key(chunk).items()}
        return [int(torch.count_nonzero(bits[t.rank.model] == t.bits)) for t in asked]

    counted = dict(zip(wanted, merge.each(work, [spans[i] for i in wanted]), strict=True))
    for at, threshold in enumerate(asked):
        for i in range(threshold.ends[0], threshold.ends[1] - 1):
            threshold.before[i + 1] = threshold.before[i] + counted[i][at]
