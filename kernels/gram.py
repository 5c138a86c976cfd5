"""Gram matrices on the tensor cores: C += X[index]ᵀ X[index], and X[index] X[index]ᵀ.

Both are A Aᵀ with a different side of X summed over, so one kernel serves both. Only tiles on and above the diagonal
are computed; each is stored twice, as it is and mirrored, so that C stays exactly symmetric. Rows are gathered as they
are loaded: no copy X[index] exists. Beyond its arguments it holds nothing.

Sums are fp32. 16-bit inputs go to the tensor cores as they are, their products being exact in fp32. fp32 inputs are
split in two TF32 parts each and multiplied three times ("tf32x3"): the part left out is at most 2^-20 of a product.

One program sums all of its rows in one order, so results are deterministic. Splitting tall sums over programs would
need a second pass over partial sums of d x d; narrow matrices get smaller tiles, hence more programs, instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # tiles a side of the square that neighbouring programs share, so that they find each other's rows in L2


@dataclass(frozen=True)
class Launch:
    """Tiles of block x block, summed over block_k at a time."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


# By (compute capability, bytes of an input element, wide). Chosen by what the compiler reports, not by timings (no GPU
# was at hand): the largest tile that spills no register, summed over as much at a time as leaves three buffers in
# flight when rows are gathered (their indices are one more stage). Wide 16-bit tiles get one program on a
# multiprocessor, by registers; narrow ones two to four. The rows of 80 stay below 99 KiB of shared memory, so that
# they also fit the Ampere, Ada and Blackwell cards that have less of it than an A100.
LAUNCHES = {
    (80, 2, True): Launch(128, 32, 8, 5),
    (80, 2, False): Launch(64, 32, 4, 5),
    (80, 4, True): Launch(64, 32, 4, 5),
    (80, 4, False): Launch(64, 32, 4, 5),
    (90, 2, True): Launch(128, 64, 8, 5),
    (90, 2, False): Launch(64, 64, 4, 5),
    (90, 4, True): Launch(128, 32, 8, 5),
    (90, 4, False): Launch(64, 32, 4, 5),
}
WIDE = 2048  # from here the 128 x 128 tiles of half a matrix outnumber the multiprocessors of an A100 or H100


def launch_for(capability: tuple[int, int], dtype: torch.dtype, width: int) -> Launch:
    """The row of the table for a matrix [width, width] from inputs of `dtype`."""
    arch = 90 if capability[0] in (9, 10) else 80  # the data-centre chips since Hopper have 227 KiB of shared memory
    return LAUNCHES[arch, dtype.itemsize, width >= WIDE]


@triton.jit
def _tile(pid, GROUP: tl.constexpr):
    """Program -> tile (row, column), square groups of tiles in the order of an upper triangle, column by column.

    Groups on the diagonal also yield tiles below it, which their programs leave to the mirror.
    """
    pair = pid // (GROUP * GROUP)
    inner = pid % (GROUP * GROUP)
    right = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) / 2.0).to(tl.int32)
    right = tl.where(right * (right + 1) // 2 > pair, right - 1, right)  # fp32 may be one off either way
    right = tl.where((right + 1) * (right + 2) // 2 <= pair, right + 1, right)
    down = pair - right * (right + 1) // 2
    return down * GROUP + inner // GROUP, right * GROUP + inner % GROUP


@triton.jit
def _steps(index, at, limit, stride, GATHER: tl.constexpr):
    """Offsets of rows or columns of X: `at` of them, chosen by `index` where this side is gathered."""
    chosen = tl.load(index + at, mask=at < limit, other=0) if GATHER else at.to(tl.int64)
    return chosen * stride


@triton.jit
def gram_kernel(
    x,
    index,
    out,
    width,
    stored,
    depth,
    stride_outer,
    stride_inner,
    stride_row,
    stride_col,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[i, j] = Σ_k A[i, k] A[j, k] (+ out[i, j] with ADD), A [width, depth] read from x by the two strides.

    GATHER: the side of A that `index` chooses, 1 width, 2 depth, 0 neither. out is [stored, stored]; beyond `width`
    it gets zeros.
    """
    down, right = _tile(tl.program_id(0), GROUP)
    if (down > right) | (right * BLOCK >= stored):
        return
    i = down * BLOCK + tl.arange(0, BLOCK)
    j = right * BLOCK + tl.arange(0, BLOCK)
    left = x + _steps(index, i, width, stride_outer, GATHER == 1)[:, None]
    over = x + _steps(index, j, width, stride_outer, GATHER == 1)[None, :]
    sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        along = _steps(index, k, depth, stride_inner, GATHER == 2)
        a = tl.load(left + along[None, :], mask=(i < width)[:, None] & (k < depth)[None, :], other=0.0)
        b = tl.load(over + along[:, None], mask=(k < depth)[:, None] & (j < width)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="tf32x3")
    local = tl.arange(0, BLOCK)
    offsets = local[:, None] * stride_row + local[None, :] * stride_col  # int32 suffices inside a tile
    down, right = (down * BLOCK).to(tl.int64), (right * BLOCK).to(tl.int64)
    here = out + down * stride_row + right * stride_col + offsets
    inside = (i < stored)[:, None] & (j < stored)[None, :]
    if ADD:
        sums += tl.load(here, mask=inside, other=0.0)
    if down == right:  # tf32x3 adds up (i, j) and (j, i) in different orders
        sums = (sums + tl.trans(sums)) * 0.5
    tl.store(here, sums, mask=inside)
    there = out + right * stride_row + down * stride_col + offsets
    tl.store(there, tl.trans(sums), mask=(j < stored)[:, None] & (i < stored)[None, :])


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)  # the interpreter takes any


def _launch(x: Tensor, index: Tensor | None, out: Tensor, outer: int, add: bool) -> None:
    """Gram of the slices of x along dimension `outer`; `index` chooses rows, whichever side they are on."""
    sizes = [x.shape[0] if index is None else len(index), x.shape[1]]
    how = launch_for(_capability(x.device), x.dtype, sizes[outer])
    groups = triton.cdiv(triton.cdiv(len(out), how.block), GROUP)
    with torch.cuda.device_of(x):
        gram_kernel[(groups * (groups + 1) // 2 * GROUP * GROUP,)](
            x,
            x if index is None else index.contiguous(),
            out,
            sizes[outer],
            len(out),
            sizes[1 - outer],
            x.stride(outer),
            x.stride(1 - outer),
            *out.stride(),
            GATHER=0 if index is None else 1 + outer,
            ADD=add,
            BLOCK=how.block,
            BLOCK_K=how.block_k,
            GROUP=GROUP,
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )


def gram_update(cov: Tensor, x: Tensor, index: Tensor | None = None) -> Tensor:
    """C += X[index]ᵀ X[index]: see `dispatch.gram_update`. index must lie in [0, N): it is not checked."""
    if x.numel() and (index is None or len(index)):
        _launch(x, index, cov, 1, add=True)
    return cov


def row_gram(x: Tensor, index: Tensor | None = None) -> Tensor:
    """X[index] X[index]ᵀ in fp32: see `dispatch.row_gram`. index must lie in [0, N): it is not checked."""
    n = x.shape[0] if index is None else len(index)
    if not n or not x.shape[1]:
        return torch.zeros(n, n, device=x.device)
    held = triton.cdiv(n, 16) * 16  # rows that start at multiples of 64 bytes are stored 16 bytes at a time
    out = torch.empty(held, held, device=x.device)
    _launch(x, index, out, 0, add=False)
    return out[:n, :n]
