"""Where the Triton tests run: natively on a GPU, elsewhere under the interpreter, and what that gets right."""

import torch
from streammerge.kernels import why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = why_not(torch.empty(0, device=DEVICE))
# The interpreter returns garbage for bf16 operands of tl.dot (design.md): bf16 is tested where a GPU is.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
