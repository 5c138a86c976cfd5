"""How long will a merge with calibration take? Floating-point operations over this machine's measured speeds.

An estimate, made from shapes alone: the forwards of every stream, the bases, and composing are counted in operations;
each batch that passes through a layer also costs the calls of its operators, which is what small models consist of. A
pass over a layer takes the longer of its work and its disk, as in bench/extrapolate.py. `streammerge bench` measures
the sweep itself and knows better.

Not counted: tokenisation (the plan does it and tells its own time), rounding for capture_weights and its cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..arch import SITES
from ..batches import make_batches
from ..calibration import CalibrationSet
from ..estimate import Estimate
from ..planned import Plan
from ..recipe import Basis

_PROBE = 0.4  # seconds for each speed
# calls of operators, counted on the demo's trio: of a batch on its way through a layer (modules, masks, rotary
# embeddings), more for each sample that is looked at on its way, and of composing a layer
_OPERATORS, _OPERATORS_SAMPLE, _OPERATORS_LAYER = 94, 33, 960
_HALF = 0.5  # rank of an energy basis over its highest, which no header tells; 0.31 to 0.44 in the demo
_DENSE, _GRAM_ROWS = 1024, 2048  # where bases.py changes its way
# what factorising an [m, n] costs over a matmul's m·n²: QR, and an SVD in fp32 or an eigenproblem in fp64 over n³
# (measured on one core for n = 256 to 1024: 6 to 8, and 18 to 36)
_QR, _SVD = 7, 28


@dataclass(frozen=True)
class Speeds:
    """Of the device. `matmul` and `single`: operations a second in the compute dtype and in fp32; `elements`: passed
    through one elementwise operator, a second; `operator`: seconds of one on hardly any data."""

    matmul: float
    single: float
    elements: float
    operator: float


def measure_speeds(plan: Plan, tokens: int, device: torch.device, dtype: torch.dtype) -> Speeds:
    """Four short probes, two seconds in all, with as many threads as torch has now. The matmul is the FFN's own, of a
    batch of `tokens`, as far as it is no larger than a probe may be: narrow ones are slower."""
    rows, most = (min(tokens, 4096), 8192) if device.type == "cuda" else (min(tokens, 1024), 2048)
    inner, outer = (min(plan.lrm.config[key], most) for key in ("hidden_size", "intermediate_size"))
    a, b = torch.randn(rows, inner, device=device), torch.randn(outer, inner, device=device)
    low = a.to(dtype), b.to(dtype)
    one, few = torch.randn(1 << 22, device=device), torch.randn(64, device=device)
    flops = 2 * rows * inner * outer
    matmul = _seconds(lambda: low[0] @ low[1].T, device)
    single = matmul if dtype == torch.float32 else _seconds(lambda: a @ b.T, device)
    return Speeds(flops / matmul, flops / single, len(one) / _seconds(lambda: one * 1.5, device),
                  _seconds(lambda: few * 1.5, device))  # fmt: skip


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, over as many as the probe has time for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()  # what is only made once
    wait()
    began = time.perf_counter()
    work()
    wait()
    calls = max(1, min(1000, int(_PROBE / 4 / (time.perf_counter() - began))))  # between two looks at the clock
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < _PROBE:
        for _ in range(calls):
            work()
        wait()
        done += calls
    return (time.perf_counter() - began) / done


@dataclass(frozen=True)
class _Layer:
    """Seconds of work of one layer, in a pass over the LRM alone and in the one that merges; {} where there is none."""

    survey: dict[str, float]
    merge: dict[str, float]


def sweep_parts(
    plan: Plan, data: CalibrationSet, settings: Estimate, speeds: Speeds, read_rate: float, write_rate: float
) -> dict[str, float]:
    """Seconds by part, from the embedding to the verified output."""
    layer = _layer(plan, data, settings.tokens_per_batch, speeds)
    lrm = sum(plan.lrm.tensors[n].nbytes for n in plan.layer_tensors(0))
    others = sum(c.tensors[key].nbytes for n in plan.merged for c, key in plan.sources(n)) / plan.layers
    outside = sum(t.nbytes for t in plan.lrm.tensors.values()) - plan.layers * lrm
    passes = [(layer.merge, lrm + others, lrm)]
    if layer.survey:
        again = lrm * (1 - min(1.0, settings.keep // lrm / plan.layers))
        passes = [(layer.survey, lrm, 0), (layer.merge, again + others, lrm)]
    waits, parts = 0.0, {}
    for work, read, written in passes:
        waits += max(0.0, read / read_rate + written / write_rate - sum(work.values()))
        for name, seconds in work.items():
            parts[name] = parts.get(name, 0.0) + plan.layers * seconds
    written = plan.layers * lrm + outside
    return parts | {
        "waiting for the disk": plan.layers * waits + lrm / read_rate,
        "copying what is outside the layers": outside / read_rate + outside / write_rate,
        "L_think": _think(plan, data, speeds, read_rate),
        "verification": (written + outside) / read_rate,
    }


def _touched(plan: Plan) -> float:
    """Share of the layers in which something is merged: only these have bases."""
    return len({job.layer for job in plan.merged.values()}) / plan.layers


def _layer(plan: Plan, data: CalibrationSet, tokens: int, speeds: Speeds) -> _Layer:
    """Of the average layer."""
    recipe = plan.recipe
    weights = [plan.lrm.tensors[n].shape for n in plan.layer_tensors(0)]
    elements = sum(math.prod(s) for s in weights)
    bases = _bases(plan, data)
    looks = _OPERATORS_SAMPLE * speeds.operator
    instruction = _forward(plan, data.instruction, tokens, speeds) + looks * len(data.instruction)
    first = {"forwards: instruction": instruction}
    second = {"forwards: reasoning": _forward(plan, data.reasoning, tokens, speeds) + _attended(plan, data, speeds)
              + looks * len(data.reasoning)}  # fmt: skip
    second["bases"] = _touched(plan) * sum(b.count * _factorise(b, recipe.basis) for b in bases) / speeds.single
    second["forwards: held-out"] = 2 * _forward(plan, data.heldout, tokens, speeds)
    twice = 2 if recipe.needs_instruction and recipe.coefficients.scope == "layer" else 1
    merged = sum(math.prod(plan.lrm.tensors[n].shape) for n in plan.merged) / plan.layers
    second["composing"] = twice * (_projection(plan, bases) / speeds.single + 14 * merged / speeds.elements
                                   + _OPERATORS_LAYER * _touched(plan) * speeds.operator)  # fmt: skip
    lend = {"weights to the compute dtype": 3 * elements / speeds.elements}
    if recipe.surveys:
        return _Layer(first | lend, second | {k: 2 * v for k, v in lend.items()})
    return _Layer({}, first | second | {k: 2 * v for k, v in lend.items()})


def _forward(plan: Plan, samples: Sequence, tokens: int, speeds: Speeds) -> float:
    """Seconds in which a set passes through one layer, padding included."""
    if not samples:
        return 0.0
    config, layout = plan.lrm.config, plan.layout
    width, wide, attn = config["hidden_size"], config["intermediate_size"], layout.heads * layout.head_dim
    params = sum(math.prod(s) for s in (plan.lrm.tensors[n].shape for n in plan.layer_tensors(0)) if len(s) == 2)
    batches = make_batches(samples, tokens)
    padded = sum(b.ids.numel() for b in batches)
    pairs = sum(b.ids.numel() * b.ids.shape[1] for b in batches)
    flops = 2 * params * padded + 2 * attn * pairs  # causal: half of the two products of 2 · attn · pairs each
    touched = padded * (14 * width + 8 * attn + 3 * wide)
    return flops / speeds.matmul + touched / speeds.elements + len(batches) * _OPERATORS * speeds.operator


def _attended(plan: Plan, data: CalibrationSet, speeds: Speeds) -> float:
    """Seconds in which v_proj's features are averaged, A_h[t] X at Ω_think, for every head of one layer."""
    if not (plan.recipe.thinking.attended_values and "v" in plan.recipe.modules):
        return 0.0
    rows = sum(len(s.omega) * len(s.ids) for s in data.reasoning)
    return 2 * rows * plan.layout.heads * (plan.lrm.config["hidden_size"] + plan.layout.head_dim) / speeds.single


