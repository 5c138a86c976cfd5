"""The torch twin of every kernel: its spec, fallback, oracle and baseline.

Shapes: T tokens, d features, N rows, r rank, H query heads, K key/value heads, D head dimension. All arithmetic is
fp32 (fp64 when given fp64), whatever the dtype of the inputs; one rounding at the end. Each function says what it
holds in memory beyond its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32: what a chunked loop below holds at a time
_CACHE_ELEMENTS = 1 << 18  # 1 MiB: on a CPU, row scoring is bound by memory unless a chunk stays in the cache


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: half-precision inputs are upcast, fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def gram_update(cov: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
    """C += X[index]ᵀ X[index] in place, for the covariance of Ω_think features (method.md, section 2).

    cov [d, d] fp32 or fp64, symmetric; x [N, d] of any float dtype; index [n] int64 chooses rows (None: all). Returns
    cov. Holds one upcast copy of the chosen rows.
    """
    x = (x if index is None else x[index]).to(cov.dtype)
    return cov.addmm_(x.T, x)


def row_gram(x: Tensor, index: Tensor | None = None) -> Tensor:
    """X[index] X[index]ᵀ [n, n]: inner products of feature rows; arguments as above. Holds one upcast copy of them."""
    x = _wide(x if index is None else x[index])
    return x @ x.T


def project(
    lrm: Tensor,
    itm: Tensor,
    base: Tensor,
    blocks: Sequence[Tensor],
    rows: Tensor,
    cols: Tensor,
    lam: float,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """W* = W_R + λ (D_row (W_I − W_B) D_col)(I − U Uᵀ), scale first, then project (Eq. 8 with Eq. 16).

    lrm, itm, base [out, in]; blocks: B orthonormal bases [in, r_b], one for each of B equal row blocks of the weight
    (B = 1 for all modules but v_proj; B = 0 projects nothing); rows [out] and cols [in] are the diagonals of D.
    Returns (W* in fp32, or in fp64 where a model is, not yet rounded; norms [5] in fp64: the squares of ‖Δ‖, ‖Δ U‖,
    ‖Δ⊥_α‖, ‖D Δ D U‖, ‖Δ⊥_α U‖).
    Holds W* and a few chunks of rows.
    """
    out, width = lrm.shape
    per_block = out // max(1, len(blocks))
    step = max(1, min(per_block, chunk_elements // max(1, width)))
    dtype = torch.float64 if torch.float64 in (lrm.dtype, itm.dtype, base.dtype) else torch.float32
    merged = torch.empty(lrm.shape, dtype=dtype, device=lrm.device)
    norms = torch.zeros(5, dtype=torch.float64, device=lrm.device)
    for start, stop, basis in _row_chunks(out, step, [b.to(dtype) for b in blocks]):
        delta = itm[start:stop].to(dtype) - base[start:stop].to(dtype)
        norms[0] += delta.square().sum(dtype=torch.float64)
        if basis is not None and basis.shape[1]:
            norms[1] += (delta @ basis).square().sum(dtype=torch.float64)
        delta *= rows[start:stop, None]
        delta *= cols
        if basis is not None and basis.shape[1]:
            inside = delta @ basis
            delta -= inside @ basis.T
            norms[3] += inside.square().sum(dtype=torch.float64)
            norms[4] += (delta @ basis).square().sum(dtype=torch.float64)
        norms[2] += delta.square().sum(dtype=torch.float64)
        merged[start:stop] = torch.add(lrm[start:stop].to(dtype), delta, alpha=lam)
    return merged, norms


def _row_chunks(out: int, step: int, blocks: Sequence[Tensor]):
    """(start, stop, basis) over all rows; no chunk crosses a block."""
    if not blocks:
        yield from ((start, min(start + step, out), None) for start in range(0, out, step))
        return
    height = out // len(blocks)
    for b, basis in enumerate(blocks):
        for start in range(b * height, (b + 1) * height, step):
            yield start, min(start + step, (b + 1) * height), basis


def span_mass(q: Tensor, k: Tensor, at: Tensor, spans: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """Σ_τ softmax(q kᵀ)[t, τ] spans[τ, :] for chosen rows t: attention with the value replaced (Eqs. 9 and 10).

    q [H, n, D]: queries of the chosen rows, after rotary embedding; k [K, T, D]: keys of the whole sample; at [n]: the
    rows' positions, ascending; spans [T, m]: a column a span, its indicator or any other weights. Query head h reads
    key head h // (H / K). A window keeps the last `window` positions, the row's own included. Returns [H, n, m] fp32.
    Scores one chunk of rows at a time against the columns that causality leaves them: never [H, T, T].
    """
    values = _wide(spans)
    values = torch.cat([values, values.new_ones(len(values), 1)], dim=1)  # the last column sums up the denominator
    keys = _wide(k).transpose(1, 2)  # [K, D, T]
    budget = _CHUNK_ELEMENTS if q.is_cuda else _CACHE_ELEMENTS
    step = max(1, budget // max(1, q.shape[0] * k.shape[1]))
    positions = at.tolist()
    parts = [
        _masses(q[:, i : i + step], keys, at[i : i + step], positions[i : i + step], values, scaling, window)
        for i in range(0, len(positions), step)
    ]
    return torch.cat(parts, dim=1) if parts else values.new_zeros(q.shape[0], 0, spans.shape[1])


def _masses(
    q: Tensor, keys: Tensor, at: Tensor, positions: list[int], values: Tensor, scaling: float, window: int | None
) -> Tensor:
    """One chunk of `span_mass`: rows at ascending positions, given on the device and as numbers."""
    heads, n, dim = q.shape
    first = 0 if window is None else max(0, positions[0] - window + 1)
    stop = positions[-1] + 1
    groups = (_wide(q) * scaling).reshape(keys.shape[0], -1, dim)  # [K, (H/K) n, D]
    scores = (groups @ keys[:, :, first:stop]).view(heads, n, stop - first)
    columns = torch.arange(first, stop, device=q.device)
    hidden = columns > at[:, None]
    if window is not None:
        hidden |= columns <= at[:, None] - window
    scores.masked_fill_(hidden, float("-inf"))
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    mixed = scores @ values[first:stop]
    return mixed[..., :-1] / mixed[..., -1:]


def attended_inputs(q: Tensor, k: Tensor, at: Tensor, x: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """A_h[t] X: the attention-averaged inputs of v_proj at chosen rows (findings.md, 3).

    As `span_mass` with the inputs x [T, d] in place of the spans. Returns [H, n, d] fp32.
    """
    return span_mass(q, k, at, x, scaling, window)
