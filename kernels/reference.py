"""The torch twin of every kernel: its spec, fallback, oracle and baseline.

Shapes: T tokens, d features, N rows, r rank, H query heads, K key/value heads, D head dimension. All arithmetic is
fp32 (fp64 when given fp64), whatever the dtype of the inputs; one rounding at the end. Each function says what it
holds in memory beyond its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of fp32: what a chunked loop below holds at a time
_PROJECT_ELEMENTS = 1 << 19  # 2 MiB: `project` on a CPU stays in the cache, but takes
_PROJECT_ROWS = 128  # rows at least where there is a basis, or it would do little but read U again for every chunk
CHECKED_ROWS = 256  # rows a block whose leak is measured
_CACHE_ELEMENTS = 1 << 18  # 1 MiB: on a CPU, row scoring is bound by memory unless a chunk stays in the cache


def _wide(x: Tensor) -> Tensor:
    """fp32 at least: half-precision inputs are upcast, fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _widest(*inputs: Tensor) -> torch.dtype:
    """What several inputs are computed in: fp32, or fp64 where one of them is."""
    return torch.float64 if torch.float64 in {x.dtype for x in inputs} else torch.float32


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


@dataclass(frozen=True)
class ProjectNorms:
    """What `project` measures on the way, as squares of Frobenius norms and counts; field order is the tensor's order.

    `leak`, `written` and `sampled` are checks: they see at most 256 evenly spaced rows of each block, and only the
    ratios leak / sampled and written / sampled mean something.
    """

    delta: float  # ‖Δ‖²
    lost: float  # ‖Δ U‖²
    applied: float  # ‖Δ⊥_α‖², before λ
    inside: float  # ‖D Δ D U‖²
    weight: float  # ‖W_R‖²
    sampled: float  # ‖D Δ D U‖² of the sampled rows
    leak: float  # ‖Δ⊥_α U‖² of the sampled rows, before W_R is added and rounded
    written: float  # ‖(W* − W_R) U‖² of the sampled rows, W* as written
    changed: float  # elements of W* that differ from W_R rounded to the same dtype, or are not finite
    bad: float  # elements of W* that are not finite


PROJECT_NORMS = tuple(field.name for field in fields(ProjectNorms))


