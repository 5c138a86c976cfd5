"""The span-mass kernel built for sm_80 and sm_90 as it is launched: tensor cores in use, no spills, and it fits."""

from __future__ import annotations

import pytest
import torch
from aot import ARCHS, build

pytest.importorskip("triton")

SHARED = 99 * 1024  # bytes a program can have on the cards of 8.6, 8.9 and 12.0; an A100 and an H100 have more
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def built(arch: int, kind: str, dim: int, *, group: int, m: int, windowed: bool):
    """The launch of `group` query heads a key head and m spans, for q and k as transformers lays them out."""
    from streammerge.kernels.attention_mass import _span_mass_kernel, launch_constants

    blocks, constants = launch_constants(TYPES[kind], dim, group, m, windowed)
    pointers = {"q": kind, "k": kind, "at": "i64", "sample": "i64", "spans": "fp32", "busy": "i8", "tiles": "i64",
                "out": "fp32"}  # fmt: skip
    types = {name: "*" + of for name, of in pointers.items()}
    types |= {f"{x}_{axis}!": "i32" for x in "qk" for axis in "bht"}
    types |= {"s_b": "i32", "s_t": "i32", "scale": "fp32", "window": "i32", "spans_all": "i32", "column_tiles": "i32"}
    constants |= {"q_d": 1, "k_d": 1, "s_m": 1}
    return blocks, build(_span_mass_kernel, arch, types, constants, num_warps=blocks.warps, num_stages=blocks.stages)


@pytest.mark.parametrize("group, m, windowed", [(4, 4, False), (7, 4, True)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("arch", ARCHS)
def test_build(arch, kind, dim, group, m, windowed):
    blocks, kernel = built(arch, kind, dim, group=group, m=m, windowed=windowed)
    assert kernel.tensor_cores and ("wgmma" in kernel.ptx) == (arch == 90)
    assert "cp.async" in kernel.ptx  # keys are fetched ahead
    assert kernel.spills == 0
    assert kernel.shared <= SHARED
    assert kernel.registers * 32 * blocks.warps <= 65536


@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_operands_are_multiplied_as_they_are_and_fp32_in_three_tf32_parts(arch):
    for kind, operand, times in (("bf16", "bf16.bf16", 1), ("fp16", "f16.f16", 1), ("fp32", "tf32.tf32", 3)):
        _, kernel = built(arch, kind, 64, group=4, m=2, windowed=False)
        lines = [x for x in kernel.ptx.splitlines() if ("mma.sync" in x or "wgmma.mma_async" in x)]
        assert lines and all(operand in x and ".f32." + operand[:2] in x for x in lines)
        assert len(lines) % times == 0
