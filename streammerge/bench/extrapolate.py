"""From a few layers and a few tokens to a whole merge: arithmetic alone, every assumption in one place.

A layer's work is forwards, which grow with the tokens of their stream, and bases, composing and the rest, which do
not. What the reasoning set takes beyond the held-out set's rate is its features: they grow with the positions of
Ω_think, of which the measured set has as many as the whole one. A layer's disk time is bytes over the measured rates of
reading and of writing, one after the other as on one disk. Work and disk overlap: a pass over a layer takes the longer
of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from .measure import Measured

_STREAMS = ("reasoning", "instruction", "reference", "verification")
_FIRST = "instruction"  # the stream that the first of two passes moves


@dataclass(frozen=True)
class Whole:
    """The merge that is asked about. Bytes are of tensors as stored."""

    layers: int
    tokens: dict[str, int]  # by stream
    lrm: int  # bytes of one layer that are read of the LRM, and written
    others: int  # and of ITM and base together
    outside: int  # bytes outside of the layers, which are copied
    vocabulary: float  # how many times as large as the measured one
    passes: int  # over the layers: 2 with scope `model`
    kept: float  # share of the LRM's layers that stay on the GPU between two passes


@dataclass(frozen=True)
class Prediction:
    """Seconds. `parts` adds up to `total`; `layer` is work, disk and what it takes of one layer, over all passes."""

    total: float
    parts: dict[str, float]
    layer: dict[str, float]
    waiting_share: float


def extrapolate(m: Measured, whole: Whole, write_rate: float, once: dict[str, float]) -> Prediction:
    """`write_rate`: bytes a second. `once`: seconds of what happens once and was measured at full size."""
    seconds = {s: m.parts[s] / m.layers for s in _STREAMS}
    forward = {s: seconds[s] * whole.tokens[s] / m.tokens[s] for s in _STREAMS}
    plain = (seconds["reference"] + seconds["verification"]) / (m.tokens["reference"] + m.tokens["verification"])
    moved = min(seconds["reasoning"], plain * m.tokens["reasoning"])
    features = seconds["reasoning"] - moved
    forward["reasoning"] = features + moved * whole.tokens["reasoning"] / m.tokens["reasoning"]
    fixed = {part: m.parts[part] / m.layers for part in ("bases", "composing")}
    rest = max(0.0, m.sweep - m.waited - m.blocked - sum(m.parts.values())) / m.layers

    def disk(read: float, written: float) -> float:
        return read / m.read_rate + written / write_rate

    if whole.passes == 2:
        first = forward[_FIRST]
        second = sum(forward.values()) - first + sum(fixed.values()) + rest
        again = whole.lrm * (1 - whole.kept)
        passes = [(first, disk(whole.lrm, 0)), (second, disk(again + whole.others, whole.lrm))]
    else:
        passes = [(sum(forward.values()) + sum(fixed.values()) + rest, disk(whole.lrm + whole.others, whole.lrm))]
    work, waits = sum(w for w, _ in passes), sum(max(0.0, d - w) for w, d in passes)
    size = whole.layers * whole.lrm + whole.outside
    verified = m.written / m.verify
    parts = {
        **once,
        "embedding": m.parts["embedding"] * sum(whole.tokens.values()) / sum(m.tokens.values()),
        **{f"forwards: {s}": whole.layers * forward[s] for s in _STREAMS},
        **{part: whole.layers * each for part, each in fixed.items()},
        "the rest of the sweep": whole.layers * rest,
        "waiting for the disk": whole.layers * waits + whole.lrm / m.read_rate,  # the last: the first layer to arrive
        "copying what is outside the layers": disk(whole.outside, whole.outside),
        "L_think": m.think * whole.vocabulary,
        "verification": (size + whole.outside) / min(verified, m.read_rate),
    }
    total = sum(parts.values())
    layer = {"work": work, "disk": sum(d for _, d in passes), "seconds": work + waits}
    return Prediction(total, parts, layer, parts["waiting for the disk"] / total)
