"""Captured features -> orthonormal bases of the protected spaces, four a layer and one a key/value head (Eqs. 4-8).

exact: every direction above fp32's rounding floor. energy: the fewest directions that hold a share of ‖H‖²_F.
fixed: a given number. Small problems are solved exactly by QR; large ones by the randomized range finder. Where its
first rank does not reach the energy, a few thousand rows are solved exactly by their Gram matrix, and beyond that the
rank doubles until it is reached. Memory: the features and a few [in, rank] blocks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg
from .arch import SITE_OF
from .capture import FeatureCapture, Features
from .errors import overflow
from .recipe import Basis

_DENSE = 1024  # below this many rows or features an exact factorisation costs less than a randomized one


# A second, larger randomized pass against one Gram matrix of N rows, energy 0.97, one CPU thread: N = 1100 and 2000 in
# 4096 and 8192 features cost the Gram 0.3 to 3.6 s and doubling 1.2 to 20 s; N = 4000 in 8192, 18 s against 13 s.
_GRAM_ROWS = 2048
_GRAM_ENERGY = 0.999  # see linalg.leading_rows


@dataclass(frozen=True)
class SiteBasis:
    """U [in, r] with orthonormal columns, on the host until its module is merged; the share of ‖H‖² inside it; the
    number of feature rows behind it."""

    u: Tensor
    energy: float
    count: int


@dataclass(frozen=True)
class LayerBases:
    """The bases of one layer, by feature site; `values` holds one a key/value head, or nothing."""

    sites: dict[str, SiteBasis]
    values: tuple[SiteBasis, ...] = ()

    def of(self, module: str) -> tuple[SiteBasis, ...]:
        """The bases of a module's equal row blocks: one for all rows, one a kv head for v, none without Stage 1."""
        if module == "v" and self.values:
            return self.values
        site = self.sites.get(SITE_OF[module])
        return (site,) if site else ()


def feature_kind(basis: Basis):
    """The rule by which `capture` keeps rows or a covariance: rows while they are the smaller of the two."""
    if basis.method == "auto":
        return lambda width, rows: "rows" if rows <= width else "covariance"
    return lambda width, rows: "covariance" if basis.method == "covariance" else "rows"


def build_bases(capture: FeatureCapture, basis: Basis, seed: int, layer: int) -> LayerBases:
    """Every basis of a layer. Deterministic in (features, recipe, seed, layer)."""

    def build(features: Features, name: str) -> SiteBasis:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{layer}/{name}".encode()))
        return _basis(features, basis, generator)

    sites = {site: build(features, site) for site, features in capture.sites.items()}
    values = tuple(build(features, f"value{head}") for head, features in enumerate(capture.values))
    return LayerBases(sites, values)


def _basis(features: Features, basis: Basis, generator: torch.Generator) -> SiteBasis:
    is_cov = features.cov is not None
    operand = features.cov if is_cov else torch.cat(features.rows)
    if not torch.isfinite(operand).all():
        raise overflow("the LRM's activations at the thinking positions")
    limit = min(operand.shape)
    dense = basis.method == "qr" or basis.rank == "exact" or (basis.method != "randomized" and limit <= _DENSE)
    if dense:
        spectrum = linalg.exact_covariance(operand) if is_cov else linalg.exact_rows(operand)
        rank = _wanted_rank(spectrum, basis, is_cov)
    else:
        spectrum, rank = _low_rank(operand, basis, generator, is_cov)
    if rank is None:  # every direction there is, and rounding kept the sum a hair below the share
        rank = linalg.numerical_rank(spectrum, is_cov=is_cov)
    kept = float(spectrum.energies[:rank].sum(dtype=torch.float64)) / spectrum.total if spectrum.total > 0 else 1.0
    u = linalg.orthonormalise(spectrum.vectors[:, :rank]).contiguous()  # one layout: products then have the same bits
    return SiteBasis(u.cpu(), kept, features.count)


def _low_rank(operand: Tensor, basis: Basis, generator: torch.Generator, is_cov: bool):
    """(spectrum, rank) by the randomized range finder, or by the rows' Gram matrix where a larger pass costs more."""
    limit = min(operand.shape)
    by_gram = basis.method == "auto" and not is_cov and limit == len(operand) <= _GRAM_ROWS
    guess = min(basis.size or 64, limit)
    while True:
        spectrum = linalg.randomized(
            operand,
            guess,
            generator,
            is_cov=is_cov,
            oversample=basis.oversample,
            iterations=basis.power_iterations,
        )
        rank = _wanted_rank(spectrum, basis, is_cov)
        if rank is not None or guess == limit:
            return spectrum, rank
        if by_gram and basis.energy <= _GRAM_ENERGY:
            spectrum = linalg.leading_rows(operand, basis.energy)
            return spectrum, len(spectrum.energies)
        guess = min(2 * guess, limit)


def _wanted_rank(spectrum: linalg.Spectrum, basis: Basis, is_cov: bool) -> int | None:
    """The rank the recipe asks for; None where the directions at hand do not hold enough energy."""
    full = linalg.numerical_rank(spectrum, is_cov=is_cov)
    if basis.rank == "exact":
        return full
    if basis.rank == "fixed":
        return min(basis.size, full)
    rank = linalg.energy_rank(spectrum, basis.energy)
    return None if rank is None else min(rank, full)
