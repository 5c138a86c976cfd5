"""linalg and bases against float64. A basis is judged by the energy that it leaves out, never by angles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from streammerge import bases, linalg
from streammerge.bases import build_bases, feature_kind
from streammerge.capture import Features
from streammerge.errors import InputError
from streammerge.recipe import Basis

ORTHONORMAL = 1e-5  # ‖UᵀU − I‖ elementwise, fp32
EXCESS = 0.01  # residual energy over the float64 optimum of the same rank, of randomized bases


def gaussian(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, width: int, power: float, seed: int = 0) -> torch.Tensor:
    """Rows whose singular values fall off as n^-power."""
    k = min(rows, width)
    left = torch.linalg.qr(gaussian(rows, k, seed))[0]
    right = torch.linalg.qr(gaussian(width, k, seed + 1))[0]
    return (left * torch.arange(1, k + 1).float() ** -power) @ right.T


SHAPES = {
    "fewer rows": gaussian(17, 41),
    "more rows": gaussian(123, 41),
    "square": gaussian(41, 41),
    "one row": gaussian(1, 41),
    "one feature": gaussian(41, 1),
    "rank 5 of many rows": gaussian(60, 5) @ gaussian(5, 41, 1),
    "rank 5 of few rows": gaussian(30, 5) @ gaussian(5, 41, 1),
    "duplicates": gaussian(4, 41).repeat(6, 1),
    "steep": decaying(60, 41, 3.0),
    "tiny numbers": gaussian(17, 41) * 1e-12,
    "large numbers": gaussian(17, 41) * 1e6,
}
RANKS = {"fewer rows": 17, "more rows": 41, "square": 41, "one row": 1, "one feature": 1, "rank 5 of many rows": 5,
         "rank 5 of few rows": 5, "duplicates": 4, "steep": 41, "tiny numbers": 17, "large numbers": 17}  # fmt: skip


def assert_orthonormal(u: torch.Tensor) -> None:
    assert u.dtype == torch.float32
    gap = (u.T @ u - torch.eye(u.shape[1])).abs()
    assert not gap.numel() or float(gap.max()) <= ORTHONORMAL


def residual(rows: torch.Tensor, u: torch.Tensor) -> float:
    """‖H (I − U Uᵀ)‖² / ‖H‖² in float64."""
    h, u = rows.double(), u.double()
    return float((h - (h @ u) @ u.T).square().sum() / h.square().sum())


def optimum(rows: torch.Tensor, rank: int) -> float:
    """The least residual that any basis of `rank` can have."""
    energies = torch.linalg.svdvals(rows.double()).square()
    return float(energies[rank:].sum() / energies.sum())


@pytest.mark.parametrize("name", SHAPES)
def test_exact_rows(name):
    rows = SHAPES[name]
    found = linalg.exact_rows(rows)
    wanted = torch.linalg.svdvals(rows.double()).square()
    assert found.vectors.shape == (rows.shape[1], min(rows.shape))
    torch.testing.assert_close(found.energies.double(), wanted, rtol=1e-4, atol=1e-6 * float(wanted[0]))
    assert found.total == pytest.approx(float(wanted.sum()), rel=1e-6)
    assert linalg.numerical_rank(found, is_cov=False) == RANKS[name]
    assert_orthonormal(found.vectors[:, : RANKS[name]])
    assert residual(rows, found.vectors[:, : RANKS[name]]) < 1e-9


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"steep"}))  # C squares the condition: a steep tail is lost
def test_exact_covariance(name):
    rows = SHAPES[name]
    found = linalg.exact_covariance(rows.T @ rows)
    wanted = torch.linalg.svdvals(rows.double()).square()
    torch.testing.assert_close(found.energies[: len(wanted)].double(), wanted, rtol=1e-3, atol=1e-6 * float(wanted[0]))
    assert found.total == pytest.approx(float(wanted.sum()), rel=1e-5)
    rank = linalg.numerical_rank(found, is_cov=True)
    assert rank == RANKS[name]
    assert_orthonormal(found.vectors[:, :rank])
    assert residual(rows, found.vectors[:, :rank]) < 1e-6
    assert bool((found.energies >= 0).all())


def test_nothing_but_zeros():
    for spectrum, is_cov in ((linalg.exact_rows(torch.zeros(5, 9)), False),
                             (linalg.exact_covariance(torch.zeros(9, 9)), True)):  # fmt: skip
        assert spectrum.total == 0
        assert linalg.numerical_rank(spectrum, is_cov=is_cov) == 0
        assert linalg.energy_rank(spectrum, 0.99) == 0


@pytest.mark.parametrize("outlier", [1, 100])
@pytest.mark.parametrize("share", [0.5, 0.97, 0.999])
@pytest.mark.parametrize("power", [0.0, 0.3, 0.7, 1.5, 3.0])
@pytest.mark.parametrize("rows, width", [(120, 260), (200, 200)])
def test_leading_rows_are_the_optimum(rows, width, power, share, outlier):
    """The Gram's squared condition does not show up to the share that bases take from it."""
    h = decaying(rows, width, power)
    left, energies, right = torch.linalg.svd(h, full_matrices=False)
    energies[0] *= outlier
    h = (left * energies) @ right
    found = linalg.leading_rows(h, share)
    rank = len(found.energies)
    assert found.vectors.shape == (width, rank)
    assert_orthonormal(found.vectors)
    wanted = torch.linalg.svdvals(h.double()).square()
    torch.testing.assert_close(found.energies.double(), wanted[:rank], rtol=1e-3, atol=1e-6 * float(wanted[0]))
    assert residual(h, found.vectors) == pytest.approx(optimum(h, rank), rel=1e-4)
    assert residual(h, found.vectors) <= 1 - share + 1e-6
    assert optimum(h, rank - 1) > 1 - share - 1e-6, "one direction less would have done"


