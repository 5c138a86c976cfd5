"""W* = W_R + λ D_row ((W_I − W_B) D_col)(I − U Uᵀ) in two passes, each of the shape of a GEMM.

Pass 1: P = ((W_I − W_B) D_col) U [out, r]. Pass 2: W* = W_R + λ D_row ((W_I − W_B) D_col − P Uᵀ), rounded once, with
the norms of its tile. Δ exists in registers only, in fp32, in both. Products are TF32 in three parts ("tf32x3"): one
TF32 product would leave 5e-4 of ‖Δ U‖ in the protected space. At r = 0 there is pass 2 without its product: it reads
three weights and writes one.

Why not one pass: a row of Δ⊥ needs all of its row of P, which needs all of its row of Δ. A program would keep its rows
of Δ over the whole width, or its rows of P over the whole rank, or read Δ twice all the same. For 64 rows, the least
that a wgmma takes, that is 64 · 28672 · 4 B = 7.3 MB of Δ (70B down_proj), against 227 KiB of shared memory and 256 KiB
of registers on an H100; even 8192 columns make 2.1 MB. The other way, P at r = 1000 is 64 · 1000 · 4 B = 256 kB, all of
the registers. The 132 programs' rows of two 16-bit weights together, 132 · 64 · 28672 · 4 B = 969 MB, are in no L2
(50 MB) either. So Δ comes from memory twice, fused or not: 12 B an element of 16-bit weights, where one that kept it
would move 8 B. P costs 8 r / in bytes more. What the second read costs is hidden behind the products where these are
the slower part: 2 · 3 · 2 r = 12 r TF32 operations an element, at an H100's 495 TFLOP/s and 3.35 TB/s from r = 148 (an
A100's 156 TFLOP/s and 2.04 TB/s: from r = 77). All of this is arithmetic on data sheets: nothing was timed.

Compiled (Triton 3.9, weights of bf16 / fp32 with D_col; registers a thread, shared KiB a program; no spill anywhere;
tests/test_aot_projection.py asserts it):

                        sm_80                         sm_90
    pass 1, r > 64      128x64: 128 / 176, 48 / 80    128x128: 220 / 222, 96 / 128  (wgmma m64n128k8)
    pass 1, r <= 64     128x64: the same              128x64:  161 / 158, 64 / 96   (wgmma m64n64k8)
    pass 1, r <= 32     64x32:  128 / 128, 24 / 40    64x32:   123 / 122, 32 / 48   (wgmma m64n32k8)
    pass 2              128x64: 168 / 166, 48 / 48    128x128: 208 / 236, 96 / 96   (wgmma m64n128k8)
    pass 2, r = 0       32x128:  92 /  96, 0.5        32x128:   80 /  96, 0.5

The tensor cores add up 32 columns at a time; these sums are added in fp32 outside of them, which round to nearest.

Where few programs would run (v_proj's blocks have 128 rows), pass 1 splits the width and torch adds the parts up.
Nothing is atomic: results are deterministic. Beyond W*, it holds P (a few times for small weights), a copy of U padded
to whole tiles where r is none, and fp32 copies of at most 256 rows a block, whose leaks are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import CHECKED_ROWS, PROJECT_NORMS, row_squares


@dataclass(frozen=True)
class Tiles:
    """A launch: a program's tile of its result, the step of its inner loop, warps, and stages of the pipeline."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


# By (architecture, columns of U a tile). Chosen by what the compiler reports, not by timings (no GPU was at hand): the
# largest tile that spills nothing for any dtype; a narrow U is bound by memory and gets more, smaller programs. On
# sm_80 pass 2 at 128 x 128 spills (456 bytes a thread).
PRODUCT = {
    (80, 32): Tiles(64, 32, 32, 4, 3),
    (80, 64): Tiles(128, 64, 32, 8, 3),
    (90, 32): Tiles(64, 32, 32, 4, 3),
    (90, 64): Tiles(128, 64, 32, 8, 3),
    (90, 128): Tiles(128, 128, 32, 8, 3),
}
SUBTRACT = {80: Tiles(128, 64, 32, 8, 3), 90: Tiles(128, 128, 32, 8, 3)}
ELEMENTWISE = Tiles(32, 128, 32, 4, 1)  # r = 0
GROUP = 8  # row tiles that run side by side in pass 2, so that they find U in L2
PROGRAMS = 128  # about one a multiprocessor of an A100 or H100: below this, pass 1 splits the width
LEAST_SPAN = 1024  # columns a split, at least


