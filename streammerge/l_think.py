"""What happened to the thinking: L_think, measured on held-out samples after a merge.

L_think is the mean KL divergence KL(θ_R || θ*) of next-token distributions at the thinking positions of held-out
samples (Eq. 3), told apart by position: the opener, the predecessor of the closer (which decides whether `</think>`
is emitted) and the closer; `window` is the mean over all of Ω_think.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calibration import ReasoningSample
from .errors import overflow
from .forward import Stream, StreamedModel
from .io.checkpoint import Checkpoint
from .linalg import full_precision
from .verified import is_finite

_CHUNK_ELEMENTS = 1 << 20  # of the output embedding, and of the logits, held at a time: 4 and 8 MiB


def thinking_positions(sample: ReasoningSample) -> tuple[int, ...]:
    """Where L_think looks in a held-out sample: Ω_think, and the three named positions."""
    return tuple(sorted({*sample.omega, sample.opener, sample.predecessor, sample.closer}))


def think_loss(
    model: StreamedModel, head: str, samples: Sequence[ReasoningSample], reference: Stream, merged: Stream
) -> dict[str, float]:
    """L_think by position class, from the two streams' states after the last layer. Nats; InputError if not finite."""
    positions = [thinking_positions(s) for s in samples]
    with full_precision(model.device):
        hidden = (model.final_hidden(reference, positions), model.final_hidden(merged, positions))
        kl = kl_rows(model.checkpoint, head, *hidden)
    if not torch.isfinite(kl).all() and all(is_finite(model.checkpoint, name) for name in (model.family.norm, head)):
        raise overflow("the activations of the held-out samples")  # damaged tensors are verify_output's to name
    sums: dict[str, list[float]] = {"opener": [], "predecessor": [], "closer": [], "window": []}
    flat = iter(kl.tolist())
    for sample, at in zip(samples, positions, strict=True):
        by_position = {t: next(flat) for t in at}
        for name in ("opener", "predecessor", "closer"):
            sums[name].append(by_position[getattr(sample, name)])
        sums["window"] += [by_position[t] for t in sample.omega]
    means = {name: sum(v) / max(1, len(v)) for name, v in sums.items()}
    return {"mean": (means["opener"] + means["predecessor"] + means["closer"]) / 3, **means}


@torch.no_grad()
def kl_rows(checkpoint: Checkpoint, head: str, reference: Tensor, merged: Tensor) -> Tensor:
    """KL(softmax(W h_R) || softmax(W h_M)) a row: hidden [n, d] each -> [n] fp64 on the CPU.

    One pass over the output embedding W in chunks of the vocabulary with running maxima: memory does not know the
    vocabulary, nor n until n is very large.
    """
    h_r, h_m = reference.float(), merged.float()
    top = torch.full((2, len(h_r)), float("-inf"), device=h_r.device, dtype=torch.float64)
    mass = torch.zeros_like(top)
    cross = torch.zeros(len(h_r), device=h_r.device, dtype=torch.float64)
    vocabulary, width = checkpoint.tensors[head].shape
    step = max(64, _CHUNK_ELEMENTS // max(width, 2 * len(h_r)))
    for start in range(0, vocabulary, step):
        rows = torch.arange(start, min(start + step, vocabulary))
        weight = checkpoint.read_rows(head, rows).to(h_r.device).float()
        logits = torch.stack([h_r @ weight.T, h_m @ weight.T]).double()
        peak = torch.maximum(top, logits.amax(-1))
        shrink = (top - peak).exp()
        spread = (logits - peak[..., None]).exp()
        mass = mass * shrink + spread.sum(-1)
        cross = cross * shrink[0] + (spread[0] * (logits[0] - logits[1])).sum(-1)
        top = peak
    log_z = top + mass.log()
    return (cross / mass[0] - log_z[0] + log_z[1]).clamp(min=0).cpu()
