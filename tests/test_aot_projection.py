"""The projection kernels compiled for A100 and H100 where there is none: tensor cores, no spills, room on the chip."""

from __future__ import annotations

import pytest
from aot import ARCHS, build
from streammerge.kernels.projection import ELEMENTWISE, GROUP, PRODUCT, SUBTRACT, product_kernel, subtract_kernel

SHARED = {80: 99 * 1024, 90: 227 * 1024}  # the tables' sm_80 rows also serve cards that have less than an A100
CASES = [("bf16", False), ("bf16", True), ("fp16", True), ("fp32", True)]  # dtype, with D_col


def check(built, arch: int, tiles) -> None:
    assert built.spills == 0
    assert built.shared <= SHARED[arch]
    assert built.registers * 32 * tiles.warps <= 65536


def constants(tiles, **others) -> dict:
    return others | {"ROWS": tiles.rows, "COLS": tiles.cols, "INNER": tiles.inner}


@pytest.mark.parametrize("dtype, scaled", CASES)
@pytest.mark.parametrize("arch, columns", sorted(PRODUCT))
def test_product_kernel(arch, columns, scaled, dtype):
    tiles = PRODUCT[arch, columns]
    assert tiles.cols == columns and tiles.cols % SUBTRACT[arch].inner == 0  # pass 2 walks over whole steps
    weights = {"itm": f"*{dtype}", "base": f"*{dtype}"}
    floats = dict.fromkeys(("cols", "basis", "product"), "*fp32")
    numbers = dict.fromkeys(("height", "width!", "rank!", "span!", "itm_row!", "base_row!"), "i32")
    fixed = constants(tiles, itm_col=1, base_col=1, SCALED=scaled)
    built = build(
        product_kernel, arch, weights | floats | numbers, fixed, num_warps=tiles.warps, num_stages=tiles.stages
    )
    check(built, arch, tiles)
    assert built.tensor_cores and "tf32" in built.ptx and ("wgmma" in built.ptx) == (arch == 90)


@pytest.mark.parametrize("dtype, scaled", CASES)
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_subtract_kernel(arch, projected, scaled, dtype):
    tiles = SUBTRACT[arch] if projected else ELEMENTWISE
    weights = dict.fromkeys(("lrm", "itm", "base", "merged"), f"*{dtype}")
    floats = dict.fromkeys(("norms", "rows", "cols", "product", "basis"), "*fp32")
    strides = ("lrm_row!", "itm_row!", "base_row!", "product_row!")
    numbers = {"lam": "fp32"} | dict.fromkeys(("height", "width!", "rank!", *strides), "i32")
    fixed = constants(
        tiles, lrm_col=1, itm_col=1, base_col=1, rows_step=1, PROJECTED=projected, SCALED=scaled, GROUP=GROUP
    )
    built = build(
        subtract_kernel, arch, weights | floats | numbers, fixed, num_warps=tiles.warps, num_stages=tiles.stages
    )
    check(built, arch, tiles)
    assert built.tensor_cores == projected and ("wgmma" in built.ptx) == (projected and arch == 90)
