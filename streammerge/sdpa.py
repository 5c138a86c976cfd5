"""transformers' SDPA under the name `streammerge`, so that an observer can see queries and keys after rotary embedding,
norms and biases, exactly as the model uses them.

Holds nothing beyond what SDPA itself returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "streammerge"


@dataclass(frozen=True)
class AttentionInputs:
    """What one attention call sees: q [B, H, T, D] and k [B, K, T, D] after rotary embedding; the scale; the window.

    lse [B, H, T] fp32: log Σ_τ exp(q kᵀ) of every row, where the kernel that ran tells it.
    """

    q: Tensor
    k: Tensor
    scaling: float
    window: int | None
    lse: Tensor | None = None


class _LogSumExp(TorchDispatchMode):
    """Keeps what the CPU's flash attention says besides its output: the logarithm of each row's denominator."""

    found: Tensor | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.found = out[1]
        return out


def _observed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
    """SDPA. `module` may carry a `_streammerge_watcher`, which is shown the AttentionInputs afterwards, or, on a GPU
    and where it is `_streammerge_first`, before anything is computed."""
    watcher = getattr(module, "_streammerge_watcher", None)
    if watcher is None:
        return _attention(module, query, key, value, mask, **kwargs)
    window = kwargs.get("sliding_window")
    window = None if window is None else min(window, key.shape[2])
    seen = AttentionInputs(query, key, kwargs["scaling"], window)
    if query.is_cuda or getattr(module, "_streammerge_first", False):
        watcher(seen)
        return _attention(module, query, key, value, mask, **kwargs)
    with _LogSumExp() as kept:
        out = _attention(module, query, key, value, mask, **kwargs)
    watcher(replace(seen, lse=kept.found))
    return out


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any):
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _reads_grouped_heads(query):
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _reads_grouped_heads(query: Tensor) -> bool:
    """Whether SDPA has a lean kernel for fewer key/value than query heads. CUDA's fp32 one (memory-efficient) has not:
    asked for it, SDPA falls back to plain arithmetic and holds [H, T, T]."""
    return not (query.is_cuda and query.dtype == torch.float32)


AttentionInterface.register(ATTENTION, _observed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
