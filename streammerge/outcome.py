"""What a merge tells of one tensor: the record that every path fills, with torch or without, and the report reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Composed:
    """What became of one tensor. Norms are Frobenius.

    The leaks compare ‖·U‖ with ‖D Δ D U‖ before and after rounding, over at most 256 evenly spaced rows of each block.
    """

    delta: float  # ‖Δ‖
    kept: float  # ‖Δ⊥‖ at α = 1
    applied: float  # ‖λ Δ⊥_α‖
    weight: float  # ‖W_R‖
    inside: float  # ‖D Δ D U‖: what an unprojected delta would do inside the protected space
    leak: float  # ‖Δ⊥_α U‖ / ‖D Δ D U‖ in fp32
    written_leak: float  # ‖(W* as written − W_R) U‖ / ‖λ D Δ D U‖; rounding to a narrower dtype than W_R's counts too
    changed: int  # elements that differ from the LRM's, after rounding
    rank: int  # of the widest block
    width: int
    energy: float  # the lowest share of ‖H‖² that a block's basis holds
    rows: int  # feature rows behind the basis
    finite: bool
    dense: float | None = None  # ‖Δ‖ before it was sparsified; then the norms above are of S(Δ)
