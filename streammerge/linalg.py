"""Orthonormal bases of row spaces: exact by QR, low rank by a randomized range finder, or from a covariance.

Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011): block subspace iteration with
re-orthonormalisation, then Rayleigh-Ritz inside the subspace found. The operator is only ever applied to thin blocks,
so rows H [N, in] and a covariance C = HᵀH [in, in] share one code path. fp32 throughout; memory is the operand and a
few [in, rank] blocks. A basis is judged by the energy it leaves out, never by subspace angles (performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Right singular vectors [in, k] (columns orthonormal), their squared singular values [k], and ‖H‖²_F."""

    vectors: Tensor
    energies: Tensor
    total: float


def orthonormalise(x: Tensor) -> Tensor:
    """Columns of x [n, k] -> orthonormal columns of the same span, to 1e-6 in fp32."""
    return torch.linalg.qr(x)[0]


def exact_rows(rows: Tensor) -> Spectrum:
    """All singular directions of rows H [N, in]: thin QR first, so that the SVD is min(N, in) square.

    O(in N min(N, in)) flops; holds the Q factor.
    """
    total = float(rows.square().sum(dtype=torch.float64))
    if rows.shape[0] <= rows.shape[1]:
        q, r = torch.linalg.qr(rows.T)  # H = Rᵀ Qᵀ
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        return Spectrum(q @ u, s.square(), total)
    r = torch.linalg.qr(rows, mode="r")[1]
    _, s, vh = torch.linalg.svd(r, full_matrices=False)
    return Spectrum(vh.T.contiguous(), s.square(), total)


def exact_covariance(cov: Tensor) -> Spectrum:
    """All eigenvectors of C = HᵀH [in, in], largest first; in fp64, since C squares the condition of H."""
    values, vectors = torch.linalg.eigh(cov.double())
    return Spectrum(vectors.flip(1).to(cov.dtype), values.flip(0).clamp(min=0).to(cov.dtype), float(cov.trace()))


def randomized(
    operand: Tensor, rank: int, generator: torch.Generator, *, is_cov: bool, oversample: int, iterations: int
) -> Spectrum:
    """The leading `rank` directions of rows H [N, in], or of a covariance C [in, in] when is_cov.

    `generator` lives on the CPU, so that every device draws the same test matrix. Cost: 2 (iterations + 1) products
    of the operand with an [in, rank + oversample] block.
    """
    width = operand.shape[1]
    k = min(rank + oversample, width, operand.shape[0])

    def gram(block: Tensor) -> Tensor:
        return operand @ block if is_cov else operand.T @ (operand @ block)

    test = torch.randn(width, k, generator=generator, dtype=torch.float32)
    q = orthonormalise(gram(test.to(operand)))
    for _ in range(iterations):
        q = orthonormalise(gram(q))
    if is_cov:
        values, inner = torch.linalg.eigh(q.T @ gram(q))
        energies, inner = values.flip(0).clamp(min=0), inner.flip(1)
        total = float(operand.trace())
    else:
        _, s, vh = torch.linalg.svd(operand @ q, full_matrices=False)
        energies, inner = s.square(), vh.T
        total = float(operand.square().sum(dtype=torch.float64))
    return Spectrum((q @ inner)[:, :rank], energies[:rank], total)


def numerical_rank(spectrum: Spectrum, *, is_cov: bool) -> int:
    """Directions above the rounding floor of fp32: σ > σ_max · max(shape) · eps for rows, its root for a covariance."""
    if not len(spectrum.energies) or float(spectrum.energies[0]) <= 0:
        return 0
    floor = torch.finfo(torch.float32).eps * spectrum.vectors.shape[0]
    relative = spectrum.energies / spectrum.energies[0]
    return int((relative > (floor if is_cov else floor**2)).sum())


def energy_rank(spectrum: Spectrum, share: float) -> int | None:
    """The smallest r whose directions hold `share` of ‖H‖²; None when those at hand do not reach it."""
    if spectrum.total <= 0:
        return 0
    reached = spectrum.energies.double().cumsum(0) >= share * spectrum.total * (1 - 1e-9)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None
