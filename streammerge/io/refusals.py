"""Quantised forms that are not read: each by its name, with what to do instead."""

from __future__ import annotations

from typing import Any

_ORIGINAL = "give the full-precision repository that it was made from (base_model in its card)"
_SAVE = "and save it with model.dequantize() and save_pretrained(DIR)"
# quant_method in config.json -> how to come to full-precision weights
_INSTEAD = {
    "gptq": f"{_ORIGINAL}, or load it in transformers with gptqmodel {_SAVE}",
    "awq": f"{_ORIGINAL}: AWQ folds scales into the norms, so that dequantised weights are not the original's",
    "mxfp4": "load it in transformers with quantization_config=Mxfp4Config(dequantize=True) and save it with "
    "save_pretrained(DIR), or give a bf16 copy of the model",
    "compressed-tensors": "load it in transformers with quantization_config=CompressedTensorsConfig("
    f"run_compressed=False) and save it with save_pretrained(DIR), or {_ORIGINAL}",
    "fbgemm_fp8": _ORIGINAL,
    "fp8": "load it in transformers with quantization_config=FineGrainedFP8Config(dequantize=True) and save it with "
    f"save_pretrained(DIR), or {_ORIGINAL}",
    "hqq": _ORIGINAL, "aqlm": _ORIGINAL, "quanto": _ORIGINAL, "torchao": _ORIGINAL, "eetq": _ORIGINAL,
    "vptq": _ORIGINAL, "bitnet": _ORIGINAL, "spqr": _ORIGINAL, "higgs": _ORIGINAL, "auto-round": _ORIGINAL,
    "quark": _ORIGINAL, "modelopt": _ORIGINAL, "exl2": _ORIGINAL, "fp_quant": _ORIGINAL, "quip": _ORIGINAL,
}  # fmt: skip

GGUF = ("is a GGUF file, whose quantised blocks are not read: give the safetensors repository that it was converted "
        "from (base_model in its card), or load it in transformers with from_pretrained(DIR, gguf_file=NAME), which "
        "dequantises it, and save it with save_pretrained(DIR)")  # fmt: skip


def advice(method: Any, told: Any) -> str:
    """Why a quantization_config is not read, and what to do instead."""
    read = "read are bitsandbytes nf4, fp4 and int8, and fp8 with a weight_block_size"
    if not isinstance(method, str):
        return f"quantization_config names no quant_method ({str(told)[:60]}); {read}: {_ORIGINAL}"
    form = method[:40] if method.isprintable() else ascii(method[:40])
    form = "fp8 without a weight_block_size" if method == "fp8" else form
    return f"the weights are quantised as {form}, which is not read ({read}): {_INSTEAD.get(method, _ORIGINAL)}"
