"""The Gram kernel against its twin and float64, with the launch table's tiles and with tiny ones.

Tiles of 16 x 16 make several tiles, and more than one square of tiles, out of sizes that the interpreter can afford.
"""

from __future__ import annotations

import pytest
import torch
from lane import DEVICE, DTYPES, TOLERANCE
from streammerge.kernels import gram_update, row_gram

ODD = [1, 41, 123]


@pytest.fixture
def tiny(monkeypatch):
    from streammerge.kernels import gram

    monkeypatch.setattr(gram, "launch_for", lambda *_: gram.Launch(16, 16, 1, 2))
    monkeypatch.setattr(gram, "GROUP", 2)


@pytest.fixture(params=["table", "tiny"])
def tiles(request):
    if request.param == "tiny":
        request.getfixturevalue("tiny")


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def symmetric(width: int) -> torch.Tensor:
    start = randn(width, width, seed=1)
    return start + start.T


def picked(rows: int, n: int | None) -> torch.Tensor | None:
    """n rows of many in no order, some of them twice; None for all of them in order."""
    return None if n is None else torch.randint(rows, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Products of 16-bit numbers are exact in fp32 and so are the sums: fp32's tolerance holds for every input."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    error = float((found.double() - wanted).norm() / max(float(wanted.norm()), 1e-30))
    assert error <= TOLERANCE[torch.float32], error


def checked_update(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """gram_update on a matrix that is not zero, against float64 and the twin; exactly symmetric."""
    start = symmetric(x.shape[1])
    rows = (x if index is None else x[index]).double()
    cov, twin = start.clone(), start.clone()
    assert gram_update(cov, x, index, impl="triton") is cov
    close(cov, start.double() + rows.T @ rows)
    close(cov, gram_update(twin, x, index, impl="torch").double())
    assert torch.equal(cov, cov.T)
    return cov


def checked_row_gram(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    rows = (x if index is None else x[index]).double()
    found = row_gram(x, index, impl="triton")
    close(found, rows @ rows.T)
    close(found, row_gram(x, index, impl="torch").double())
    assert torch.equal(found, found.T)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [None, 50])
@pytest.mark.parametrize("width", ODD)
@pytest.mark.parametrize("rows", ODD)
@pytest.mark.usefixtures("tiles")
def test_odd_shapes(rows, width, chosen, dtype):
    x, index = randn(rows, width, dtype=dtype), picked(rows, chosen)
    checked_update(x, index)
    checked_row_gram(x, index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [150, 2050])
def test_several_tiles_of_the_table(width, dtype):
    """2050 is past the width from which the tiles are the large ones."""
    checked_update(randn(width, width, dtype=dtype)[:40], picked(40, 30))
    checked_row_gram(randn(width, 40, dtype=dtype), picked(width, width - 10))


@pytest.mark.usefixtures("tiny")
def test_every_tile_is_taken_once():
    x = torch.ones(1, 16 * 9, device=DEVICE)
    cov = torch.zeros(16 * 9, 16 * 9, device=DEVICE)
    gram_update(cov, x, impl="triton")
    assert torch.equal(cov, torch.ones_like(cov)), "a tile was left out or added twice"


@pytest.mark.parametrize("layout", ["transposed", "gaps", "column", "rows apart"])
def test_strides(layout):
    views = {
        "transposed": randn(41, 123).T,
        "gaps": randn(246, 82)[::2, ::2],
        "column": randn(123, 1).expand(123, 41),
        "rows apart": randn(123, 2, 41)[:, 1],
    }
    for index in (None, picked(123, 50), torch.arange(123, device=DEVICE)[::3]):
        checked_update(views[layout], index)
        checked_row_gram(views[layout], index)


def test_a_transposed_or_padded_covariance():
    x, wide = randn(41, 41), torch.zeros(41, 96, device=DEVICE)
    for cov in (wide[:, :41], torch.zeros(41, 41, device=DEVICE).T):
        gram_update(cov, x, impl="triton")
        close(cov, x.double().T @ x.double())
    assert not wide[:, 41:].any(), "nothing is written beside the matrix"


@pytest.mark.parametrize("rows, index", [(0, None), (5, []), (0, [])])
def test_empty(rows, index):
    x = randn(rows, 41)
    index = None if index is None else torch.tensor(index, dtype=torch.long, device=DEVICE)
    start = symmetric(41)
    cov = start.clone()
    assert gram_update(cov, x, index, impl="triton") is cov
    assert torch.equal(cov, start)
    assert row_gram(x, index, impl="triton").shape == (0, 0)
    assert gram_update(torch.zeros(0, 0, device=DEVICE), x[:, :0], index, impl="triton").shape == (0, 0)
    none = row_gram(randn(5, 0), impl="triton")
    assert torch.equal(none, torch.zeros(5, 5, device=DEVICE))


def test_the_same_call_gives_the_same_bits():
    x, index = randn(123, 41), picked(123, 50)
    assert torch.equal(checked_update(x, index), checked_update(x, index))


def test_a_batch_gathered_inside_equals_its_rows_gathered_before():
    x, index = randn(3, 41, 123), torch.tensor([0, 5, 40, 41 + 7, 82 + 40], device=DEVICE)
    inside, before = torch.zeros(2, 123, 123, device=DEVICE)
    gram_update(inside, x.flatten(0, 1), index, impl="triton")
    gram_update(before, x.flatten(0, 1)[index], impl="triton")
    assert torch.equal(inside, before)