@triton.jit
def product_kernel(
    itm, base, cols, basis, product, height, width, rank, span,
    itm_row, itm_col, base_row, base_col,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """product[split] [height, rank] = ((itm − base) ∘ cols) basis over one span of the weights' columns."""
    tiles = rank // COLS
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)  # programs that share rows of Δ are neighbours
    col = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1) * span
    far, inside = row.to(tl.int64)[:, None], row[:, None] < height
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, tl.minimum(first + span, width), INNER):
        at = start + tl.arange(0, INNER)
        mask = inside & (at[None, :] < width)
        delta = tl.load(itm + far * itm_row + at[None, :] * itm_col, mask=mask, other=0).to(tl.float32)
        delta -= tl.load(base + far * base_row + at[None, :] * base_col, mask=mask, other=0).to(tl.float32)
        if SCALED:
            delta *= tl.load(cols + at, mask=at < width, other=0)[None, :]
        u = tl.load(basis + at.to(tl.int64)[:, None] * rank + col[None, :], mask=at[:, None] < width, other=0)
        total = tl.dot(delta, u, total, input_precision="tf32x3")
    product += tl.program_id(1).to(tl.int64) * height * rank
    tl.store(product + far * rank + col[None, :], total, mask=inside)


@triton.jit
def _grouped(tiles_down, tiles_across, GROUP: tl.constexpr):
    """Program -> tile (row, column): GROUP row tiles after each other, then the next column."""
    first = tl.program_id(0) // (GROUP * tiles_across) * GROUP
    high = tl.minimum(tiles_down - first, GROUP)
    at = tl.program_id(0) % (GROUP * tiles_across)
    return first + at % high, at // high


