"""Triton kernels compiled for a GPU that need not be there: PTX, and what the cubin takes of the chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90)


@dataclass(frozen=True)
class Built:
    """One kernel for one architecture. Bytes a thread (`stack`, `local`) and a program (`shared`)."""

    ptx: str
    registers: int
    stack: int
    local: int
    shared: int

    @property
    def spills(self) -> int:
        """Bytes a thread of registers that found no room. Triton's show up as stack: local stays 0 beside 816 of it."""
        return self.stack + self.local

    @property
    def tensor_cores(self) -> bool:
        """Hopper's wgmma, or the mma of every architecture since Volta."""
        return "wgmma" in self.ptx or "mma.sync" in self.ptx


def build(kernel, arch: int, types: dict[str, str], constants: dict[str, object], **options) -> Built:
    """Compile `kernel` (a triton.jit function) for sm_`arch`.

    types: Triton's names of the arguments' types ("*bf16", "i32", "fp32"), in order; pointers are taken as 16-byte
    aligned, as torch allocates them, and names ending in "!" as multiples of 16. constants: the constexpr arguments.
    options: num_warps, num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [n for n, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name.endswith("!")]
    signature = {name.removesuffix("!"): kind for name, kind in types.items()}
    names = kernel.arg_names
    order = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(list(signature)[n]),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature=order, constexprs=constants, attrs=attrs)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resources(done.asm["cubin"])
    return Built(done.asm["ptx"], usage["REG"], usage["STACK"], usage["LOCAL"], done.metadata.shared)


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL as the cuobjdump that Triton brings tells them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
