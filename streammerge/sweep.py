"""The single sweep: one layer of three models in, one merged layer out, with everything that RAIN needs in between.

α of a head depends on its own layer's attention only, so with coefficients of scope `layer` one pass over the layers
does it all. Scope `model` needs the statistics of every layer before the first is written: the same loop runs twice,
first over the LRM alone (`survey`), then to merge. Stages that a recipe does not ask for have no stream and cost
nothing; with none of them this is a plain task-arithmetic merge.

Memory: the staged layer of the trio, compute copies of two layers, one token batch, and the streams' activations;
not a function of the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arch import SITES
from .attention import AttentionMass, LayerMass
from .bases import LayerBases, SiteBasis, build_bases, feature_kind
from .batches import make_batches
from .calibration import CalibrationSet
from .capture import FeatureCapture
from .coefficients import alphas
from .compose import Composed, LayerAlpha, compose
from .errors import InputError, ResourceError
from .forward import Stream, StreamedModel
from .io.checkpoint import TORCH_DTYPES
from .io.writer import CheckpointWriter
from .linalg import full_precision
from .memory import give_back
from .plan import Plan
from .progress import Progress
from .verify import non_finite_everywhere

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Streams:
    """The calibration sets on their way up. `reference` and `verification` are the held-out set in θ_R and in θ*."""

    reasoning: Stream | None
    instruction: Stream | None
    reference: Stream | None
    verification: Stream | None

    @staticmethod
    def open(data: CalibrationSet, tokens_per_batch: int, device: torch.device) -> Streams:
        """Batches of each set that has samples."""

        def stream(samples: Sequence) -> Stream | None:
            return Stream(make_batches(samples, tokens_per_batch), device) if samples else None

        return Streams(stream(data.reasoning), stream(data.instruction), stream(data.heldout), stream(data.heldout))

    def all(self) -> list[Stream]:
        """Those that exist."""
        return [s for s in (self.reasoning, self.instruction, self.reference, self.verification) if s]


@dataclass
class Trio:
    """One layer on the host as stored: every tensor of the LRM's, and of ITM and base those that are merged."""

    lrm: dict[str, Tensor]
    itm: dict[str, Tensor]
    base: dict[str, Tensor]


@dataclass
class Run:
    """A sweep at work, and what it found: per tensor, per layer, and L_think's two streams for `verify`."""

    plan: Plan
    model: StreamedModel
    data: CalibrationSet
    streams: Streams
    writer: CheckpointWriter
    scratch: Path
    progress: Progress
    composed: dict[str, Composed] = field(default_factory=dict)
    alphas: dict[int, LayerAlpha] = field(default_factory=dict)
    masses: dict[int, LayerMass] = field(default_factory=dict)

    def advance(self, layer: int, weights: dict[str, Tensor], stream: Stream | None, **seen) -> None:
        """Move a stream up one layer, if there is one."""
        if stream:
            self.model.advance(layer, weights, stream, tick=lambda n: self.progress.advance(n, tokens=n), **seen)


def sweep(run: Run) -> None:
    """Merge every layer and write it. Fills run.composed, run.alphas and run.masses."""
    with full_precision(run.model.device):
        _sweep(run)


def _sweep(run: Run) -> None:
    for stream in run.streams.all():
        run.model.embed(stream)
        if not all(torch.isfinite(stream.stash.fetch(n)).all() for n in range(len(stream.batches))):
            raise non_finite_everywhere(run.plan)
    known = survey(run) if surveyed(run.plan) else None
    for layer in range(run.plan.layers):
        run.progress.advance(label=f"merge: layer {layer + 1}/{run.plan.layers}")
        trio = read_layer(run, layer, lrm_only=False)
        lrm = lend(run, layer, trio.lrm)
        if known:
            bases, alpha = load_bases(run.scratch, layer, run.model.device), known[layer]
        else:
            bases = stage_one(run, layer, lrm)
            alpha = stage_two(run, layer, trio, bases)
        run.advance(layer, lrm, run.streams.reference)
        merged, told = compose_layer(run, trio, bases, alpha)
        run.composed |= told
        run.alphas[layer] = alpha
        write_layer(run, layer, merged)
        run.advance(layer, lend(run, layer, trio.lrm, merged), run.streams.verification)
        run.progress.layer("layer", layer, run.plan.layers)
        del trio, lrm, bases, merged  # before the next layer is read: one trio in memory, not two
        give_back()


def surveyed(plan: Plan) -> bool:
    """The recipe wants coefficients over the whole model, which takes a first pass over the LRM."""
    return plan.recipe.needs_instruction and plan.recipe.coefficients.scope == "model"


def survey(run: Run) -> list[LayerAlpha]:
    """The first of two passes: bases (kept on disk) and attention statistics from θ_R alone; α of the whole model."""
    for layer in range(run.plan.layers):
        run.progress.advance(label=f"survey: layer {layer + 1}/{run.plan.layers}")
        lrm = lend(run, layer, read_layer(run, layer, lrm_only=True).lrm)
        save_bases(run.scratch, layer, stage_one(run, layer, lrm))
        run.masses[layer] = attention_masses(run, layer, lrm)
        run.progress.layer("survey", layer, run.plan.layers)
        del lrm
        give_back()
    for stream in (run.streams.reasoning, run.streams.instruction):
        if stream:
            stream.stash.drop()  # the merging pass moves the held-out set alone
    masses = [run.masses[layer] for layer in range(run.plan.layers)]
    return alphas(masses, run.plan.recipe.coefficients, run.plan.layout)


