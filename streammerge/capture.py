"""Features at Ω_think: what Stage 1 must leave unchanged (method.md, section 2; findings.md, 3).

For each of the four feature sites of a layer, the input rows h_t at t ∈ Ω_think; for v_proj, besides these, the
attention-averaged inputs A_h[t] X of the query heads that read each key/value head. Rows are kept while there are
fewer of them than features; beyond that a running covariance HᵀH takes their place.

Memory: N x in, or in x in, fp32 a site. v_proj has as much for each key/value head: on a GPU its rows wait on the host
(io/stash.py) until the basis of their head is built, unless they are so many (`waits`) that covariances are smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .arch import HeadLayout
from .batches import Batch
from .calibration import ReasoningSample
from .io.stash import Stash
from .kernels import attended_inputs, gram_update
from .sdpa import AttentionInputs

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

    def add(self, x: Tensor, index: Tensor | None = None) -> None:
        """Take x [n, in] of any float dtype, or its rows at `index`."""
        self.count += len(x) if index is None else len(index)
        if self.cov is not None:
            gram_update(self.cov, x, index)
        else:
            self.rows.append((x if index is None else x[index]).float())


class FeatureCapture:
    """An observer that gathers the features of one layer. `kind(width, expected rows)` chooses rows or covariance.

    `shelf`: where v_proj's rows wait; one that is handed from layer to layer keeps its host memory.
    """

    def __init__(
        self,
        samples: Sequence[ReasoningSample],
        batches: Sequence[Batch],
        layout: HeadLayout,
        attended_values: bool,
        kind: Callable[[int, int], Kind],
        shelf: Stash | None = None,
    ):
        self._samples, self._batches, self._layout, self._kind = samples, batches, layout, kind
        self._expected = sum(len(s.omega) for s in samples)
        self._attended, self._shelf = attended_values, shelf or Stash(torch.device("cpu"))
        self._attn_in: dict[int, Tensor] = {}  # batches that are between on_input and on_attention
        self._common: Features | None = None  # of all key/value heads: the rows h_t themselves
        self._own: list[Features] = []  # one a key/value head, where covariances are kept
        self.sites: dict[str, Features] = {}

    def on_input(self, batch: int, site: str, x: Tensor) -> Callable[[], None]:
        """Rows of x [B, T, in] at Ω_think."""
        flat, index = x.flatten(0, 1), self._index(batch).to(x.device)
        values = site == "attn_in" and self._attended
        if values:
            self._attn_in[batch] = x

        def keep() -> None:
            width = x.shape[-1]
            if site not in self.sites:
                self.sites[site] = Features.empty(width, self._kind(width, self._expected), x.device)
                self._common = Features.empty(width, self._values_kind(width), x.device) if values else self._common
            self.sites[site].add(flat, index)
            if values:
                self._common.add(flat, index)

        return keep

    def on_attention(self, batch: int, call: AttentionInputs) -> Callable[[], None]:
        """A_h[t] X at t ∈ Ω_think; on_input has seen this batch's X just before."""
        x = self._attn_in.pop(batch, None)
        if x is None:
            return lambda: None
        held, parts = self._batches[batch], []
        for row, (sample, length) in enumerate(zip(held.samples, held.lengths, strict=True)):
            at = torch.tensor(self._samples[sample].omega, device=x.device)
            parts.append(attended_inputs(call.q[row], call.k[row], at, x[row, :length], call.scaling, call.window))
        mixed = torch.cat(parts, dim=1).unflatten(0, (self._layout.kv_heads, self._layout.group)).flatten(1, 2)

        def keep() -> None:
            if self._values_kind(x.shape[-1]) == "rows":
                self._shelf.put(batch, mixed)
                return
            if not self._own:
                self._own = [Features.empty(x.shape[-1], "covariance", x.device) for _ in mixed]
            for features, rows in zip(self._own, mixed, strict=True):
                features.add(rows)

        return keep

    @property
    def values(self) -> Iterator[Features]:
        """v_proj's features, one key/value head at a time, so that no two are on the device at once."""
        if self._common is None:
            return
        width, count = len(self._common.cov) if self._common.cov is not None else self._common.rows[0].shape[1], 0
        for head in range(self._layout.kv_heads):
            count = self._common.count * (1 + self._layout.group)
            if self._own:
                yield Features([], self._common.cov + self._own[head].cov, count)
                continue
            features = Features.empty(width, self._kind(width, count), self._common.rows[0].device)
            for rows in (*self._common.rows, *(self._shelf.part(n, head) for n in range(len(self._batches)))):
                features.add(rows)
            yield features

    def _values_kind(self, width: int) -> Kind:
        rows = self._expected * (1 + self._layout.group)
        return "rows" if waits(width, rows) or self._kind(width, rows) == "rows" else "covariance"

    def _index(self, batch: int) -> Tensor:
        """Ω_think of a batch's samples as rows of the batch laid flat."""
        held = self._batches[batch]
        tokens = held.ids.shape[1]
        return torch.tensor([row * tokens + t for row, s in enumerate(held.samples) for t in self._samples[s].omega])


def waits(width: int, rows: int) -> bool:
    """Whether so many rows of v_proj are kept as they are until their basis is built, whatever it is built from."""
    return rows <= 4 * width