def _think(plan: Plan, data: CalibrationSet, speeds: Speeds, read_rate: float) -> float:
    """Seconds of L_think: two sets of held-out positions against the whole output embedding."""
    if not data.heldout:
        return 0.0
    head = plan.lrm.tensors[plan.head]
    rows, size = sum(len(s.omega) + 3 for s in data.heldout), math.prod(head.shape)
    logits = 16 * rows * head.shape[0] / speeds.elements  # their exponentials and sums, in fp64
    return head.nbytes / read_rate + 4 * rows * size / speeds.single + logits


@dataclass(frozen=True)
class _Basis:
    """`count` bases of `rows` feature rows, `width` wide, with the rank that is taken for granted."""

    count: int
    width: int
    rows: int
    rank: int


def _bases(plan: Plan, data: CalibrationSet) -> list[_Basis]:
    """The bases of a layer: one a feature site, and v_proj's own for every key/value head."""
    recipe, rows, found = plan.recipe, sum(len(s.omega) for s in data.reasoning), []
    if not recipe.needs_reasoning:
        return []

    def basis(module: str, count: int, behind: int) -> _Basis:
        width = plan.lrm.tensors[plan.family.weight(0, module)].shape[1]
        most = min(behind, width, recipe.basis.size or width)
        return _Basis(count, width, behind, int(most * (_HALF if recipe.basis.rank == "energy" else 1)))

    for shared in SITES.values():
        asked = [m for m in shared if m in recipe.modules]
        found += [basis(asked[0], 1, rows)] if asked else []
    if recipe.thinking.attended_values and "v" in recipe.modules:
        found.append(basis("v", plan.layout.kv_heads, rows * (1 + plan.layout.group)))
    return found


def _factorise(basis: _Basis, rule: Basis) -> float:
    """Operations of one basis, by the way that bases.py takes; covariances count their sum as well."""
    small, large, rank = min(basis.rows, basis.width), max(basis.rows, basis.width), basis.rank
    covariance = rule.method == "covariance" or (rule.method == "auto" and basis.rows > basis.width)
    gathered = 2 * basis.rows * basis.width**2 if covariance else 0
    large = basis.width if covariance else large
    final = _QR * basis.width * rank**2
    if rule.method == "qr" or rule.rank == "exact" or (rule.method != "randomized" and small <= _DENSE):
        rows = 0 if covariance else (_QR + 2) * large * small**2
        return gathered + rows + _SVD * small**3 + final
    if rule.method == "auto" and not covariance and basis.rows <= _GRAM_ROWS and rule.rank == "energy":
        return gathered + large * small**2 + _SVD * small**3 + 2 * large * small * rank + final
    steps = 2 * (rule.power_iterations + 1)
    return gathered + 2 * steps * (2 * large * small * rank + _QR / 2 * large * rank**2) + final


def _projection(plan: Plan, bases: list[_Basis]) -> float:
    """Operations of Δ U and its product with Uᵀ, over the merged modules of the average layer."""
    ranks = {basis.width: basis.rank for basis in bases}
    shapes = [plan.lrm.tensors[n].shape for n in plan.merged]
    return sum(4 * math.prod(s) * ranks.get(s[1], 0) for s in shapes) / plan.layers