@triton.jit
def subtract_kernel(
    lrm, itm, base, merged, norms, rows, cols, product, basis, lam, height, width, rank,
    lrm_row, lrm_col, itm_row, itm_col, base_row, base_col, rows_step, product_row,
    PROJECTED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """merged = lrm + λ rows ∘ ((itm − base) ∘ cols − product basisᵀ), rounded once; norms [programs, 5] of its tile."""
    down, across = _grouped(tl.cdiv(height, ROWS), tl.cdiv(width, COLS), GROUP)
    row, col = down * ROWS + tl.arange(0, ROWS), across * COLS + tl.arange(0, COLS)
    far, inside = row.to(tl.int64)[:, None], row[:, None] < height
    mask = inside & (col[None, :] < width)
    lost = tl.zeros((ROWS, COLS), tl.float32)
    if PROJECTED:
        for start in range(0, rank, INNER):
            at = start + tl.arange(0, INNER)
            left = tl.load(product + far * product_row + at[None, :], mask=inside, other=0)
            right = tl.load(
                basis + col.to(tl.int64)[None, :] * rank + at[:, None], mask=col[None, :] < width, other=0
            )
            lost = tl.dot(left, right, lost, input_precision="tf32x3")
    slot = norms + tl.program_id(0).to(tl.int64) * 5
    delta = tl.load(itm + far * itm_row + col[None, :] * itm_col, mask=mask, other=0).to(tl.float32)
    delta -= tl.load(base + far * base_row + col[None, :] * base_col, mask=mask, other=0).to(tl.float32)
    tl.store(slot, tl.sum(delta * delta))
    if SCALED:
        delta *= tl.load(cols + col, mask=col < width, other=0)[None, :]
    kept = (delta - lost) * tl.load(rows + row * rows_step, mask=row < height, other=0)[:, None]
    tl.store(slot + 1, tl.sum(kept * kept))
    old = tl.load(lrm + far * lrm_row + col[None, :] * lrm_col, mask=mask, other=0).to(tl.float32)
    tl.store(slot + 2, tl.sum(old * old))
    new = (old + lam * kept).to(merged.dtype.element_ty)
    tl.store(merged + far * width + col[None, :], new, mask=mask)
    written, before = new.to(tl.float32), old.to(merged.dtype.element_ty).to(tl.float32)
    tl.store(slot + 3, tl.sum((written - before != 0).to(tl.float32)))
    tl.store(slot + 4, tl.sum((written - written != 0).to(tl.float32)))  # inf − inf is NaN


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
    """As `reference.project`: (W* [out, in] in `dtype`, the fields of `ProjectNorms` in fp64); fp32, fp16 and bf16."""
    merged = torch.empty(lrm.shape, dtype=dtype, device=lrm.device)
    norms = torch.zeros(len(PROJECT_NORMS), dtype=torch.float64, device=lrm.device)
    scale, columns = rows.float(), None if bool((cols == 1).all()) else cols.float().contiguous()
    height = lrm.shape[0] // max(1, len(blocks))
    with torch.cuda.device_of(lrm):
        for b, basis in enumerate(blocks or [None]):
            part = slice(b * height, (b + 1) * height)
            three = (lrm[part], itm[part], base[part])
            norms += _project_block(merged[part], *three, basis, scale[part], columns, lam)
    return merged, norms


def _project_block(
    merged: Tensor, lrm: Tensor, itm: Tensor, base: Tensor, basis: Tensor | None, rows: Tensor, cols: Tensor | None,
    lam: float,
) -> Tensor:  # fmt: skip
    """One block of rows, written to `merged`; returns its norms."""
    told = dict.fromkeys(PROJECT_NORMS, torch.zeros((), dtype=torch.float64, device=lrm.device))
    if not lrm.numel():
        return torch.stack(list(told.values()))
    padded = product = None
    if basis is not None and basis.shape[1]:
        tiles = _product_tiles(lrm.device, basis.shape[1])
        padded = _padded(basis, tiles.cols)
        product = _product(itm, base, cols, padded, tiles)
        inside, scale = row_squares(product), rows.double().square()
        told["inside"] = scale @ inside
        told["lost"] = (inside if cols is None else row_squares(_product(itm, base, None, padded, tiles))).sum()
    told["delta"], told["applied"], told["weight"], told["changed"], told["bad"] = _subtract(
        merged, lrm, itm, base, product, padded, rows, cols, lam
    )
    if product is not None:
        check = slice(None, None, -(-len(lrm) // CHECKED_ROWS))
        kept = torch.empty(itm[check].shape, dtype=torch.float32, device=lrm.device)
        nothing = kept.new_zeros(1, 1).expand_as(kept)
        _subtract(kept, nothing, itm[check], base[check], product[check], padded, rows[check], cols, 1.0)
        told["sampled"] = scale[check] @ inside[check]
        told["leak"] = row_squares(kept @ padded).sum()
        told["written"] = row_squares((merged[check].float() - lrm[check].float()) @ padded).sum()
    return torch.stack([told[name] for name in PROJECT_NORMS])


def architecture(device: torch.device) -> int:
    """The rows of the tables for a device: Hopper and its successor in data centres, or anything else."""
    return 90 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


def _product_tiles(device: torch.device, rank: int) -> Tiles:
    """The widest tile that pads U no further than the next narrower one would."""
    arch = architecture(device)
    if rank <= 32:
        return PRODUCT[arch, 32]
    wide = (arch, 128) in PRODUCT and (rank - 1) // 64 % 2 == 1  # an even number of 64s
    return PRODUCT[arch, 128 if wide else 64]


def _padded(basis: Tensor, multiple: int) -> Tensor:
    """U in fp32, contiguous, with columns of zeros up to a multiple: U itself where it is all that."""
    padding = -basis.shape[1] % multiple
    return torch.nn.functional.pad(basis.float(), (0, padding)).contiguous() if padding else basis.float().contiguous()


def _product(itm: Tensor, base: Tensor, cols: Tensor | None, basis: Tensor, tiles: Tiles) -> Tensor:
    """P = ((W_I − W_B) D_col) U [height, r] in fp32; cols None: without D_col."""
    (height, width), rank = itm.shape, basis.shape[1]
    programs = triton.cdiv(height, tiles.rows) * (rank // tiles.cols)
    splits = max(1, min(PROGRAMS // programs, width // LEAST_SPAN))
    span = triton.cdiv(triton.cdiv(width, splits), tiles.inner) * tiles.inner
    parts = torch.empty(triton.cdiv(width, span), height, rank, dtype=torch.float32, device=itm.device)
    product_kernel[programs, len(parts)](
        itm, base, basis if cols is None else cols, basis, parts, height, width, rank, span,
        *itm.stride(), *base.stride(),
        SCALED=cols is not None, ROWS=tiles.rows, COLS=tiles.cols, INNER=tiles.inner,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _subtract(
    merged: Tensor, lrm: Tensor, itm: Tensor, base: Tensor, product: Tensor | None, basis: Tensor | None,
    rows: Tensor, cols: Tensor | None, lam: float,
) -> Tensor:  # fmt: skip
    """Pass 2 into `merged`; returns ‖Δ‖², ‖Δ⊥_α‖², ‖W_R‖² and the numbers of changed and of bad elements, in fp64."""
    (height, width), projected = lrm.shape, product is not None
    tiles = SUBTRACT[architecture(lrm.device)] if projected else ELEMENTWISE
    programs = triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.cols)
    norms = torch.empty(programs, 5, dtype=torch.float32, device=lrm.device)
    subtract_kernel[programs,](
        lrm, itm, base, merged, norms, rows, rows if cols is None else cols,
        product if projected else rows, basis if projected else rows,  # where there is none, any pointer does
        lam, height, width, basis.shape[1] if projected else 0,
        *lrm.stride(), *itm.stride(), *base.stride(), rows.stride(0), product.stride(0) if projected else 0,
        PROJECTED=projected, SCALED=cols is not None, ROWS=tiles.rows, COLS=tiles.cols, INNER=tiles.inner,
        GROUP=GROUP, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return norms.sum(0, dtype=torch.float64)
