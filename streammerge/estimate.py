"""What a merge will take: predicted peaks by term, and the token batch that the budgets allow.

tests/test_memory.py and tests/test_smollm2.py hold measured peaks to these sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .calibration import CalibrationSet
from .errors import ResourceError, listed
from .io.checkpoint import TORCH_DTYPES
from .memory import format_size, parse_size, total
from .plan import Plan

_INTERPRETER = 64 << 20  # what loads after the meter's start: a tokenizer (40 MB for 50k tokens), a family's modules


@dataclass(frozen=True)
class Estimate:
    """Predicted peaks beyond the imports, in bytes, with the terms of each sum, and the batch size they follow from."""

    tokens_per_batch: int
    device: dict[str, int]  # empty on the CPU, where everything is on the host
    host: dict[str, int]
    disk: int

    def as_dict(self) -> dict:
        """For the report."""
        totals = {"device_total": sum(self.device.values()), "host_total": sum(self.host.values())}
        return {"tokens_per_batch": self.tokens_per_batch, "device": self.device, "host": self.host, **totals} | {
            "disk": self.disk
        }


def predict(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The largest token batch that the budgets allow, and the memory it takes.

    Raises ResourceError that names the minimum when even the smallest batch does not fit.
    """
    budget = plan.recipe.budget
    longest = max((len(s.ids) for s in (*data.reasoning, *data.heldout, *data.instruction)), default=1)
    tokens = max(longest, budget.tokens_per_batch or (8192 if device.type == "cuda" else 2048))
    wanted = {"device": budget.device_memory, "host": budget.host_memory}
    limits = {side: _limit(side, text, device) for side, text in wanted.items()}
    while True:
        estimate = _estimate(plan, data, device, dtype, tokens)
        needed = {"device": sum(estimate.device.values()), "host": sum(estimate.host.values())}
        over = [side for side, limit in limits.items() if needed[side] > limit]
        if not over:
            return estimate
        if tokens <= max(longest, 256) or budget.tokens_per_batch:
            needs = [
                f"{s} memory: {format_size(needed[s])} needed, {format_size(limits[s])} "
                + ("is nine tenths of what there is" if wanted[s] == "auto" else "given")
                for s in over
            ]
            fewer = "lower budget.tokens_per_batch, " if tokens > max(longest, 256) else ""
            raise ResourceError(listed("The merge does not fit the memory budget:", needs, f"Raise the budget, {fewer}"
                                       "or drop the longest calibration samples (calibration.max_tokens with "
                                       "on_long: drop)."))
        tokens = max(longest, 256, tokens // 2)


def _limit(side: str, text: str, device: torch.device) -> float:
    """A budget in bytes. `auto` is a share of what the machine has in all: what is free now would change the batches,
    and with them the last bits of the result, from run to run."""
    if text != "auto":
        return parse_size(text)
    if side == "device" and device.type == "cpu":
        return float("inf")
    return 0.9 * total("host" if side == "host" else str(device)) or float("inf")


def _estimate(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, tokens: int) -> Estimate:
    config, layout = plan.lrm.config, plan.layout
    width, wide = config["hidden_size"], config["intermediate_size"]
    item = torch.empty(0, dtype=dtype).element_size()
    infos = [[plan.lrm.tensors[n] for n in plan.layer_tensors(i)] for i in range(plan.layers)]
    native = max(sum(t.nbytes for t in layer) for layer in infos)
    elements = max(sum(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for t in layer) for layer in infos)
    largest = max(t.nbytes // TORCH_DTYPES[t.dtype].itemsize for layer in infos for t in layer)
    rows = sum(len(s.omega) for s in data.reasoning)
    attn = layout.heads * layout.head_dim
    features = sum(4 * w * min(max(rows, 1), w) for w in (width, attn, width, wide)) if rows else 0
    if rows and plan.recipe.thinking.attended_values:
        features += 4 * layout.kv_heads * width * min(rows * (1 + layout.group), width)
    held = sum(len(s.ids) for s in (*data.reasoning, *data.instruction)) + 2 * sum(len(s.ids) for s in data.heldout)
    sets = (data.reasoning, data.heldout, data.instruction)
    batch = min(tokens, int(1.25 * max(sum(len(s.ids) for s in samples) for samples in sets)))  # padding: a quarter
    streams = batch * (8 * width + 3 * attn + 3 * wide) * item
    composing = 4 * 4 * largest  # W* in fp32 and, for the leak as written, two fp32 copies and their difference
    copied = device.type != "cpu" or any(TORCH_DTYPES[t.dtype] != dtype for layer in infos for t in layer)
    copy = elements * item if copied else 0
    passing = {
        "compute copies of two layers": 2 * copy,
        "features and bases": 3 * features,
    }
    staging = {
        "staged layers of the trio": 3 * native,
        "the merged layer": elements * 4 if plan.recipe.dtype == "float32" else native,
        "offloaded activations": int(1.25 * held * width * item),
        "tokenizer and model code": _INTERPRETER,
    }
    disk = sum(t.nbytes for t in plan.lrm.tensors.values())
    if device.type == "cpu":
        passing["a token batch, or composing"] = max(streams, composing - copy)  # when composing, one copy is there
        return Estimate(tokens, {}, staging | passing, disk)
    passing |= {"one token batch": streams, "composing the largest tensor": composing}
    return Estimate(tokens, passing, staging | {"one tensor in flight": 4 * largest}, disk)
