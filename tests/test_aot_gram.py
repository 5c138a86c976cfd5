"""The Gram kernel compiled for GPUs that need not be there, with every launch of its table."""

from __future__ import annotations

import re
from functools import cache

import pytest
from aot import Built, build
from streammerge.kernels.gram import GROUP, LAUNCHES, gram_kernel

KIB = 1024
# A program's limit of shared memory. The table's rows of 80 also serve the cards of 8.6, 8.9 and 12.0, which have less
# than the 163 KiB of an A100.
SHARED = {80: 99 * KIB, 90: 227 * KIB}
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
CASES = [(arch, kind, wide) for arch, size, wide in LAUNCHES for kind in ELEMENTS if ELEMENTS[kind] == size]


@cache
def built(arch: int, kind: str, wide: bool, update: bool) -> Built:
    """As the sweep calls it: gram_update of gathered rows, or row_gram of all rows, of contiguous features whose width
    is a multiple of 16, their number being anything."""
    how = LAUNCHES[arch, ELEMENTS[kind], wide]
    sizes = ("width!", "depth", "stride_inner!") if update else ("width", "depth!", "stride_outer!")
    types = {"x": f"*{kind}", "index": "*i64", "out": "*fp32"} | dict.fromkeys(
        (*sizes, "stored!", "stride_row!"), "i32"
    )
    constants = {"stride_outer" if update else "stride_inner": 1, "stride_col": 1, "GATHER": 2 if update else 0}
    constants |= {"ADD": update, "BLOCK": how.block, "BLOCK_K": how.block_k, "GROUP": GROUP}
    return build(gram_kernel, arch, types, constants, num_warps=how.num_warps, num_stages=how.num_stages)


@pytest.mark.parametrize("update", [True, False], ids=["gram_update", "row_gram"])
@pytest.mark.parametrize("arch, kind, wide", CASES)
def test_resources(arch, kind, wide, update):
    found, how = built(arch, kind, wide, update), LAUNCHES[arch, ELEMENTS[kind], wide]
    assert found.spills == 0
    assert found.shared <= SHARED[arch]
    assert found.registers * 32 * how.num_warps <= 65536


@pytest.mark.parametrize("update", [True, False], ids=["gram_update", "row_gram"])
@pytest.mark.parametrize("arch, kind, wide", CASES)
def test_instructions(arch, kind, wide, update):
    """Tensor cores with fp32 sums, 16-byte loads in flight, 16-byte stores of both halves, and no atomics."""
    ptx, how = built(arch, kind, wide, update).ptx, LAUNCHES[arch, ELEMENTS[kind], wide]
    name = {"bf16": "bf16.bf16", "fp16": "f16.f16", "fp32": "tf32.tf32"}[kind]
    multiply = r"wgmma\.mma_async\S*\.f32\." if arch == 90 else r"mma\.sync\S*\.f32\."
    assert re.search(multiply + re.escape(name), ptx)
    if kind == "fp32":
        assert "cvt.rna.tf32" in ptx, "one TF32 product would leave 7e-4; the second part of the split is missing"
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\S+),", ptx)
    wide_copies, narrow = copies.count("0x10"), set(copies) - {"0x10"}
    assert wide_copies and narrow <= ({"0x8"} if update else set()), "only row indices are copied 8 bytes at a time"
    stores = re.findall(r"st\.global\S*", ptx)
    assert set(stores) == {"st.global.v4.b32"}
    assert len(stores) * 4 * 32 * how.num_warps == 2 * how.block**2, "a tile and its mirror, once each"
    assert not re.search(r"\b(atom|red)\.", ptx)