def stage_one(run: Run, layer: int, lrm: dict[str, Tensor]) -> LayerBases:
    """The reasoning set through θ_R's layer; bases of its features at Ω_think."""
    recipe, stream = run.plan.recipe, run.streams.reasoning
    if not recipe.needs_reasoning or stream is None:
        return LayerBases({})
    modules = {job.module for job in run.plan.merged.values() if job.layer == layer}
    sites = tuple(site for site, shared in SITES.items() if modules & set(shared))
    attended = recipe.thinking.attended_values and "v" in modules
    kind = feature_kind(recipe.basis)
    capture = FeatureCapture(run.data.reasoning, stream.batches, run.plan.layout, attended, kind)
    run.advance(layer, lrm, stream, observer=capture, sites=sites)
    return build_bases(capture, recipe.basis, recipe.seed, layer)


def stage_two(run: Run, layer: int, trio: Trio, bases: LayerBases) -> LayerAlpha:
    """The instruction set through θ_R + λ Δ⊥ (α = 1); α of this layer from its attention."""
    coefficients, layout = run.plan.recipe.coefficients, run.plan.layout
    if not run.plan.recipe.needs_instruction:
        return LayerAlpha.uniform(coefficients.value, layout)
    probe, _ = compose_layer(run, trio, bases, LayerAlpha.uniform(1.0, layout))
    run.masses[layer] = attention_masses(run, layer, lend(run, layer, trio.lrm, probe))
    return alphas([run.masses[layer]], coefficients, layout)[0]


def attention_masses(run: Run, layer: int, weights: dict[str, Tensor]) -> LayerMass:
    """The instruction set through one layer; alignment and leakage of its heads."""
    stream = run.streams.instruction
    rows = run.plan.recipe.coefficients.rows
    observer = AttentionMass(run.data.instruction, stream.batches, run.plan.layout.heads, rows)
    run.advance(layer, weights, stream, observer=observer)
    return observer.result()


def read_layer(run: Run, layer: int, *, lrm_only: bool) -> Trio:
    """A layer of the models on the host, in stored dtypes. Raises InputError naming every non-finite weight."""
    plan = run.plan
    names = plan.layer_tensors(layer)
    merged = [] if lrm_only else [n for n in names if n in plan.merged]
    lrm = {n: plan.lrm.read(n) for n in names}
    trio = Trio(lrm, {n: plan.itm.read(n) for n in merged}, {n: plan.base.read(n) for n in merged})
    for tensors in (trio.lrm, trio.itm, trio.base):
        for tensor in tensors.values():
            if not torch.isfinite(tensor).all():
                raise non_finite_everywhere(plan)
            run.progress.advance(nbytes=tensor.numel() * tensor.element_size())
    return trio


def lend(run: Run, layer: int, lrm: dict[str, Tensor], merged: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A layer's weights as the forward wants them: names inside the layer, on the device, in the compute dtype."""
    if not run.streams.all():
        return {}  # a merge without calibration runs no layer
    weights, prefix = lrm | (merged or {}), run.plan.family.layer_prefix(layer)
    return {name.removeprefix(prefix): t.to(run.model.device, run.model.dtype) for name, t in weights.items()}


def compose_layer(
    run: Run, trio: Trio, bases: LayerBases, alpha: LayerAlpha
) -> tuple[dict[str, Tensor], dict[str, Composed]]:
    """Every merged tensor of a layer with bases and α, rounded to its output dtype, and what happened to it."""
    plan, device = run.plan, run.model.device
    out, told = {}, {}
    for name in trio.itm:
        module = plan.merged[name].module
        dtype = _DTYPES.get(plan.recipe.dtype) or TORCH_DTYPES[plan.lrm.tensors[name].dtype]
        three = (t[name].to(device) for t in (trio.lrm, trio.itm, trio.base))
        out[name], told[name] = compose(
            module, *three, bases.of(module), alpha, plan.layout, plan.recipe.lam, dtype
        )
        if not told[name].finite:
            raise InputError(f"{name}: the merged weights overflow {str(dtype).removeprefix('torch.')}, in which they "
                             "are written; lower lambda, or write dtype: bfloat16 (or float32) in the recipe")
    return out, told


def write_layer(run: Run, layer: int, merged: dict[str, Tensor]) -> None:
    """Write the merged tensors in place; the rest of the layer is copied bytes."""
    for name in run.plan.layer_tensors(layer):
        if name in merged:
            run.writer.write(name, merged[name].cpu())
        else:
            run.writer.copy(name, run.plan.lrm)


def save_bases(scratch: Path, layer: int, bases: LayerBases) -> None:
    """Keep a layer's bases on disk between the two passes of scope `model`. Raises ResourceError if it cannot."""
    named = {f"site/{s}": b for s, b in bases.sites.items()} | {f"value/{i}": b for i, b in enumerate(bases.values)}
    tensors = {f"{name}/u": b.u.cpu().contiguous() for name, b in named.items()}
    tensors |= {f"{name}/facts": torch.tensor([b.energy, b.count], dtype=torch.float64) for name, b in named.items()}
    file = scratch / f"bases-{layer:05d}.safetensors"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{file}: the bases that wait for the second pass cannot be written ({error}); free some "
                            "disk, or set coefficients.scope: layer, which keeps none") from error


def load_bases(scratch: Path, layer: int, device: torch.device) -> LayerBases:
    """What `save_bases` kept."""
    tensors = load_file(scratch / f"bases-{layer:05d}.safetensors")
    named = {}
    for key in (k[:-2] for k in tensors if k.endswith("/u")):
        energy, count = tensors[key + "/facts"].tolist()
        named[key] = SiteBasis(tensors[key + "/u"].to(device), energy, int(count))
    sites = {name.removeprefix("site/"): b for name, b in named.items() if name.startswith("site/")}
    values = [named[f"value/{i}"] for i in range(len(named) - len(sites))]
    return LayerBases(sites, tuple(values))
