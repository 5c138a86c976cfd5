"""Features at Ω_think: what Stage 1 must leave unchanged (method.md, section 2; findings.md, 3).

For each of the four feature sites of a layer, the input rows h_t at t ∈ Ω_think; for v_proj, besides these, the
attention-averaged inputs A_h[t] X of the query heads that read each key/value head. Rows are kept while there are
fewer of them than features; beyond that a running covariance HᵀH takes their place.

Memory: N x in, or in x in, fp32 a site; for v_proj once more for each key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .arch import HeadLayout
from .batches import Batch
from .calibration import ReasoningSample
from .forward import AttentionInputs
from .kernels import attended_inputs, gram_update

Kind = Literal["rows", "covariance"]


@dataclass
class Features:
    """Feature rows H [N, in], or their covariance HᵀH [in, in]; N counts the rows either way."""

    rows: list[Tensor]
    cov: Tensor | None
    count: int = 0

    @staticmethod
    def empty(width: int, kind: Kind, device: torch.device) -> Features:
        """Nothing captured yet; `kind` says what will be kept."""
        return Features([], torch.zeros(width, width, device=device) if kind == "covariance" else None)

    def add(self, rows: Tensor) -> None:
        """Take rows [n, in] of any float dtype."""
        self.count += len(rows)
        if self.cov is not None:
            gram_update(self.cov, rows)
        else:
            self.rows.append(rows.float())


class FeatureCapture:
    """An observer that gathers the features of one layer. `kind(width, expected rows)` chooses rows or covariance."""

    def __init__(
        self,
        samples: Sequence[ReasoningSample],
        batches: Sequence[Batch],
        layout: HeadLayout,
        attended_values: bool,
        kind,
    ):
        self._samples, self._batches, self._layout, self._kind = samples, batches, layout, kind
        self._expected = sum(len(s.omega) for s in samples)
        self._attended = attended_values
        self._attn_in: Tensor | None = None
        self.sites: dict[str, Features] = {}
        self.values: list[Features] = []  # one a key/value head, when attended values are kept

    def _omega(self, batch: int):
        """(row in the batch, its sample's length, positions) for every sample of the batch."""
        held = self._batches[batch]
        for row, sample in enumerate(held.samples):
            yield row, held.lengths[row], list(self._samples[sample].omega)

    def on_input(self, batch: int, site: str, x: Tensor) -> None:
        """Rows of x [B, T, in] at Ω_think."""
        if site not in self.sites:
            width = x.shape[-1]
            self.sites[site] = Features.empty(width, self._kind(width, self._expected), x.device)
        rows = torch.cat([x[row, at] for row, _, at in self._omega(batch)])
        self.sites[site].add(rows)
        if site == "attn_in" and self._attended:
            self._attn_in = x
            self._start_values(x)
            for features in self.values:
                features.add(rows)

    def _start_values(self, x: Tensor) -> None:
        if not self.values:
            expected = self._expected * (1 + self._layout.group)
            kind = self._kind(x.shape[-1], expected)
            self.values = [Features.empty(x.shape[-1], kind, x.device) for _ in range(self._layout.kv_heads)]

    def on_attention(self, batch: int, call: AttentionInputs) -> None:
        """A_h[t] X at t ∈ Ω_think; on_input has seen this batch's X just before."""
        if self._attn_in is None:
            return
        for row, length, at in self._omega(batch):
            positions = torch.tensor(at, device=call.q.device)
            x = self._attn_in[row, :length]
            mixed = attended_inputs(call.q[row], call.k[row], positions, x, call.scaling, call.window)
            for head, features in enumerate(self.values):
                mine = mixed[head * self._layout.group : (head + 1) * self._layout.group]
                features.add(mine.flatten(0, 1))
        self._attn_in = None
