"""The span-mass kernel against float64 and its twin: odd shapes, groups, windows, spans, strides, uneven batches."""

from __future__ import annotations

import pytest
import torch
from lane import DEVICE, DTYPES, TOLERANCE
from streammerge.kernels import KernelUnavailable, span_mass

ROWS = {0: tuple(range(41)), 2: (3,), 3: (0, 17, 18, 39, 40)}  # sample 1 of 4 has none; sample 0 takes several tiles


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(heads=4, kv_heads=2, tokens=41, dim=12, rows=ROWS, m=3, dtype=torch.float32):
    """q, k, sample, at, spans: q and k as transformers lays them out, heads inside positions."""
    batch = 1 + max(rows)
    q = 3 * randn(batch, tokens, heads, dim, seed=0).transpose(1, 2)
    k = randn(batch, tokens, kv_heads, dim, seed=1).transpose(1, 2)
    sample, at = torch.tensor([(b, t) for b, held in rows.items() for t in held]).T
    spans = (randn(batch, tokens, m, seed=2) > 0).float() / 3
    return [x.to(DEVICE) for x in (q.to(dtype), k.to(dtype), sample, at, spans)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(given, scaling: float = 0.3, window: int | None = None) -> torch.Tensor:
    """The kernel within the tolerance of float64 on the same inputs, and of the twin on them."""
    found = span_mass(*given, scaling, window, impl="triton")
    assert found.dtype == torch.float32
    exact = span_mass(*(x.double() if x.is_floating_point() else x for x in given), scaling, window, impl="torch")
    twin = span_mass(*given, scaling, window, impl="torch")
    assert max(error(found, exact), error(found, twin.double())) <= TOLERANCE[given[0].dtype]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 41, 123])
@pytest.mark.parametrize("dim", [1, 41, 123])
def test_odd_shapes(dim, tokens, dtype):
    check(call(tokens=tokens, dim=dim, rows={0: range(0, tokens, 2), 1: (tokens - 1,)}, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 300])
def test_head_dimensions(dim, dtype):
    check(call(tokens=70, dim=dim, rows={0: (0, 33, 69)}, dtype=dtype), dim**-0.5)


@pytest.mark.parametrize("window", [None, 1, 5, 24, 1000])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (6, 2), (4, 1)])
def test_groups_and_windows(heads, kv_heads, window):
    check(call(heads, kv_heads), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 24, 70, 1000])
def test_windows_over_many_tiles(window, dtype):
    """Rows far apart in one tile: early columns are outside the window of the late rows, late ones past the early."""
    check(call(2, 1, tokens=200, dim=16, rows={0: (0, 5, 66, 128, 199), 1: (150,)}, dtype=dtype), window=window)


@pytest.mark.parametrize("heads, kv_heads", [(80, 1), (14, 2), (65, 1)])
def test_groups_that_do_not_fill_a_tile_or_overflow_it(heads, kv_heads):
    check(call(heads, kv_heads, tokens=9, rows={0: (0, 3, 8), 1: (8,)}))


@pytest.mark.parametrize("m", [1, 3, 8, 9, 20])
def test_spans(m):
    """Any weights, in any number; and columns without any, for which the kernel only sums the denominator."""
    *given, spans = call(tokens=123, rows={0: range(0, 123, 10), 1: (122,)}, m=m)
    spans *= torch.rand_like(spans) - 0.5
    spans[:, 20:100] = 0
    check([*given, spans])
    check([*given, spans.to(torch.float16)])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("column", [0, 31, 63, 64, 95, 127, 128, 199])
def test_a_span_of_one_column_is_found_in_its_tile(column, window):
    """Sample 1 alone has weights, in a single column: the others, and all other tiles of columns, have none."""
    *given, spans = call(2, 1, tokens=200, dim=16, rows={0: (5, 199), 1: (100, 140, 199)}, m=1)
    spans.zero_()[1, column] = 1
    assert float(check([*given, spans], 0.02, window).amax()) > 0 or (window and column < 31)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Heads inside positions, positions inside heads, gaps everywhere: the same masses to the last bit."""
    q, k, sample, at, spans = call(dtype=dtype)
    found = check([q, k, sample, at, spans])

    def apart(x):
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]

    for change in (torch.Tensor.contiguous, apart):
        assert torch.equal(span_mass(change(q), change(k), sample, at, apart(spans), 0.3, impl="triton"), found)
    both = torch.stack([sample, at], dim=1)
    assert torch.equal(span_mass(q, k, both[:, 0], both[:, 1], spans, 0.3, impl="triton"), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    q, k, *rest = call(dtype=dtype)
    check([q * 1000, k, *rest], 1.0)


def test_what_lies_right_of_a_row_is_never_read():
    q, k, sample, at, spans = call(rows={0: (0, 7), 1: (3, 4, 20), 2: (40,)})
    clean = check([q, k, sample, at, spans])
    for b, last in enumerate((7, 20, 40)):
        q[b, :, last + 1 :] = k[b, :, last + 1 :] = spans[b, last + 1 :] = float("nan")
    assert torch.equal(span_mass(q, k, sample, at, spans, 0.3, impl="triton"), clean)


def test_a_sample_alone_gives_the_same_bits_as_in_a_batch():
    q, k, sample, at, spans = call()
    together = span_mass(q, k, sample, at, spans, 0.3, impl="triton")
    for b in (0, 2, 3):
        alone = span_mass(q[b, None], k[b, None], sample[sample == b] * 0, at[sample == b], spans[b, None], 0.3,
                          impl="triton")  # fmt: skip
        assert torch.equal(alone, together[sample == b])


def test_no_rows_and_no_spans():
    q, k, sample, at, spans = call()
    assert span_mass(q, k, sample[:0], at[:0], spans, 0.3, impl="triton").shape == (0, 4, 3)
    assert span_mass(q, k, sample, at, spans[..., :0], 0.3, impl="triton").shape == (47, 4, 0)


def test_two_dtypes_are_the_twins():
    q, k, *rest = call()
    with pytest.raises(KernelUnavailable, match="k is torch.float16"):
        span_mass(q, k.half(), *rest, 0.3, impl="triton")
    assert torch.isfinite(span_mass(q, k.half(), *rest, 0.3)).all()