def project(
    lrm: Tensor,
    itm: Tensor,
    base: Tensor,
    blocks: Sequence[Tensor],
    rows: Tensor,
    cols: Tensor,
    lam: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """W* = W_R + λ (D_row (W_I − W_B) D_col)(I − U Uᵀ), scale first, then project (Eq. 8 with Eq. 16).

    lrm, itm, base [out, in], of any float dtypes and strides; blocks: B orthonormal bases [in, r_b], one for each of B
    equal row blocks of the weight (B = 1 for all modules but v_proj; B = 0 projects nothing); rows [out] and cols [in]
    are the diagonals of D. Returns (W* [out, in] in `dtype`, rounded once; the fields of `ProjectNorms` in fp64).
    D_row commutes with the projection and comes last; without D_col one product serves ‖Δ U‖ and the projection.
    Holds W* in `dtype`, the bases in fp32, and a few chunks of rows.
    """
    wide = torch.float64 if torch.float64 in (lrm.dtype, itm.dtype, base.dtype) else torch.float32
    merged = torch.empty(lrm.shape, dtype=dtype, device=lrm.device)
    norms = torch.zeros(len(PROJECT_NORMS), dtype=torch.float64, device=lrm.device)
    rows, cols = rows.to(wide), None if bool((cols == 1).all()) else cols.to(wide)
    for part, check, basis in _row_chunks(lrm, [b.to(wide) for b in blocks]):
        three = (w[part].to(wide) for w in (lrm, itm, base))
        norms += _project_rows(merged[part], *three, basis, rows[part], cols, lam, check)
    return merged, norms


def _project_rows(
    merged: Tensor,
    lrm: Tensor,
    itm: Tensor,
    base: Tensor,
    basis: Tensor | None,
    rows: Tensor,
    cols: Tensor | None,
    lam: float,
    check: slice,
) -> Tensor:
    """One chunk of `project`, written to `merged`; `check` chooses the rows whose leak is measured."""
    told = dict.fromkeys(PROJECT_NORMS, torch.zeros((), dtype=torch.float64, device=merged.device))
    scale, kept = rows.double().square(), itm - base
    told["weight"], told["delta"] = row_squares(lrm).sum(), row_squares(kept).sum()
    if basis is not None:
        if cols is not None:
            told["lost"] = row_squares(kept @ basis).sum()
            kept *= cols
        product = kept @ basis
        inside = row_squares(product)
        told["lost"] = inside.sum() if cols is None else told["lost"]
        told["inside"], told["sampled"] = scale @ inside, scale[check] @ inside[check]
        kept.addmm_(product, basis.T, alpha=-1)
        told["leak"] = scale[check] @ row_squares(kept[check] @ basis)
    elif cols is not None:
        kept *= cols
    told["applied"] = scale @ row_squares(kept)
    merged.copy_(torch.addcmul(lrm, kept, rows[:, None], value=lam))
    written = merged.to(lrm.dtype)
    if basis is not None:
        told["written"] = row_squares((written[check] - lrm[check]) @ basis).sum()
    # counting differences takes a third of the time of != and isfinite, which are slow for bf16 on a CPU
    told["changed"] = (written - lrm.to(merged.dtype).to(lrm.dtype)).count_nonzero()
    told["bad"] = (written - written).count_nonzero()  # inf − inf is NaN
    return torch.stack([told[name].double() for name in PROJECT_NORMS])


def row_squares(x: Tensor) -> Tensor:
    """‖x_i‖² of every row, in fp64: a row is summed in the dtype of x, rows add up in fp64."""
    return torch.linalg.vector_norm(x, dim=1).double().square()


def _row_chunks(weight: Tensor, blocks: Sequence[Tensor]):
    """(rows, those of them whose leak is measured, basis) over all rows; no chunk crosses a block."""
    out, width = weight.shape
    height = out // max(1, len(blocks))
    every = max(1, -(-height // CHECKED_ROWS))
    budget, least = (_CHUNK_ELEMENTS, 1) if weight.is_cuda else (_PROJECT_ELEMENTS, _PROJECT_ROWS)
    for b, basis in enumerate(blocks or [None]):
        basis = basis if basis is not None and basis.shape[1] else None
        step = max(1 if basis is None else least, budget // max(1, width))
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(b * height + start, b * height + stop), slice(-start % every, None, every), basis


def span_mass(
    q: Tensor, k: Tensor, sample: Tensor, at: Tensor, spans: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """Σ_τ softmax(q kᵀ)[t, τ] spans[τ, :] for chosen rows of a batch: attention, the value replaced (Eqs. 9 and 10).

    q [B, H, T, D] and k [B, K, T, D], after rotary embedding, of any strides; row i of the result is position at[i] of
    sample sample[i] (both [n] int64; samples ascend, and positions inside a sample); spans [B, T, m]: a column a span,
    its indicator or any other weights. Query head h reads key head h // (H / K). A row sees its own sample up to
    itself, so padding on the right needs no mask; a window keeps the last `window` positions, the row's own included.
    Returns [n, H, m] fp32 (fp64 where an input is).
    Scores one chunk of rows at a time against the columns that causality leaves them: never [H, T, T].
    """
    dtype = _widest(q, k, spans)
    masses = torch.empty(len(at), q.shape[1], spans.shape[-1], dtype=dtype, device=q.device)
    start = 0
    for b, count in enumerate(torch.bincount(sample, minlength=len(q)).tolist()):
        mine, start = slice(start, start + count), start + count
        values = spans[b].to(dtype)
        for rows, heads, seen, shares in _attention(q[b], k[b], at[mine], scaling, window, dtype):
            masses[mine][rows, heads] = (shares @ values[seen]).transpose(0, 1)
    return masses


def span_mass_normalised(
    q: Tensor,
    k: Tensor,
    sample: Tensor,
    at: Tensor,
    spans: Tensor,
    lse: Tensor,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """`span_mass` where attention has run already and left lse [B, H, T], the logarithm of each row's denominator:
    only the columns of the spans are scored, Σ_τ exp(q kᵀ − lse) spans[τ, :]. As exact as fp32 holds lse: to 1e-6 for
    scores of 10. Holds a chunk of [H, rows, columns].
    """
    dtype = _widest(q, k, spans)
    masses = torch.empty(len(at), q.shape[1], spans.shape[-1], dtype=dtype, device=q.device)
    group, start = q.shape[1] // k.shape[1], 0
    for b, count in enumerate(torch.bincount(sample, minlength=len(q)).tolist()):
        mine, start = slice(start, start + count), start + count
        columns = spans[b].any(-1).nonzero()[:, 0]
        keys, values = k[b][:, columns].to(dtype), spans[b, columns].to(dtype)
        step = max(1, _CACHE_ELEMENTS // max(1, q.shape[1] * len(columns)))
        for rows, out in zip(at[mine].split(step), masses[mine].split(step), strict=True):
            wanted = (q[b][:, rows].to(dtype) * scaling).view(len(keys), group * len(rows), q.shape[-1])
            scores = (wanted @ keys.mT).view(q.shape[1], len(rows), len(columns))
            shares = scores.sub_(lse[b][:, rows, None]).exp_()
            unseen = columns > rows[:, None]
            if window is not None:
                unseen |= columns <= rows[:, None] - window
            out.copy_((shares.masked_fill_(unseen, 0.0) @ values).transpose(0, 1))
    return masses


def _attention(q: Tensor, k: Tensor, at: Tensor, scaling: float, window: int | None, dtype: torch.dtype):
    """softmax(q kᵀ) of one sample at ascending positions, in chunks of rows and heads.

    Yields (rows, query heads, columns, shares [heads, rows, columns]), the first three as slices.
    """
    positions = at.tolist()
    if not positions:
        return
    group, n, last = len(q) // len(k), len(positions), positions[-1] + 1
    width = last if window is None else min(last, last - 1 - positions[0] + window)
    chunk = max(1, (_CHUNK_ELEMENTS if q.is_cuda else _CACHE_ELEMENTS) // (group * width))
    some, step = max(1, chunk // n), min(chunk, n)  # key heads, rows: heads last, few rows make a slow product
    for head in range(0, len(k), some):
        keys = k[head : head + some, :last].to(dtype)
        heads = slice(head * group, (head + len(keys)) * group)
        for i in range(0, n, step):
            rows = at[i : i + step]
            first = 0 if window is None else max(0, positions[i] - window + 1)
            seen = slice(first, positions[min(i + step, n) - 1] + 1)
            wanted = (q[heads, rows].to(dtype) * scaling).view(len(keys), -1, q.shape[-1])
            scores = (wanted @ keys[:, seen].mT).view(-1, len(rows), seen.stop - first)
            columns = torch.arange(first, seen.stop, device=q.device)
            edge = positions[i] - first  # no row of the chunk ends left of it
            scores[..., edge:].masked_fill_(columns[edge:] > rows[:, None], float("-inf"))
            if window is not None and seen.stop - window > first:
                scores.masked_fill_(columns <= rows[:, None] - window, float("-inf"))
            yield slice(i, i + step), heads, seen, scores.softmax(-1)


def attended_inputs(q: Tensor, k: Tensor, at: Tensor, x: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """A_h[t] X: the attention-averaged inputs of v_proj at chosen rows of one sample (findings.md, 3).

    q [H, T, D], k [K, T, D], at [n] as in `span_mass`; x [T, d]. Returns [H, n, d] fp32 (fp64 where an input is).
    Two library products a chunk and no Triton kernel: the value is as wide as the model, and a kernel that keeps the
    shares in registers would score every row once more for each tile of d.
    """
    dtype = _widest(q, k, x)
    x = x.to(dtype)
    mixed = torch.empty(len(q), len(at), x.shape[1], dtype=dtype, device=x.device)
    for rows, heads, seen, shares in _attention(q, k, at, scaling, window, dtype):
        mixed[heads, rows] = shares @ x[seen]
    return mixed
