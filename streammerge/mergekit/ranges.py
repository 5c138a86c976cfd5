"""Values that a method would turn into NaN, an error in the middle of the merge, or nonsense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def out_of_range(method: str, shared: Mapping[str, Any], sources: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with one tensor's parameters: the merge's own, and those of each source."""
    if method == "linear" and shared.get("normalize") and sum(s["weight"] or 0 for s in sources) == 0:
        yield "the weights sum to 0, and normalize divides by their sum: set normalize: false, or other weights"
    for parameters in sources:
        density, epsilon, gamma = (parameters.get(key) for key in ("density", "epsilon", "gamma"))
        if density is not None and density < 0:
            yield f"density is {density:g}; wanted at least 0"
        elif epsilon is not None and 0 < density < 1 and (density + epsilon >= 1 or density - epsilon <= 0):
            yield f"density {density:g} and epsilon {epsilon:g}: density ± epsilon must lie between 0 and 1"
        if gamma is not None and not 0 <= gamma <= 1:
            yield f"gamma is {gamma:g}; wanted 0 to 1"
    if shared.get("select_topk", 0) < 0:
        yield f"select_topk is {shared['select_topk']:g}; wanted at least 0"
    if shared.get("max_iter", 1) < 1:
        yield f"max_iter is {shared['max_iter']}; wanted at least 1"
