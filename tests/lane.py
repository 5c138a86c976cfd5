"""Where the Triton tests run: natively on a GPU, elsewhere under the interpreter, and what that gets right."""

import torch
from streammerge.kernels import why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = why_not(torch.empty(0, device=DEVICE))
# The interpreter returns garbage for bf16 operands of tl.dot (design.md): bf16 is tested where a GPU is.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
# Relative Frobenius error against float64 on the same (already rounded) inputs, for every kernel. fp32 is multiplied as
# three TF32 products on a GPU (3e-7 to 5e-7 by simulation); of 16-bit inputs a kernel may round what lies in between.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
