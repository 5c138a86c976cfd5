"""Span masses in one pass over the keys: online softmax in registers, the value replaced by a few span weights.

A program takes a tile of rows of one sample with all query heads that read one key head, so that a key is loaded once
a group, and walks the columns that its rows see; tiles right of the rows or outside the window are never visited.
Shares and weights meet in fp32 on the ordinary cores: few spans, and rounding 1 / |I| to 16 bits would cost more than
it saves. Instructions are short, so most column tiles hold no span at all: those only add to the denominator.

Memory beyond the arguments: the result, a flag a tile of columns, two numbers a tile of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Spans a program keeps sums for; more are scored again, in a further program. Sums for 8 cost so many registers that
# some builds spill, and 2 of the authors' 361 instruction samples have more than 4 instructions.
_SPANS = 4


class Blocks(NamedTuple):
    """A launch configuration."""

    lanes: int  # rows x query heads a tile
    columns: int
    dims: int  # of the head dimension at a time, a power of 2; queries stay in place where that is all of it
    warps: int
    stages: int


def blocks_for(dim: int, size: int) -> Blocks:
    """The configuration for a head dimension and an element size of 2 or 4 bytes.

    Chosen by AOT builds for sm_80 and sm_90, not by timings (no GPU was at hand). 64 lanes are one warp group of
    Hopper's; 128 spill with four warps and leave one program a multiprocessor with eight. Columns: the widest tile
    that spills nothing with and without a window, for any group and up to four spans. fp32 operands, each split in
    two TF32 parts, spill unless the head dimension is cut up. All stay below 99 KiB of shared memory, which is what
    the Ampere, Ada and Blackwell cards have that are not made for data centres.
    """
    padded = max(16, triton.next_power_of_2(dim))
    if size == 4:
        return Blocks(64, 32, min(padded, 32), 4, 3)
    return Blocks(64, 64 if padded <= 128 else 32, padded if padded <= 256 else 128, 4, 3)


@triton.jit(do_not_specialize=["window", "spans_all", "column_tiles"])
def _span_mass_kernel(
    q, k, at, sample, spans, busy, tiles, out,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, s_b, s_t, s_m,
    scale, window, spans_all, column_tiles,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """GROUP query heads read a key head, HEADS of them in this program. `scale` has log2 e in it: exp2 follows."""
    first, stop = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    if first >= stop:
        return  # the number of tiles is an upper bound
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    key_head = tl.program_id(1) // parts
    b = tl.load(sample + first)
    lowest, highest = tl.load(at + first).to(tl.int32), tl.load(at + stop - 1).to(tl.int32)

    lane = tl.arange(0, BLOCK_M)  # a lane is a row and a query head; spare lanes repeat the last of each
    of_group = tl.program_id(1) % parts * HEADS + lane % HEADS
    row = first + lane // HEADS
    kept = (row < stop) & (of_group < GROUP)
    row, head = tl.minimum(row, stop - 1), key_head * GROUP + tl.minimum(of_group, GROUP - 1)
    position = tl.load(at + row)
    n, d, s = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside = d[None, :] < DIM
    lanes = q + (b * q_b + head.to(tl.int64) * q_h + position * q_t)
    lanes = lanes[:, None] + d[None, :] * q_d
    if BLOCK_D >= DIM:
        queries = tl.load(lanes, mask=inside, other=0.0)
    position = position.to(tl.int32)
    keys = k + (b * k_b + key_head.to(tl.int64) * k_h)
    weights = spans + (b * s_b + (tl.program_id(2) * BLOCK_S).to(tl.int64) * s_m)
    here = tl.minimum(spans_all - tl.program_id(2) * BLOCK_S, BLOCK_S)

    peak = tl.full([BLOCK_M], -1e38, tl.float32)  # finite: a row may see nothing of its first tiles under a window
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
    for start in range(begin, highest + 1, BLOCK_N):
        columns = start + n
        real = columns <= highest
        tile = keys + tl.cast(start, tl.int64) * k_t + (n[:, None] * k_t + d[None, :] * k_d)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BLOCK_D >= DIM:
            loaded = tl.load(tile, mask=real[:, None] & inside, other=0.0)
            scores = tl.dot(queries, tl.trans(loaded), scores, input_precision=PRECISION)
        else:
            for c in range(0, DIM, BLOCK_D):
                rest = d[None, :] < DIM - c
                some = tl.load(lanes + c * q_d, mask=rest, other=0.0)
                loaded = tl.load(tile + c * k_d, mask=real[:, None] & rest, other=0.0)
                scores = tl.dot(some, tl.trans(loaded), scores, input_precision=PRECISION)
        scores *= scale
        hidden = columns[None, :] > position[:, None]
        if WINDOWED:
            hidden |= columns[None, :] <= position[:, None] - window
        scores = tl.where(hidden, float("-inf"), scores)
        higher = tl.maximum(peak, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(shares, 1)
        sums = sums * shrink[:, None]
        peak = higher
        if tl.load(busy + b * column_tiles + start // BLOCK_N) != 0:
            for j in range(here):
                weight = tl.load(weights + columns.to(tl.int64) * s_t + j * s_m, mask=real, other=0.0).to(tl.float32)
                sums += tl.where(s[None, :] == j, tl.sum(shares * weight[None, :], 1)[:, None], 0.0)
    found = out + ((row * (tl.num_programs(1) // parts * GROUP) + head) * spans_all + tl.program_id(2) * BLOCK_S)
    tl.store(found[:, None] + s[None, :], sums / total[:, None], mask=kept[:, None] & (s[None, :] < here))


def _row_tiles(sample: Tensor, batch: int, rows: int) -> Tensor:
    """[tiles, 2]: first row and stop of tiles of up to `rows` rows of one sample. Those at the end may be empty: the
    device is not asked how many there are."""
    starts = torch.searchsorted(sample, torch.arange(batch + 1, device=sample.device))  # [B + 1], the last is n
    before = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + rows - 1) // rows, 0, out=before[1:])
    tile = torch.arange(len(sample) // rows + min(batch, len(sample)), device=sample.device)
    owner = torch.searchsorted(before[1:], tile, right=True)  # `batch` for an empty tile
    first = starts[owner] + (tile - before[owner]) * rows
    return torch.stack([first, torch.minimum(first + rows, starts[(owner + 1).clamp(max=batch)])], dim=1)


def launch_constants(
    dtype: torch.dtype, dim: int, group: int, m: int, windowed: bool
) -> tuple[Blocks, dict[str, object]]:
    """The configuration and the compile-time arguments of a launch for `group` query heads a key head and m spans."""
    blocks = blocks_for(dim, dtype.itemsize)
    block_s = min(_SPANS, triton.next_power_of_2(m))
    precision = "tf32x3" if dtype == torch.float32 else "tf32"  # of fp32 operands; 16-bit ones are taken as they are
    return blocks, {
        "GROUP": group, "HEADS": min(group, blocks.lanes), "DIM": dim, "WINDOWED": windowed, "PRECISION": precision,
        "BLOCK_M": blocks.lanes, "BLOCK_N": blocks.columns, "BLOCK_D": blocks.dims, "BLOCK_S": block_s,
    }  # fmt: skip


def span_mass(
    q: Tensor, k: Tensor, sample: Tensor, at: Tensor, spans: Tensor, scaling: float, window: int | None = None
) -> Tensor:
    """As `reference.span_mass`, for q and k of one 16-bit dtype or fp32 (the dispatcher looks); returns fp32."""
    (batch, heads, tokens, dim), key_heads, m = q.shape, k.shape[1], spans.shape[-1]
    out = torch.empty(len(at), heads, m, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    group, sample, at = heads // key_heads, sample.contiguous(), at.contiguous()
    blocks, constants = launch_constants(q.dtype, dim, group, m, window is not None)
    together = constants["HEADS"]
    tiles = _row_tiles(sample, batch, blocks.lanes // together)
    column_tiles = triton.cdiv(tokens, blocks.columns)
    busy = torch.nn.functional.pad((spans != 0).any(-1), (0, column_tiles * blocks.columns - tokens))
    busy = busy.view(batch, column_tiles, blocks.columns).any(-1).to(torch.int8)
    grid = (len(tiles), key_heads * triton.cdiv(group, together), triton.cdiv(m, constants["BLOCK_S"]))
    _span_mass_kernel[grid](
        q, k, at, sample, spans, busy, tiles, out, *q.stride(), *k.stride(), *spans.stride(),
        scaling * math.log2(math.e), 0 if window is None else window, m, column_tiles,
        **constants, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out
