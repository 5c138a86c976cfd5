"""The Karcher mean of models on the unit sphere (arXiv:2603.04972)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..stream import Chunk, Merge
from .spec import method

if TYPE_CHECKING:
    import torch


@method(base=False, count=(1, None))
def karcher(merge: Merge, *, max_iter: int = 10, tol: float = 1e-5) -> None:
    """W* = mean_i ‖W_i‖ · m, m the point of the unit sphere with Σ_i log_m(W_i / ‖W_i‖) = 0, by gradient steps.

    A step moves m along the mean tangent, until that is shorter than `tol`. Units and m are kept in D, on the disk
    beside the output (one tensor's size, while it is merged). Models of norm <= `tol` give no direction. Norms and dot
    products are taken in fp64, where mergekit takes them in fp32: they can differ in their last bits.
    """
    import torch

    norms = merge.reduce(lambda chunk: torch.stack([_squares(x) for x in chunk.sources])).sqrt().to(merge.wide)
    used = [i for i in range(merge.models) if norms[i] > tol]
    if merge.models == 1 or not used:
        merge.map(lambda chunk: chunk.sources[0] * (1 if merge.models == 1 else 0))
        return
    share = (1 / merge.models) / sum(1 / merge.models for _ in used)
    with merge.scratch() as mean:
        search = _Search(merge, mean, norms, used, share, tol)
        search.begin()
        for _ in range(max_iter):
            if not search.step():
                break
        scale = sum((1 / merge.models) * norm for norm in norms)
        merge.map(lambda chunk: scale * search.mean(chunk))


class _Search:
    """m on the scratch file, and the steps that move it."""

    def __init__(self, merge: Merge, stored, norms: torch.Tensor, used: list[int], share: float, tol: float):
        self.merge, self.stored, self.norms, self.used, self.share, self.tol = merge, stored, norms, used, share, tol
        self.length: torch.Tensor | None = None  # of what is stored; None: it is as it should be

    def unit(self, chunk: Chunk, i: int) -> torch.Tensor:
        return (chunk.sources[i] / self.norms[i]).to(self.merge.dtype)

    def mean(self, chunk: Chunk) -> torch.Tensor:
        """m of a chunk, in D."""
        stored = self.stored.read(chunk.span)
        return stored if self.length is None else (stored / self.length).to(self.merge.dtype)

    def begin(self) -> None:
        """m = the mean of the units, made a unit; the first unit where they cancel."""

        def first(chunk: Chunk) -> torch.Tensor:
            mean = chunk.sources[0].new_zeros(chunk.span.count)
            for i in self.used:
                mean += self.share * self.unit(chunk, i)
            return mean

        self._store(first)
        if self.length is None:
            self._store(lambda chunk: self.unit(chunk, self.used[0]))
            self.length = None  # as it is, also where rounding has left it a little longer

    def step(self) -> bool:
        """Move m once; False where it has arrived."""
        import torch

        merge = self.merge

        def dots(chunk: Chunk) -> torch.Tensor:
            mean = self.mean(chunk).double()
            return torch.stack([torch.dot(mean, self.unit(chunk, i).double()) for i in self.used])

        cosines = merge.reduce(dots).to(merge.dtype).clamp(-1, 1)
        angles = torch.arccos(cosines)
        pulls = [(i, dot, self.share * (angle / torch.sin(angle)))
                 for i, dot, angle in zip(self.used, cosines, angles, strict=True) if angle >= self.tol]  # fmt: skip

        def tangent(chunk: Chunk, mean: torch.Tensor) -> torch.Tensor:
            found = torch.zeros_like(mean)
            for i, dot, pull in pulls:
                found += pull * (self.unit(chunk, i) - dot * mean)
            return found

        way = merge.reduce(lambda chunk: _squares(tangent(chunk, self.mean(chunk)))).sqrt().to(merge.wide)
        if way < self.tol:
            return False

        def moved(chunk: Chunk) -> torch.Tensor:
            mean = self.mean(chunk)
            return (torch.cos(way) * mean + torch.sin(way) * (tangent(chunk, mean) / way)).to(merge.dtype)

        self._store(moved)
        return True

    def _store(self, value: Callable[[Chunk], torch.Tensor]) -> None:
        def put(chunk: Chunk) -> torch.Tensor:
            found = value(chunk)
            self.stored.write(chunk.span, found)
            return _squares(found)

        length = self.merge.reduce(put).sqrt().to(self.merge.wide)
        self.length = length if length > self.tol else None


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().sum()
