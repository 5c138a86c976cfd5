"""The projection kernel against its twin and float64: ragged shapes, ranks, blocks, strides, mixed dtypes, norms."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from lane import DEVICE, DTYPES, TOLERANCE
from streammerge.kernels import forget, project, ran, reference
from streammerge.kernels.reference import ProjectNorms

# bf16 weights are read right everywhere; the interpreter does not round to bf16 but cuts off
READ = [torch.float32, torch.float16, torch.bfloat16]
LAM = 0.7
ODD = (1, 41, 123)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def basis(width: int, rank: int, seed: int = 7) -> torch.Tensor:
    return torch.linalg.qr(randn(width, width, seed=seed).cpu())[0][:, :rank].to(DEVICE)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between rows and columns."""
    wide = torch.zeros(*(2 * n for n in x.shape), dtype=x.dtype, device=x.device)
    return wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)


def call(out, width, ranks, *, scaled=True, dtypes=(torch.float32,) * 3):
    """Weights, a basis a block, and both diagonals (no D_col where not `scaled`)."""
    three = [randn(out, width, seed=n, dtype=dtype) for n, dtype in enumerate(dtypes, start=1)]
    bases = [basis(width, rank, seed=10 + b) for b, rank in enumerate(ranks)]
    rows, cols = randn(out, seed=4).abs() + 0.5, randn(width, seed=5).abs() + 0.5
    return (*three, bases, rows, cols if scaled else torch.ones_like(cols), LAM)


def exact(lrm, itm, base, bases, rows, cols, lam):
    """The formula of method.md, section 2, in float64: scale first, project second."""
    delta = rows.double()[:, None] * (itm.double() - base.double()) * cols.double()
    parts = delta.chunk(len(bases)) if bases else [delta]
    kept = [p - (p @ u.double()) @ u.double().T for p, u in zip(parts, bases, strict=True)] if bases else parts
    return lrm.double() + lam * torch.cat(kept)


def check(given, dtype=torch.float32):
    """Kernel against float64 and against the twin: W* and every norm."""
    forget()
    merged, told = project(*given, dtype, impl="triton")
    assert ran() == {"project: triton": 1}
    wanted, (twin, twins) = exact(*given), reference.project(*given, dtype)
    assert merged.dtype == dtype and merged.shape == wanted.shape
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    assert float((merged - wanted).norm() / wanted.norm()) <= TOLERANCE[torch.float32] + rounding / 2
    assert float((merged.double() - twin.double()).norm() / wanted.norm()) <= TOLERANCE[torch.float32] + rounding / 20
    found, other = ProjectNorms(*told.tolist()), ProjectNorms(*twins.tolist())
    floor = 1e-10 * other.delta  # of differences of nearly equal numbers: at full rank nothing is left but rounding
    for name in ("delta", "lost", "applied", "inside", "weight", "sampled"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=floor), name
    assert found.leak <= 1e-12 * found.sampled and other.leak <= 1e-12 * other.sampled
    before = given[0].to(dtype)
    assert found.changed == float((merged != before).sum()) and found.bad == other.bad == 0
    step = -(-(len(merged) // max(1, len(given[3]))) // 256)
    difference = (merged.double() - given[0].double()).chunk(len(given[3])) if given[3] else []
    written = sum(float((d[::step] @ u.double()).square().sum()) for d, u in zip(difference, given[3], strict=True))
    assert found.written == pytest.approx(written, rel=1e-3, abs=1e-11 * (other.weight + other.delta))
    return merged


@pytest.mark.parametrize("width", ODD)
@pytest.mark.parametrize("out", ODD)
def test_shapes_and_ranks(out, width):
    for rank in sorted({0, 1, min(7, width), width}):
        for scaled in (True, False):
            check(call(out, width, [rank], scaled=scaled))
    check(call(out, width, []))


@pytest.mark.parametrize("ranks", [(7, 1, 40), (41, 0, 3), (0, 0, 0)])
@pytest.mark.parametrize("out", [3, 123])
def test_row_blocks_with_bases_of_unequal_ranks(out, ranks):
    for scaled in (True, False):
        check(call(out, 41, ranks, scaled=scaled))


@pytest.mark.parametrize("dtypes", [
    *((one,) * 3 for one in READ), (torch.bfloat16, torch.float32, torch.float16), (torch.float16, *READ[1:]),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, dtypes):
    check(call(41, 123, [7], dtypes=dtypes), dtype)
    check(call(41, 123, [], dtypes=dtypes), dtype)


def test_strides_of_all_kinds():
    lrm, itm, base, bases, rows, cols, lam = call(123, 41, [7, 9, 3])
    wanted = check((lrm, itm, base, bases, rows, cols, lam))
    gaps = (*map(strided, (lrm, itm, base)), [strided(u) for u in bases], strided(rows), strided(cols), lam)
    turned = (lrm.T.contiguous().T, itm, base.T.contiguous().T, [u.T.contiguous().T for u in bases], rows, cols, lam)
    for given in (gaps, turned):
        assert torch.equal(check(given), wanted)


def test_several_tiles_in_every_direction():
    """More rows than a tile and than are checked for leaks, a ragged width, a rank over more than one tile."""
    check(call(300, 333, [100]))
    check(call(150, 260, []))


def test_a_split_width_adds_up(monkeypatch):
    kernels = import_module("streammerge.kernels.projection")
    monkeypatch.setattr(kernels, "LEAST_SPAN", 30)
    grids = []
    plain = kernels.product_kernel
    monkeypatch.setattr(kernels, "product_kernel", type("Spy", (), {
        "__getitem__": lambda self, grid: grids.append(grid[1]) or plain[grid],
    })())  # fmt: skip
    check(call(41, 123, [7]))
    check(call(41, 161, [7], scaled=False))
    assert grids == [4, 4, 3]  # D_col takes a second product, for ‖Δ U‖; the last split of each is a ragged one


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_leak_of_a_basis_that_is_not_orthonormal(blocks):
    """A leak that is no rounding, measured on a part of the rows: λ is not in it, D_row is."""
    given = call(600, 41, [7] * blocks)
    given[3][:] = [0.9 * u for u in given[3]]
    found, twin = (ProjectNorms(*project(*given, torch.float32, impl=i)[1].tolist()) for i in ("triton", "torch"))
    assert found.leak == pytest.approx(twin.leak, rel=1e-4) and found.leak > 1e-3 * found.sampled


def test_overflow_is_counted():
    lrm, itm, base, bases, rows, cols, _ = call(41, 123, [7])
    merged, told = project(lrm, itm, base, bases, rows, cols, 1e7, torch.float16, impl="triton")
    bad = int((~merged.isfinite()).sum())
    assert 0 < bad < merged.numel() and ProjectNorms(*told.tolist()).bad == bad


def test_empty_weights():
    merged, told = project(*call(0, 41, []), torch.float32, impl="triton")
    assert merged.shape == (0, 41) and not told.any()
