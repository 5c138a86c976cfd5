"""How much each head attends to the instruction: alignment and leakage (Eqs. 9-10).

    a = Σ_{t∈R} Σ_{τ∈I} Att[t,τ] / (|R| |I|)      rows R: response tokens that the instruction constrains
    u = Σ_{t∈U} Σ_{τ∈I} Att[t,τ] / (|U| |I|)      rows U: response tokens that it does not

Rows are the later tokens, columns the earlier ones: causal attention has no mass the other way. With rows
"predicting" the row t-1 stands for token t, since that is the position which decides it (findings.md, 5). Only these
rows are scored: memory O(rows x spans) a head, never [H, T, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batch
from .calibration import InstructionSample
from .errors import overflow
from .kernels import span_mass, span_mass_normalised
from .sdpa import AttentionInputs


@dataclass(frozen=True)
class LayerMass:
    """E[a] and E[u] per query head [H], fp64 on the CPU, over the instructions that have such rows."""

    alignment: Tensor
    leakage: Tensor


@dataclass(frozen=True)
class _Wanted:
    """What a batch asks of every layer: n rows to score against m spans a sample, and how to average their masses."""

    sample: Tensor  # [n] the row's place in the batch
    at: Tensor  # [n] its position
    spans: Tensor  # [B, T, m] 1 / |I| at each instruction's columns
    shares: Tensor  # [2, n, m] fp64: 1 / |R|, then 1 / |U|, where the row is one of instruction m's
    counts: tuple[int, int]  # instructions with rows in R, and in U


class AttentionMass:
    """An observer that sums alignment and leakage over the instructions of a calibration stream, a layer at a time.

    What a batch wants is found when it first passes and then kept on its device: one observer serves all layers.
    """

    def __init__(self, samples: Sequence[InstructionSample], batches: Sequence[Batch], heads: int, rows: str):
        self._samples, self._batches, self._heads = samples, batches, heads
        self._shift = 1 if rows == "predicting" else 0
        self._wanted: dict[int, _Wanted] = {}
        self._start()

    def _start(self) -> None:
        self._sums: dict[int, Tensor] = {}  # of each batch [2, H]

    def on_input(self, batch: int, site: str, x: Tensor) -> None:
        """Attention needs no module inputs."""

    def on_attention(self, batch: int, call: AttentionInputs) -> None:
        """Score the rows that matter in every sample of the batch."""
        if batch not in self._wanted:
            self._wanted[batch] = _wanted(self._samples, self._batches[batch], self._shift, call.q.device)
        wanted = self._wanted[batch]
        asked = call.q, call.k, wanted.sample, wanted.at, wanted.spans
        if call.lse is None:
            mass = span_mass(*asked, call.scaling, call.window)
        else:
            mass = span_mass_normalised(*asked, call.lse, call.scaling, call.window)
        self._sums[batch] = torch.einsum("snm,nhm->sh", wanted.shares, mass.double())

    def result(self) -> LayerMass:
        """The means over instructions since the last result, so a layer's.

        InputError where attention was not finite: α would be 1, or NaN, unnoticed.
        """
        batches = sorted(self._sums)  # whatever order they came in, they add up in one
        counts = [sum(self._wanted[b].counts[kind] for b in batches) for kind in (0, 1)]
        sums = torch.stack([self._sums[b] for b in batches] or [torch.zeros(2, self._heads)]).cpu().double().sum(0)
        self._start()
        if not torch.isfinite(sums).all():
            raise overflow("the attention masses of the instruction samples")
        a, u = (total / max(1, n) for total, n in zip(sums, counts, strict=True))
        return LayerMass(a, u)


def _wanted(samples: Sequence[InstructionSample], batch: Batch, shift: int, device: torch.device) -> _Wanted:
    held = [samples[s].instructions for s in batch.samples]
    tokens = batch.ids.shape[1]
    spans = torch.zeros(len(held), tokens, max(map(len, held)))
    entries: list[tuple[int, int, int, float]] = []  # R or U, position in the flat batch, instruction, share
    counts = [0, 0]
    for b, instructions in enumerate(held):
        for m, instruction in enumerate(instructions):
            spans[b, list(instruction.columns), m] = 1 / len(instruction.columns)
            for kind, constrained in enumerate((instruction.aligned, instruction.unrelated)):
                rows = [b * tokens + t - shift for t in constrained if t >= shift]
                entries += [(kind, row, m, 1 / len(rows)) for row in rows]
                counts[kind] += bool(rows)
    kinds, flat, columns, parts = torch.tensor(entries, dtype=torch.float64).view(-1, 4).T
    rows, where = torch.unique(flat.long(), return_inverse=True)
    shares = torch.zeros(2, len(rows), spans.shape[2], dtype=torch.float64)
    shares[kinds.long(), where, columns.long()] = parts
    sample, at = (rows // tokens).to(device), (rows % tokens).to(device)
    return _Wanted(sample, at, spans.to(device), shares.to(device), (counts[0], counts[1]))
