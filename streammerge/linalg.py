"""Orthonormal bases of row spaces: exact by QR, low rank by a randomized range finder, or from a covariance.

Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011): block subspace iteration with
re-orthonormalisation, then Rayleigh-Ritz inside the subspace found. The operator is only ever applied to thin blocks,
so rows H [N, in] and a covariance C = HᵀH [in, in] share one code path. fp32 throughout; memory is the operand and a
few [in, rank] blocks. A basis is judged by the energy it leaves out, never by subspace angles (performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import row_gram


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32, whatever the process around us set: TF32 or autocast would leave 1e-3 of ‖Δ U‖ in the
    protected space where fp32 leaves 1e-6. (NVIDIA's containers switch TF32 on by an environment variable.)
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller used torch's newer switches, which the old getter refuses to name
        before = None
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if before is None else ()
    newer = [(b, b.fp32_precision) for b in backends]
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for backend, precision in newer:
            backend.fp32_precision = precision


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


def leading_rows(rows: Tensor, share: float) -> Spectrum:
    """The fewest singular directions of rows H [N, in], N ≤ in, that hold `share` of ‖H‖²: from G = H Hᵀ [N, N].

    H = V Σ Uᵀ gives G = V Σ² Vᵀ and U = Hᵀ V Σ⁻¹: all energies are known before any direction is formed. G is summed in
    fp32 and squares the condition: what lies below 1e-6 of σ²_max is noise. Shares up to 0.999 do not see it (measured
    over spectra from flat to n^-3, with and without a direction that dominates: the optimum's residual to 1e-6 of it).
    Holds G in fp32, it and its eigenvectors in fp64. O(N² in + N³) flops.
    """
    values, vectors = torch.linalg.eigh(row_gram(rows).double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(rows.square().sum(dtype=torch.float64))
    rank = energy_rank(Spectrum(vectors, values, total), share)
    if rank is None:
        raise ValueError(f"the Gram matrix does not resolve a share of {share}")
    found = rows.T @ (vectors[:, :rank] / values[:rank].sqrt()).to(rows.dtype)
    return Spectrum(orthonormalise(found), values[:rank].to(rows.dtype), total)


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
    """Directions above the rounding floor of fp32: σ > σ_max · max(shape) · eps for rows, σ² > σ²_max · 32 eps for a
    covariance.

    Accumulating C in fp32 leaves eigenvalues of 0.1 to 2 eps · σ²_max behind, whatever its width (measured, 256 to 2048
    wide). The worst-case bound, width · eps, would drop real directions beside one that dominates: at a width of 4096
    all below 2 % of σ_max, and activations of language models do have such outliers.
    """
    if not len(spectrum.energies) or float(spectrum.energies[0]) <= 0:
        return 0
    eps = torch.finfo(torch.float32).eps
    floor = 32 * eps if is_cov else (eps * spectrum.vectors.shape[0]) ** 2
    return int((spectrum.energies / spectrum.energies[0] > floor).sum())


def energy_rank(spectrum: Spectrum, share: float) -> int | None:
    """The smallest r whose directions hold `share` of ‖H‖²; None when those at hand do not reach it."""
    if spectrum.total <= 0:
        return 0
    reached = spectrum.energies.double().cumsum(0) >= share * spectrum.total * (1 - 1e-9)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None
