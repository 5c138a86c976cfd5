"""The best that torch's libraries do for each kernel: what a kernel has to beat.

torch has no syrk (no operator of that name is registered; a test looks), and cuBLAS's own takes no 16-bit inputs. What
is left for a Gram is the whole product, in fp32 from 16-bit inputs by `out_dtype`, which CPUs do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


@contextmanager
def tf32() -> Iterator[None]:
    """fp32 products of the library on TF32 units."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def mm_update(cov: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """A product, and a sum."""
    x = x if index is None else x[index]
    return cov.add_(product(x.T, x))


def addmm_update(cov: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """One call; where inputs have 16 bits it makes a new C."""
    x = x if index is None else x[index]
    if x.dtype == cov.dtype:
        return cov.addmm_(x.T, x)
    return torch.addmm(cov, x.T, x, out_dtype=cov.dtype)


def unfused(
    lrm: Tensor, itm: Tensor, base: Tensor, blocks: Sequence[Tensor], rows: Tensor, cols: Tensor, lam: float,
    dtype: torch.dtype, *, scaled: bool,
) -> Tensor:  # fmt: skip
    """The projection as one would write it in torch: fp32 from the difference to the one rounding. Without norms."""
    delta = itm.float() - base.float()
    if scaled:
        delta *= cols
    if blocks:
        parts = zip(delta.chunk(len(blocks)), blocks, strict=True)
        delta = torch.cat([torch.addmm(part, part @ u, u.T, alpha=-1) for part, u in parts])
    return (lrm.float() + lam * rows[:, None] * delta).to(dtype)


def unfused_tf32(*inputs, scaled: bool) -> Tensor:
    """The same with its products on TF32 units."""
    with tf32():
        return unfused(*inputs, scaled=scaled)


def sdpa(q: Tensor, k: Tensor, sample: Tensor, at: Tensor, spans: Tensor, scaling: float) -> Tensor:
    """Attention with the spans as values, for as many rows of every sample: the rows gathered, a mask for causality.

    A key head's query heads are rows of it, so that nothing is expanded; values are padded to the 16 bytes that the
    fused implementations need.
    """
    (batch, heads, tokens, dim), key_heads, m = q.shape, k.shape[1], spans.shape[-1]
    n, group = len(at) // batch, heads // key_heads
    at = at.view(batch, n)
    chosen = q[torch.arange(batch, device=q.device)[:, None], :, at]  # [B, n, H, D]
    chosen = chosen.transpose(1, 2).reshape(batch, key_heads, group * n, dim)
    mask = torch.arange(tokens, device=q.device) <= at[..., None]
    mask = mask[:, None].expand(batch, group, n, tokens).reshape(batch, 1, group * n, tokens)
    values = pad(spans.to(q.dtype), (0, -m % 8))[:, None].expand(batch, key_heads, tokens, -1)
    mixed = scaled_dot_product_attention(chosen, k, values, attn_mask=mask, scale=scaling)[..., :m]
    return mixed.reshape(batch, heads, n, m).transpose(1, 2).reshape(batch * n, heads, m).float()