def test_a_gram_refuses_a_share_that_it_does_not_resolve():
    with pytest.raises(ValueError, match="1.001"):
        linalg.leading_rows(gaussian(17, 41), 1.001)


@pytest.mark.parametrize("is_cov", [False, True])
@pytest.mark.parametrize("power", [0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("rows, width", [(300, 200), (120, 260)])
def test_randomized_is_near_the_optimum(rows, width, power, is_cov):
    h = decaying(rows, width, power)
    operand = h.T @ h if is_cov else h
    generator = torch.Generator().manual_seed(1)
    found = linalg.randomized(operand, 24, generator, is_cov=is_cov, oversample=16, iterations=2)
    assert found.vectors.shape == (width, 24) and found.energies.shape == (24,)
    assert_orthonormal(found.vectors)
    best = optimum(h, 24)
    assert best <= residual(h, found.vectors) + 1e-6
    assert residual(h, found.vectors) <= best * (1 + EXCESS) + 1e-6
    assert float(found.energies.sum()) / found.total == pytest.approx(1 - best, abs=EXCESS)


def test_power_iterations_matter():
    """Without them a slow spectrum is missed: the figure above is no accident."""
    h = decaying(300, 200, 0.6)
    plain = linalg.randomized(h, 24, torch.Generator().manual_seed(1), is_cov=False, oversample=1, iterations=0)
    assert residual(h, plain.vectors) > optimum(h, 24) * (1 + EXCESS)


@pytest.mark.parametrize("is_cov", [False, True])
def test_randomized_takes_ranks_beyond_the_operand(is_cov):
    h = gaussian(7, 41)
    operand = h.T @ h if is_cov else h
    found = linalg.randomized(operand, 100, torch.Generator(), is_cov=is_cov, oversample=16, iterations=1)
    assert residual(h, found.vectors[:, :7]) < 1e-6
    assert linalg.numerical_rank(found, is_cov=is_cov) == 7


@pytest.mark.parametrize("is_cov", [False, True])
def test_the_seed_decides(is_cov):
    h = decaying(80, 60, 0.3)
    operand = h.T @ h if is_cov else h

    def draw(seed):
        options = {"is_cov": is_cov, "oversample": 2, "iterations": 0}
        return linalg.randomized(operand, 8, torch.Generator().manual_seed(seed), **options).vectors

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("shape", [(41, 1), (41, 17), (123, 123)])
def test_orthonormalise(shape):
    x = gaussian(*shape)
    q = linalg.orthonormalise(x)
    assert q.shape == x.shape
    assert_orthonormal(q)
    assert residual(x.T, q) < 1e-9


def spectrum(*energies: float, total: float | None = None) -> linalg.Spectrum:
    values = torch.tensor(energies)
    return linalg.Spectrum(torch.eye(8)[:, : len(energies)], values, float(values.sum()) if total is None else total)


@pytest.mark.parametrize("found, share, rank", [
    (spectrum(4.0, 3.0, 2.0, 1.0), 0.4, 1),
    (spectrum(4.0, 3.0, 2.0, 1.0), 0.41, 2),
    (spectrum(4.0, 3.0, 2.0, 1.0), 0.7, 2),
    (spectrum(4.0, 3.0, 2.0, 1.0), 1.0, 4),
    (spectrum(4.0, 0.0, 0.0), 1.0, 1),
    (spectrum(4.0, 3.0, total=10.0), 0.7, 2),
    (spectrum(4.0, 3.0, total=10.0), 0.71, None),
    (spectrum(total=0.0), 0.99, 0),
    (spectrum(0.0, 0.0), 0.99, 0),
])  # fmt: skip
def test_energy_rank(found, share, rank):
    assert linalg.energy_rank(found, share) == rank


@pytest.mark.parametrize("energies, rows, cov", [
    ((), 0, 0), ((0.0,), 0, 0), ((1.0,), 1, 1), ((1.0, 1e-5), 2, 2), ((1.0, 1e-8), 2, 1), ((1.0, 1e-13), 1, 1),
])  # fmt: skip
def test_numerical_rank(energies, rows, cov):
    assert linalg.numerical_rank(spectrum(*energies), is_cov=False) == rows
    assert linalg.numerical_rank(spectrum(*energies), is_cov=True) == cov


# ---- bases


class Captured:
    """Stands for FeatureCapture: one site and no value heads, or some."""

    def __init__(self, rows: torch.Tensor, kind: str = "rows", values: int = 0):
        def features() -> Features:
            found = Features.empty(rows.shape[1], kind, torch.device("cpu"))
            for part in rows.split(10) if len(rows) else [rows]:
                found.add(part)
            return found

        self.sites = {"attn_in": features()}
        self.values = [features() for _ in range(values)]


def basis_of(rows: torch.Tensor, kind: str = "rows", **options):
    return build_bases(Captured(rows, kind), Basis(**options), seed=0, layer=0).sites["attn_in"]


METHODS = {"qr": "rows", "randomized": "rows", "covariance": "covariance", "auto": "rows"}


@pytest.mark.parametrize("method, kind", METHODS.items())
@pytest.mark.parametrize("options", [{"rank": "exact"}, {"energy": 0.9}, {"rank": "fixed", "size": 9}])
def test_methods_agree_on_the_residual(method, kind, options):
    h = decaying(90, 60, 0.7)
    assert feature_kind(Basis(method=method))(60, 40) == kind
    found = basis_of(h, kind, method=method, **options)
    exact = basis_of(h, **{**options, "method": "qr"})
    assert_orthonormal(found.u)
    assert abs(found.u.shape[1] - exact.u.shape[1]) <= 1
    assert residual(h, found.u) == pytest.approx(residual(h, exact.u), rel=0.05, abs=1e-6)
    assert found.energy == pytest.approx(1 - residual(h, found.u), abs=1e-5)
    assert found.count == 90
    wanted = {"exact": 60, "energy": None, "fixed": 9}[options.get("rank", "energy")]
    assert wanted is None or found.u.shape[1] == wanted
    if "energy" in options:
        assert residual(h, found.u) <= 0.1 + 1e-5
        assert optimum(h, exact.u.shape[1] - 1) > 0.1, "one direction less would have done"


@pytest.mark.parametrize("is_cov", [False, True])
def test_the_rank_doubles_until_the_energy_is_reached(monkeypatch, is_cov):
    monkeypatch.setattr(bases, "_DENSE", 16)
    asked = []
    plain = linalg.randomized
    monkeypatch.setattr(linalg, "randomized", lambda op, rank, *a, **k: asked.append(rank) or plain(op, rank, *a, **k))
    h = decaying(420, 400, 0.35)
    found = basis_of(h, "covariance" if is_cov else "rows", energy=0.95)
    assert asked == [64, 128, 256, 400]
    assert residual(h, found.u) <= 0.05 + 1e-4
    exact = basis_of(h, method="qr", energy=0.95).u.shape[1]
    assert 256 < exact <= found.u.shape[1] <= exact + 2
    asked.clear()
    steep = basis_of(decaying(420, 400, 2.0), "covariance" if is_cov else "rows", energy=0.95)
    assert asked == [64] and steep.u.shape[1] < 10


@pytest.mark.parametrize("options, passes, grams", [
    ({"energy": 0.97}, [64], 1), ({"energy": 0.999}, [64], 1), ({"energy": 0.9995}, [64, 128, 256, 300], 0),
    ({"energy": 0.97, "method": "randomized"}, [64, 128, 256, 300], 0), ({"energy": 0.3}, [64], 0),
    ({"rank": "fixed", "size": 100}, [100], 0), ({"rank": "exact"}, [], 0),
])  # fmt: skip
def test_few_rows_are_solved_by_their_gram_where_one_pass_is_not_enough(monkeypatch, options, passes, grams):
    monkeypatch.setattr(bases, "_DENSE", 16)
    asked, plain, taken, gram = [], linalg.randomized, [], linalg.leading_rows
    monkeypatch.setattr(linalg, "randomized", lambda op, rank, *a, **k: asked.append(rank) or plain(op, rank, *a, **k))
    monkeypatch.setattr(linalg, "leading_rows", lambda *a: taken.append(a) or gram(*a))
    h = decaying(300, 400, 0.35)
    found = basis_of(h, **options)
    assert (asked, len(taken)) == (passes, grams)
    assert_orthonormal(found.u)
    assert found.energy == pytest.approx(1 - residual(h, found.u), abs=1e-5)
    if grams:
        assert found.u.shape[1] == basis_of(h, method="qr", **options).u.shape[1]
        asked.clear(), taken.clear()
        monkeypatch.setattr(bases, "_GRAM_ROWS", 299)
        assert basis_of(h, **options).u.shape[1] >= found.u.shape[1]
        assert len(asked) > 1 and not taken, "too many rows for a Gram matrix"


def test_large_problems_are_randomized_and_small_ones_dense(monkeypatch):
    asked = []
    plain = linalg.randomized
    monkeypatch.setattr(linalg, "randomized", lambda *a, **k: asked.append(a[1]) or plain(*a, **k))
    basis_of(decaying(50, 40, 1.0))
    assert asked == []
    basis_of(decaying(50, 40, 1.0), method="randomized", rank="fixed", size=7)
    assert asked == [7]
    monkeypatch.setattr(bases, "_DENSE", 16)
    basis_of(decaying(50, 40, 1.0), rank="exact")
    basis_of(decaying(50, 40, 1.0), method="qr")
    assert asked == [7]
    assert bases._basis(Captured(decaying(50, 40, 1.0)).sites["attn_in"], Basis(), torch.Generator()).u.shape[1] > 3
    assert asked[1:] == [40]


@pytest.mark.parametrize("options", [{}, {"rank": "exact"}, {"rank": "fixed", "size": 3}, {"method": "randomized"},
                                     {"method": "covariance"}])  # fmt: skip
def test_zero_features_protect_nothing(options):
    kind = "covariance" if options.get("method") == "covariance" else "rows"
    found = basis_of(torch.zeros(12, 20), kind, **options)
    assert found.u.shape == (20, 0) and found.energy == 1.0


def test_fixed_never_exceeds_the_rank_of_the_features():
    assert basis_of(gaussian(4, 41).repeat(6, 1), rank="fixed", size=30).u.shape[1] == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(value):
    h = gaussian(5, 9)
    h[2, 3] = value
    with pytest.raises(InputError, match="compute_dtype"):
        basis_of(h)


def test_bases_are_a_function_of_features_seed_and_layer():
    h = decaying(90, 60, 0.2)
    options = Basis(method="randomized", rank="fixed", size=5, oversample=1, power_iterations=0)

    def draw(seed, layer):
        return build_bases(Captured(h, values=2), options, seed, layer)

    one, two = draw(0, 0), draw(0, 0)
    assert torch.equal(one.sites["attn_in"].u, two.sites["attn_in"].u)
    assert all(torch.equal(a.u, b.u) for a, b in zip(one.values, two.values, strict=True))
    assert not torch.equal(one.values[0].u, one.values[1].u), "every basis draws its own test matrix"
    assert not torch.equal(one.sites["attn_in"].u, draw(1, 0).sites["attn_in"].u)
    assert not torch.equal(one.sites["attn_in"].u, draw(0, 1).sites["attn_in"].u)


def test_which_bases_a_module_gets():
    with_values = build_bases(Captured(gaussian(5, 9), values=2), Basis(), 0, 0)
    assert with_values.of("v") == with_values.values and len(with_values.values) == 2
    assert with_values.of("q") == with_values.of("k") == (with_values.sites["attn_in"],)
    assert with_values.of("o") == ()
    without = dataclasses.replace(with_values, values=())
    assert without.of("v") == without.of("q")


@pytest.mark.parametrize("rows, width, method, kind", [
    (40, 41, "auto", "rows"), (41, 41, "auto", "rows"), (42, 41, "auto", "covariance"),
    (42, 41, "qr", "rows"), (42, 41, "randomized", "rows"), (2, 41, "covariance", "covariance"),
])  # fmt: skip
def test_rows_or_covariance(rows, width, method, kind):
    assert feature_kind(Basis(method=method))(width, rows) == kind
