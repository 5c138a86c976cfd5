"""What a merge will take: predicted peaks by term, and the token batch that the budgets allow.

tests/test_memory.py and tests/test_smollm2.py hold measured peaks to these sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .calibration import CalibrationSet
from .errors import ResourceError, listed
from .footprint import Terms, cpu_moments, gpu_moments, sizes
from .memory import format_size, parse_size, total
from .planned import Plan


@dataclass(frozen=True)
class Choice:
    """What a smaller budget changes."""

    tokens: int
    workers: int
    offload: bool
    ahead_part: int  # a layer over this is read ahead
    spill: bool = False


@dataclass(frozen=True)
class Estimate:
    """Predicted peaks beyond the imports, in bytes, with the terms of each sum, and the settings they follow from."""

    choice: Choice
    ahead: int  # bytes of weights read ahead
    keep: int  # bytes of the LRM's layers that may stay on a GPU between two passes
    device: dict[str, int]  # empty on the CPU, where everything is on the host
    host: dict[str, int]
    disk: int
    scratch: int  # bytes of activations that are spilled
    hidden: int = 0  # bytes of the largest batch's hidden states

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that pass through a layer together."""
        return self.choice.tokens

    @property
    def workers(self) -> int:
        """Batches that pass side by side."""
        return self.choice.workers

    @property
    def spill(self) -> bool:
        """Activations wait on disk."""
        return self.choice.spill

    @property
    def offload(self) -> bool:
        """Activations wait on the host, not on the GPU."""
        return self.choice.offload

    def as_dict(self) -> dict:
        """For the report."""
        totals = {"device_total": sum(self.device.values()), "host_total": sum(self.host.values())}
        names = ("tokens_per_batch", "workers", "offload", "spill", "ahead", "device", "host", "disk", "scratch")
        return {name: getattr(self, name) for name in names} | totals


def predict(plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype) -> Estimate:
    """The fastest choice that the budgets allow, and the memory it takes.

    Raises ResourceError that names the minimum when even the smallest does not fit.
    """
    budget = plan.recipe.budget
    longest = max((len(s.ids) for s in (*data.reasoning, *data.heldout, *data.instruction)), default=1)
    wanted = {"device": budget.device_memory, "host": budget.host_memory}
    limits = {side: _limit(side, text, device) for side, text in wanted.items()}
    choices = list(_choices(longest, budget.tokens_per_batch, device))
    for choice in choices + [replace(c, spill=True) for c in choices]:
        estimate = _estimate(plan, data, device, dtype, choice)
        needed = {"device": sum(estimate.device.values()), "host": sum(estimate.host.values())}
        over = [side for side, limit in limits.items() if needed[side] > limit]
        if not over:
            spare = limits["device"] - needed["device"]
            return replace(estimate, keep=int(spare) if device.type == "cuda" and spare < float("inf") else 0)
    raise _too_little(over, needed, limits, wanted, may_lower=choice.tokens > max(longest, 256))


def _choices(longest: int, asked: int | None, device: torch.device) -> Iterator[Choice]:
    """From the fastest to the smallest. A sample longer than a batch makes a batch of its own, so that below the
    longest sample smaller batches save nothing; what was asked for is not lowered."""
    cpu = device.type == "cpu"
    tokens = asked or (2048 if cpu else 8192)
    least = min(tokens, max(longest, asked or 256))
    workers, offload, part = torch.get_num_threads() if cpu else 1, False, 1
    yield Choice(tokens, workers, offload, part)
    while workers > 1:
        workers //= 2
        yield Choice(tokens, workers, offload, part)
    if not cpu:
        offload = True
        yield Choice(tokens, workers, offload, part)
    while tokens > least or part < 8:
        if tokens > least:
            tokens = max(least, tokens // 2)
            yield Choice(tokens, workers, offload, part)
        if part < 8:
            part *= 2
            yield Choice(tokens, workers, offload, part)


def _too_little(over: list[str], needed: dict, limits: dict, wanted: dict, may_lower: bool) -> ResourceError:
    needs = [
        f"{s} memory: {format_size(needed[s])} needed, {format_size(limits[s])} "
        + ("is nine tenths of what there is" if wanted[s] == "auto" else "given")
        for s in over
    ]
    fewer = "lower budget.tokens_per_batch, " if may_lower else ""
    return ResourceError(listed("The merge does not fit the memory budget:", needs, f"Raise the budget, {fewer}"
                                "or drop the longest calibration samples (calibration.max_tokens with "
                                "on_long: drop)."))


def _limit(side: str, text: str, device: torch.device) -> float:
    """A budget in bytes. `auto` is a share of what the machine has in all: what is free now would change the batches,
    and with them the last bits of the result, from run to run."""
    if text != "auto":
        return parse_size(text)
    if side == "device" and device.type == "cpu":
        return float("inf")
    return 0.9 * total("host" if side == "host" else str(device)) or float("inf")


def _estimate(
    plan: Plan, data: CalibrationSet, device: torch.device, dtype: torch.dtype, choice: Choice
) -> Estimate:
    """The sums for one choice, each of the moment that takes most."""
    size = sizes(plan, data, device, dtype, choice.tokens)
    ahead = size.native // choice.ahead_part
    held = size.held(surveyed=plan.recipe.surveys)
    scratch = held + size.values if choice.spill else 0
    if device.type == "cpu":
        moments = cpu_moments(size, choice.workers, ahead, plan, spill=choice.spill)
        return Estimate(choice, ahead, 0, {}, _most(moments), _disk(plan), scratch, size.hidden)
    moments, host = gpu_moments(size, choice.offload, choice.spill, ahead, held, plan)
    return Estimate(choice, ahead, 0, _most(moments), host, _disk(plan), scratch, size.hidden)


def _most(moments: list[Terms]) -> Terms:
    return max(moments, key=lambda terms: sum(terms.values()))


def _disk(plan: Plan) -> int:
    return sum(t.nbytes for t in plan.lrm.tensors.values())
