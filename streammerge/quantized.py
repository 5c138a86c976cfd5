"""A linear weight in 8 or 4 bits and back, by bitsandbytes, which is imported when a recipe asks for it.

Memory: the codes (1 or 1/2 byte a weight) and scales, and a piece of the weight in fp32.
"""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .errors import RecipeError
from .recipe import Recipe

BLOCK = 64  # weights that share one scale in nf4; int8 has one a row
_PIECE = 1 << 20  # weights rounded at a time: off a GPU bitsandbytes holds some 20 bytes for each


@cache
def _library() -> ModuleType:
    """bitsandbytes.functional. Its import asks Hugging Face's `kernels`, where that is installed, to download a kernel
    that nothing here uses, and complains where it is not: neither is wanted."""
    log = logging.getLogger("bitsandbytes")
    level, hidden = log.level, sys.modules.get("kernels", False)
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None
    try:
        return importlib.import_module("bitsandbytes.functional")
    finally:
        log.setLevel(level)
        if hidden is False:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden


def check(recipe: Recipe, device: torch.device) -> None:
    """Before any work: RecipeError where bitsandbytes is wanted and is missing, or cannot round on this device."""
    method = recipe.capture_weights
    if method != "native":
        require(method, device, f"capture_weights: {method}", "or write capture_weights: native")


def require(method: str, device: torch.device, wanted: str, otherwise: str) -> None:
    """RecipeError where bitsandbytes is missing or cannot round on this device. `wanted`: what a user wrote."""
    advice = f"pip install 'streammerge[quantized]', {otherwise}"
    try:
        weight = torch.ones(2, BLOCK, device=device)
        found = unpack(method, *pack(method, weight), weight.shape, torch.float32)
    except ModuleNotFoundError as error:
        raise RecipeError(f"{wanted} needs bitsandbytes, and {error.name} is not installed: {advice}") from None
    except Exception as error:  # its import and its kernels raise whatever they meet
        raise RecipeError(f"{wanted}: bitsandbytes cannot run on {device} ({type(error).__name__}: "
                          f"{str(error)[:300]}): {advice}") from error
    if not torch.allclose(found, weight, atol=1e-3):
        raise RecipeError(f"{wanted}: bitsandbytes does not round trip on {device}: {advice}")


def pack(method: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (codes, fp32 scales): int8 [out, in] with [out]; nf4 two to a byte [⌈n/64⌉·32] with [⌈n/64⌉].

    A weight with NaN or inf gets NaN for every scale, so that unpacking shows it (CUDA's maximum passes over a NaN).
    """
    library, codes, scales = _library(), [], []
    if method == "int8":
        for rows in weight.split(max(1, _PIECE // weight.shape[1])):
            part, scale, _ = library.int8_vectorwise_quant(rows.half() if rows.is_cuda else rows.float())
            codes.append(part)
            scales.append(scale)
    else:
        flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK))
        for piece in flat.split(_PIECE):
            part, state = library.quantize_4bit(piece.float(), blocksize=BLOCK, quant_type="nf4")
            codes.append(part.flatten())
            scales.append(state.absmax)
    scale = torch.cat(scales)
    return torch.cat(codes), torch.where(torch.isfinite(weight).all(), scale, scale.new_full((), float("nan")))


def unpack(method: str, codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `pack` made, as a weight of this shape and dtype."""
    library = _library()
    if method == "int8":
        out = torch.empty(shape, dtype=dtype, device=codes.device)
        step = max(1, _PIECE // shape[1])
        for begin in range(0, shape[0], step):
            rows = slice(begin, begin + step)
            out[rows] = library.int8_vectorwise_dequant(codes[rows], scales[rows])
        return out
    padded = (1, 2 * len(codes))
    state = library.QuantState(scales, shape=padded, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return library.dequantize_4bit(codes.view(-1, 1), state).flatten()[: shape[0] * shape[1]].view(shape)


def nf4_values() -> Tensor:
    """The 16 values of a code, fp32, as they lie beside a stored weight."""
    return _library().get_4bit_type("nf4", device="cpu")


def version() -> str:
    """Of bitsandbytes."""
    _library()
    return importlib.import_module("bitsandbytes").__version__
