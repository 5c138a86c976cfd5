"""Task vectors with entries dropped: by magnitude, at random, by magnitude at both ends, at random by rank.

A sparsifier is made for one tensor and asked chunk by chunk. What it must know of the whole tensor (thresholds, L1
norms) it finds in passes of its own. Dropped entries become +0: where mergekit has −0, its sum loses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RecipeError
from ..stream import Chunk, Merge, Span
from .select import Rank, magnitude_bits, thresholds

if TYPE_CHECKING:
    import torch

_LEAST_NORM = 1e-7  # L1 norms below it are not restored


class Sparsifier:
    """δ_i with entries dropped, `density` of them kept, and with its L1 norm restored where `rescale`.

    `density` >= 1: δ_i as it is. `spans`: the chunks in which it can be asked (None: any).
    """

    spans: list[Span] | None = None

    def __init__(self, merge: Merge, density: Sequence[float], rescale: bool):
        self.merge, self.density, self.rescale = merge, density, rescale
        self.work, self.scales = merge.dtype, [None] * merge.models

    def prepare(self) -> None:
        """Find thresholds and norms."""
        if self.rescale and any(d < 1 for d in self.density):
            self._restore_norms()

    def kept(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        """int mask of the bits of `delta`: −1 where it is kept, 0 where it is dropped."""
        raise NotImplementedError

    def __call__(self, chunk: Chunk, i: int) -> torch.Tensor:
        """δ_i of a chunk in D, [chunk.span.count]."""
        delta = chunk.delta(i)
        if self.density[i] >= 1:
            return delta
        masked = self._masked(chunk, i, delta)
        scale = self.scales[i]
        return masked.to(delta.dtype) if scale is None else (masked.to(scale.dtype) * scale).to(delta.dtype)

    def _masked(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        """The entries that are kept, in the dtype in which norms are taken."""
        mask = self.kept(chunk, i, delta)
        return (delta.view(mask.dtype) & mask).view(delta.dtype).to(self.work)

    def _restore_norms(self) -> None:
        """scale_i = ‖δ_i‖₁ / ‖dropped δ_i‖₁, norms and quotient rounded to the dtype that mergekit works in."""
        import torch

        asked = [i for i, density in enumerate(self.density) if density < 1]

        def norms(chunk: Chunk) -> torch.Tensor:
            found = []
            for i in asked:
                delta = chunk.delta(i)
                found += [delta.to(self.work), self._masked(chunk, i, delta)]
            return torch.stack([x.abs().sum(dtype=torch.float64) for x in found])

        sums = self.merge.reduce(norms, self.spans)
        wide = torch.float64 if self.work == torch.float64 else torch.float32
        rounded = sums.to(self.work).to(wide)
        sums = rounded if rounded.isfinite().all() else sums.to(wide)  # fp16 cannot hold the norm of a large tensor
        for i, before, after in zip(asked, sums[::2], sums[1::2], strict=True):
            if before >= _LEAST_NORM and after >= _LEAST_NORM:
                self.scales[i] = (before / after).to(self.work).to(wide)


class Magnitude(Sparsifier):
    """The largest max(1, ⌊density n⌋) entries are kept, all dropped for `density` <= 0. Equals go by their positions;
    mergekit leaves the choice among them to an unstable sort."""

    def prepare(self) -> None:
        count = self.merge.count
        kept = [max(1, int(d * count)) if d > 0 else 0 for d in self.density]
        ranks = [Rank(i, k, largest=True) for i, k in enumerate(kept)]
        self._found = _thresholds(self.merge, ranks)
        super().prepare()

    def kept(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        return self._found[i].holds(magnitude_bits(delta), chunk.span.index)


class Breadcrumbs(Sparsifier):
    """The largest ⌊gamma n⌋ entries are dropped, and the smallest, so that ⌊density n⌋ are kept; fewer of the largest
    where both cannot be had."""

    def __init__(self, merge: Merge, density: Sequence[float], gamma: Sequence[float], rescale: bool):
        super().__init__(merge, density, rescale)
        self.gamma = gamma

    def prepare(self) -> None:
        count, ranks = self.merge.count, []
        for i, (density, gamma) in enumerate(zip(self.density, self.gamma, strict=True)):
            kept = max(0, int(density * count))
            small = max(0, count - kept - int(gamma * count))
            ranks += [Rank(i, small, largest=False), Rank(i, min(count, small + kept), largest=False)]
        self._found = _thresholds(self.merge, ranks)
        super().prepare()

    def kept(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        bits = magnitude_bits(delta)
        small, up_to = (t.holds(bits, chunk.span.index) for t in self._found[2 * i : 2 * i + 2])
        return up_to & ~small


class Bernoulli(Sparsifier):
    """Each entry is kept with probability `density`, rounded to the dtype that mergekit draws in."""

    def __init__(self, merge: Merge, density: Sequence[float], rescale: bool):
        import torch

        super().__init__(merge, density, rescale)
        self.work = merge.dtype if merge.dtype == torch.bfloat16 else torch.float32

    def kept(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        import torch

        share = float(torch.tensor(self.density[i], dtype=self.work))
        drawn = self.merge.uniform(chunk.span, i) < np.uint32(min(max(0.0, share) * 2**32, 2**32 - 1))
        return _mask(drawn, delta)


class RankedDrop(Bernoulli):
    """The entry of rank r of a row's n (by magnitude, from 0) is kept with probability density − ε + 2 ε r / (n − 1).

    Rows are slices along the first dimension, a vector is one row, and a row of one entry is kept with probability
    density, where mergekit divides by zero. RecipeError where density ± ε leaves (0, 1).
    """

    def __init__(self, merge: Merge, density: Sequence[float], epsilon: Sequence[float], rescale: bool):
        super().__init__(merge, density, rescale)
        self.epsilon = epsilon
        self.rows = merge.shape if len(merge.shape) > 1 else (1, merge.count)
        self.spans = merge.spans(unit=max(1, merge.count // max(1, self.rows[0])))
        for d, e in zip(density, epsilon, strict=True):
            if 0 < d < 1 and not 0 < d - e <= d + e < 1:
                raise RecipeError(f"{merge.job.out.name}: density {d} and epsilon {e}: density - epsilon and density "
                                  "+ epsilon must both lie between 0 and 1: lower epsilon")

    def kept(self, chunk: Chunk, i: int, delta: torch.Tensor) -> torch.Tensor:
        import torch

        if self.density[i] <= 0:
            return torch.zeros_like(magnitude_bits(delta))
        rows = magnitude_bits(delta).reshape(-1, *self.rows[1:])
        ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(self.work) + 1
        least, most = ranks.amin(1, keepdim=True), ranks.amax(1, keepdim=True)
        share = ((ranks - least) / (most - least)).clamp(0, 1).nan_to_num(nan=0.5)
        odds = (self.density[i] - self.epsilon[i]) + share * 2 * self.epsilon[i]
        drawn = (self.merge.uniform(chunk.span, i) >> 8).astype(np.float32) * np.float32(2.0**-24)
        return _mask(drawn < odds.reshape(-1).float().cpu().numpy(), delta)


def _thresholds(merge: Merge, ranks: list[Rank]):
    models = {rank.model for rank in ranks if 0 < rank.k < merge.count}
    return thresholds(merge, lambda chunk: {i: chunk.delta(i) for i in models}, ranks)


def _mask(kept: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """−1 where `kept`, else 0, as integers of the size of `like`'s elements, on its device."""
    import torch

    return -torch.from_numpy(kept.view(np.int8)).to(magnitude_bits(like[:0]).dtype).to(like.device)
