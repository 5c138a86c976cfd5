"""The public kernels: Triton where it can run and wins, the torch twin elsewhere, and why.

Every function takes impl="auto" | "triton" | "torch". "auto" never fails over silently: what ran, and the reason where
it was not Triton, is counted in `ran()`, which the report prints. "triton" where it cannot run raises
KernelUnavailable with the reason. Triton is imported on first use only, so that a CPU pays nothing for it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ran: Counter[tuple[str, str]] = Counter()


class KernelUnavailable(RuntimeError):
    """impl="triton" was asked for where it cannot run; the message says why."""


def interpreted() -> bool:
    """Triton's interpreter is on (TRITON_INTERPRET=1, set before Triton is imported): kernels then run on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install raises what it likes
        return f"Triton cannot be imported ({type(error).__name__}: {str(error)[:100]})"
    return None


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"


def why_not(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot take these tensors; None where they can."""
    for device in dict.fromkeys(t.device for t in tensors):
        if device.type == "cpu" and not interpreted():
            return "no GPU: Triton kernels run on CUDA devices"
        if device.type == "cuda" and (reason := _too_old(device)):
            return reason
        if device.type not in ("cpu", "cuda"):
            return f"device {device.type}"
    odd = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() and t.dtype not in _DTYPES}
    return f"dtype {', '.join(sorted(odd))}" if odd else _missing()


def ran() -> dict[str, int]:
    """{'project: triton': 224, 'span_mass: torch (no GPU: …)': 8}: calls since `forget`, in order of name."""
    return {f"{kernel}: {how}": count for (kernel, how), count in sorted(_ran.items())}


def forget() -> None:
    """Start counting anew."""
    _ran.clear()


def _triton(kernel: str, impl: str, reason: str | None, slower: str | None = None) -> bool:
    """Whether Triton runs this call. `reason`: why it cannot; `slower`: why "auto" takes the library all the same."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r}: use 'auto', 'triton' or 'torch'")
    if impl == "triton" and reason:
        raise KernelUnavailable(f"{kernel}: Triton cannot run here: {reason}")
    taken = impl == "triton" or (impl == "auto" and not reason and not slower)
    told = "asked for" if impl == "torch" else reason or slower
    _ran[kernel, "triton" if taken else f"torch ({told})"] += 1
    return taken


def gram_update(cov: Tensor, x: Tensor, index: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """C += X[index]ᵀ X[index] in place, for the covariance of Ω_think features (method.md, section 2).

    cov [d, d] fp32 or fp64, symmetric; x [N, d] of any float dtype and strides; index [n] int64 chooses rows (None:
    all) and must lie in [0, N): the kernel does not look. Returns cov.
    """
    wide = None if cov.dtype == torch.float32 else f"C is {str(cov.dtype).removeprefix('torch.')}, not float32"
    if _triton("gram_update", impl, why_not(cov, x) or wide):
        from .gram import gram_update as kernel

        return kernel(cov, x, index)
    return reference.gram_update(cov, x, index)


def row_gram(x: Tensor, index: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """X[index] X[index]ᵀ [n, n] in fp32 (fp64 for fp64): inner products of feature rows; arguments as above."""
    if _triton("row_gram", impl, why_not(x)):
        from .gram import row_gram as kernel

        return kernel(x, index)
    return reference.row_gram(x, index)


def project(
    lrm: Tensor,
    itm: Tensor,
    base: Tensor,
    blocks: Sequence[Tensor],
    rows: Tensor,
    cols: Tensor,
    lam: float,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """W* = W_R + λ (D_row (W_I − W_B) D_col)(I − U Uᵀ), rounded once, and its norms: see `reference.project`."""
    if _triton("project", impl, why_not(lrm, itm, base, *blocks, torch.empty(0, dtype=dtype, device=lrm.device))):
        from .projection import project as kernel

        return kernel(lrm, itm, base, blocks, rows, cols, lam, dtype)
    return reference.project(lrm, itm, base, blocks, rows, cols, lam, dtype)


def span_mass(
    q: Tensor,
    k: Tensor,
    sample: Tensor,
    at: Tensor,
    spans: Tensor,
    scaling: float,
    window: int | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Σ_τ softmax(q kᵀ)[t, τ] spans[τ, :] for chosen rows of a batch (Eqs. 9 and 10): see `reference.span_mass`."""
    unlike = None if q.dtype == k.dtype else f"q is {q.dtype}, k is {k.dtype}"
    if _triton("span_mass", impl, why_not(q, k, spans) or unlike):
        from .attention_mass import span_mass as kernel

        return kernel(q, k, sample, at, spans, scaling, window)
    return reference.span_mass(q, k, sample, at, spans, scaling, window)
