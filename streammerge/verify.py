"""After a merge: reopen the output and compare it with the plan, and measure what happened to the thinking.

L_think is the mean KL divergence KL(θ_R || θ*) of next-token distributions at the thinking positions of held-out
samples (Eq. 3), told apart by position: the opener, the predecessor of the closer (which decides whether `</think>`
is emitted) and the closer; `window` is the mean over all of Ω_think.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .calibration import ReasoningSample
from .errors import InputError, StreamMergeError, VerificationError, listed, overflow
from .forward import Stream, StreamedModel
from .io.checkpoint import TORCH_DTYPES, Checkpoint, open_checkpoint, side_files
from .linalg import full_precision
from .plan import Plan, distinct

_CHUNK_ELEMENTS = 1 << 20  # of the output embedding, and of the logits, held at a time: 4 and 8 MiB
_CHUNK_BYTES = 1 << 20  # of a stored tensor that is checked for NaN


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


def verify_output(plan: Plan, out: Path) -> dict[str, int]:
    """Reopen the written checkpoint: names, dtypes and shapes as planned, untouched bytes the LRM's, all finite.

    Raises VerificationError, or InputError where the LRM itself holds what is wrong, listing everything.
    """
    written = open_checkpoint(out, "output")
    problems, inherited = [], []
    planned = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            problems.append(f"{name}: written as {found.get(name)}, planned as {planned.get(name)}")
    for name in found if not problems else ():
        if name not in plan.merged and not _same_bytes(written, plan.lrm, name):
            problems.append(f"{name}: should be the LRM's bytes and is not")
        elif not is_finite(written, name):
            (problems if name in plan.merged else inherited).append(f"{name} has NaN or infinite values")
    for source in side_files(plan.lrm.path):
        copy = out / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            problems.append(f"{source.name}: not a byte copy of {source}")
    written.close()
    if problems:
        raise VerificationError(listed(f"{out} is not what was planned:", problems, "Please report this as a bug."))
    if inherited:
        raise InputError(listed(f"reasoning_model: {plan.lrm.path} is damaged:", inherited, "Download it again."))
    copied = sum(1 for name in found if name not in plan.merged)
    return {"tensors": len(found), "merged": len(found) - copied, "copied_identical": copied}


def _same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    return all(x == y for x, y in zip(a.chunks(name), b.chunks(name), strict=True))


def is_finite(checkpoint: Checkpoint, name: str) -> bool:
    """No NaN and no infinity in a stored float tensor; integers always pass."""
    dtype = TORCH_DTYPES[checkpoint.tensors[name].dtype]
    if not dtype.is_floating_point:
        return True
    pieces = checkpoint.chunks(name, _CHUNK_BYTES)
    return all(bool(torch.isfinite(torch.frombuffer(piece, dtype=dtype).float()).all()) for piece in pieces)


def non_finite_everywhere(plan: Plan) -> StreamMergeError:
    """The error for non-finite weights: once one was met, the rest are looked for, so that all are named."""
    problems = []
    for checkpoint in distinct(plan.lrm, plan.itm, plan.base):
        names = checkpoint.tensors if checkpoint is plan.lrm else plan.merged
        for name in names:
            if not is_finite(checkpoint, name):
                info = checkpoint.tensors[name]
                problems.append(f"{checkpoint.role}: {name} in {info.file}")
    if not problems:
        return overflow("the token embeddings in the compute dtype")
    return InputError(
        listed("Weights with NaN or infinite values cannot be merged:", problems, "Download or save these files again.")
    )
