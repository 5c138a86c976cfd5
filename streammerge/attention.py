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
from .forward import AttentionInputs
from .kernels import span_mass


@dataclass(frozen=True)
class LayerMass:
    """E[a] and E[u] per query head [H], fp64 on the CPU, over the instructions that have such rows."""

    alignment: Tensor
    leakage: Tensor


class AttentionMass:
    """An observer that sums alignment and leakage over the instructions of a calibration stream."""

    def __init__(self, samples: Sequence[InstructionSample], batches: Sequence[Batch], heads: int, rows: str):
        self._samples, self._batches = samples, batches
        self._shift = 1 if rows == "predicting" else 0
        self._sums = torch.zeros(2, heads, dtype=torch.float64)
        self._counts = [0, 0]

    def on_input(self, batch: int, site: str, x: Tensor) -> None:
        """Attention needs no module inputs."""

    def on_attention(self, batch: int, call: AttentionInputs) -> None:
        """Score the rows that matter in every sample of the batch."""
        held = self._batches[batch]
        for row, sample in enumerate(held.samples):
            length = held.lengths[row]
            self._score(self._samples[sample], call.q[row], call.k[row][:, :length], call)

    def _score(self, sample: InstructionSample, q: Tensor, k: Tensor, call: AttentionInputs) -> None:
        wanted = [(i.aligned, i.unrelated) for i in sample.instructions]
        rows = sorted({t - self._shift for pair in wanted for tokens in pair for t in tokens if t >= self._shift})
        if not rows:
            return
        where = {t + self._shift: n for n, t in enumerate(rows)}
        spans = torch.zeros(k.shape[1], len(wanted))
        for m, instruction in enumerate(sample.instructions):
            spans[list(instruction.columns), m] = 1.0 / len(instruction.columns)
        at = torch.tensor(rows, device=q.device)
        mass = span_mass(q[:, rows], k, at, spans.to(q.device), call.scaling, call.window).double().cpu()
        for m, pair in enumerate(wanted):
            for kind, tokens in enumerate(pair):
                picked = [where[t] for t in tokens if t in where]
                if picked:
                    self._sums[kind] += mass[:, picked, m].mean(1)
                    self._counts[kind] += 1

    def result(self) -> LayerMass:
        """The means over instructions. InputError where attention was not finite: α would be 1, or NaN, unnoticed."""
        if not torch.isfinite(self._sums).all():
            raise overflow("the attention masses of the instruction samples")
        a, u = (total / max(1, n) for total, n in zip(self._sums, self._counts, strict=True))
        return LayerMass(a, u)
