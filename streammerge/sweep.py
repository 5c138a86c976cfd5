"""The single sweep: one layer of three models in, one merged layer out, with everything that RAIN needs in between.

α of a head depends on its own layer's attention only, so with coefficients of scope `layer` one pass over the layers
does it all. Scope `model` needs the statistics of every layer before the first is written: a `survey` moves the
instruction set through the LRM alone, then the merging pass does the rest. The two passes share no stream and keep
nothing but a number a head. Stages that a recipe does not ask for have no stream and cost nothing.

Reading, computing and writing overlap: weights are read ahead in the order of their use (io/feed.py), what is merged
is written behind the sweep's back (io/drain.py).

Memory: the LRM's layer, its compute copy and the merged one; one tensor of ITM and base (with scope `layer` all of the
layer's, which are merged twice); what is read ahead and what waits to be written; a token batch a worker; and the
streams' activations. Not a function of the number of layers, but for the LRM's layers that a GPU with room to spare
keeps between the two passes of scope `model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .arch import SITES
from .attention import AttentionMass, LayerMass
from .bases import LayerBases, build_bases, feature_kind
from .capture import FeatureCapture
from .capture_cache import Quantized
from .coefficients import alphas
from .compose import Composed, LayerAlpha, compose
from .errors import InputError
from .io.checkpoint import TORCH_DTYPES, Checkpoint
from .io.drain import Drain, on_host
from .io.feed import Feed
from .io.stash import Stash
from .io.writer import CheckpointWriter
from .linalg import full_precision
from .memory import give_back
from .planned import Plan
from .run import Run
from .snapshot import restore, take
from .task_vector import TaskVector, task_vector
from .verified import non_finite_everywhere

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def sweep(run: Run) -> None:
    """Merge every layer and write it. Fills run.composed, run.alphas, run.masses and run.meter."""
    began = time.perf_counter()
    if run.plan.recipe.capture_weights != "native":
        survey_first = surveyed(run.plan)
        run.quantized = Quantized(run.plan, run.model.device, run.model.dtype, keep=run.keep, survey=survey_first)
    with full_precision(run.model.device):
        stage, start = restore(run)
        if stage == "survey" and run.reuses("masses"):
            run.masses |= run.artifacts.masses()
            stage = "merge"
        run.progress.advance(done_before(run, stage, start))
        known = survey(run, start if stage == "survey" else run.plan.layers) if surveyed(run.plan) else None
        embed(run, run.streams.moving("merge", surveyed(run.plan)))
        first = start if stage == "merge" else 0
        run.alphas |= {layer: known[layer] if known else own_alpha(run, layer) for layer in range(first)}
        layers = range(first, run.plan.layers)
        order = [item for layer in layers for item in read_order(run.plan, layer, lrm=layer not in run.kept)]
        with run.feed(order) as feed, run.drain() as drain:
            for layer in layers:
                run.progress.advance(label=f"merge: layer {layer + 1}/{run.plan.layers}")
                merge_layer(run, feed, drain, layer, known)
                run.progress.layer("layer", layer, run.plan.layers)
                take(run, drain, "merge", layer + 1)
                give_back()
    run.meter.seconds = time.perf_counter() - began


def done_before(run: Run, stage: str, start: int) -> int:
    """Work units, token-layers and one a layer of a pass, that an earlier run has done."""
    streams, twice = run.streams.named(), surveyed(run.plan)
    moving = {name: run.streams.moving(name, twice) for name in ("survey", "merge")}
    a_layer = {name: 1 + sum(streams[s].tokens for s in names) for name, names in moving.items()}
    if stage == "survey":
        return start * a_layer["survey"] if twice else 0
    return start * a_layer["merge"] + (run.plan.layers * a_layer["survey"] if twice else 0)


def embed(run: Run, names: list[str]) -> None:
    """Token embeddings for these streams, where no snapshot has brought them back."""
    for name in names:
        stream = run.streams.named()[name]
        if stream.stash.nbytes:
            continue
        with run.meter.working(run.model.device, "embedding"):
            run.model.embed(stream)
        if not all(torch.isfinite(stream.stash.fetch(n)).all() for n in range(len(stream.batches))):
            raise non_finite_everywhere(run.plan)


def read_order(plan: Plan, layer: int, *, lrm: bool = True, others: bool = True) -> list[tuple[Checkpoint, str]]:
    """The tensors of a layer in the order of their use: the LRM's, then ITM's and base's of each merged one."""
    names = plan.layer_tensors(layer)
    order = [(plan.lrm, n) for n in names] if lrm else []
    return order + [source for n in names if others and n in plan.merged for source in plan.sources(n)]


def merge_layer(run: Run, feed: Feed, drain: Drain, layer: int, known: list[LayerAlpha] | None) -> None:
    """One layer of three models in, one merged layer out. `known`: α of every layer, after a survey."""
    names = run.plan.layer_tensors(layer)
    lrm = run.kept.pop(layer, None) or {n: run.take(feed, run.plan.lrm, n) for n in names}
    weights = lend(run, layer, lrm)
    merged_names = [n for n in names if n in run.plan.merged]

    def pairs() -> Iterator[TaskVector]:
        for name in merged_names:
            yield task_vector(run.plan, name, [run.take(feed, *source) for source in run.plan.sources(name)])

    bases = bases_of(run, layer, lrm, weights)
    if known:
        alpha, others = known[layer], pairs()
    else:
        others = list(pairs()) if run.plan.recipe.needs_instruction else pairs()  # merged twice, or once
        alpha = stage_two(run, layer, lrm, others, bases)
    run.advance(layer, weights, run.streams.reference)
    del weights
    for name, tensor, told in compose_layer(run, lrm, others, bases, alpha):
        run.composed[name] = told
        lrm[name] = tensor  # the LRM's own is done with
        write = partial(_write, run.writer, name, on_host(tensor))
        drain.hand(write, tensor.numel() * tensor.element_size())
    for name in names:
        if name not in run.plan.merged:
            drain.hand(partial(run.writer.copy, name, run.plan.lrm), 0)
    run.alphas[layer] = alpha
    run.advance(layer, lend(run, layer, lrm), run.streams.verification)


def surveyed(plan: Plan) -> bool:
    """The recipe wants coefficients over the whole model, which takes a first pass over the LRM."""
    return plan.recipe.surveys


def _write(writer: CheckpointWriter, name: str, fetch: Callable[[], Tensor]) -> None:
    writer.write(name, fetch())


def survey(run: Run, start: int) -> list[LayerAlpha]:
    """The first of two passes: the instruction set alone, through θ_R alone; α of the whole model. Layers before
    `start` were done by an earlier run."""
    layers = range(start, run.plan.layers)
    if layers:
        embed(run, run.streams.moving("survey", True))
    source = run.quantized.order if run.quantized else partial(read_order, run.plan, others=False)
    order = [item for layer in layers for item in source(layer)]
    with run.feed(order) as feed, run.drain() as drain:
        for layer in layers:
            run.progress.advance(label=f"survey: layer {layer + 1}/{run.plan.layers}")
            lrm, weights = survey_layer(run, feed, drain, layer)
            run.masses[layer] = attention_masses(run, layer, weights)
            keep_layer(run, layer, lrm)
            run.progress.layer("survey", layer, run.plan.layers)
            last = layer + 1 == run.plan.layers
            take(run, drain, "merge" if last else "survey", 0 if last else layer + 1)
            del lrm, weights
            give_back()
    if run.streams.instruction:
        run.streams.instruction.stash.drop()  # it has been all the way up: its memory is the other streams'
    masses = [run.masses[layer] for layer in range(run.plan.layers)]
    return alphas(masses, run.plan.recipe.coefficients, run.plan.layout)


def survey_layer(run: Run, feed: Feed, drain: Drain, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LRM's layer as stored ({} where only its rounded form is wanted) and as the forward wants it."""
    if run.quantized:
        lrm, rounded = run.quantized.survey(layer, partial(run.take, feed), drain)
        return lrm, lend(run, layer, rounded)
    lrm = {n: run.take(feed, run.plan.lrm, n) for n in run.plan.layer_tensors(layer)}
    return lrm, lend(run, layer, lrm)


def keep_layer(run: Run, layer: int, lrm: dict[str, Tensor]) -> None:
    """Keep the LRM's layer on the device for the second pass, where there is room for it."""
    nbytes = sum(t.numel() * t.element_size() for t in lrm.values())
    if lrm and run.keep >= nbytes:
        run.keep -= nbytes
        run.kept[layer] = lrm


def bases_of(run: Run, layer: int, lrm: dict[str, Tensor], weights: dict[str, Tensor]) -> LayerBases:
    """A layer's bases: an earlier merge's, or found and, where they are wanted later, kept."""
    if run.reuses("bases"):
        return run.artifacts.bases(layer)
    bases = stage_one(run, layer, run.quantized.rounded(layer, lrm) if run.quantized else weights)
    if run.artifacts and run.plan.recipe.needs_reasoning:
        run.artifacts.keep_bases(layer, bases)
    return bases


def stage_one(run: Run, layer: int, lrm: dict[str, Tensor]) -> LayerBases:
    """The reasoning set through θ_R's layer; bases of its features at Ω_think."""
    recipe, stream = run.plan.recipe, run.streams.reasoning
    if not recipe.needs_reasoning or stream is None:
        return LayerBases({})
    modules = {job.module for job in run.plan.merged.values() if job.layer == layer}
    sites = tuple(site for site, shared in SITES.items() if modules & set(shared))
    attended = recipe.thinking.attended_values and "v" in modules
    kind = feature_kind(recipe.basis)
    run.shelf = run.shelf or Stash(run.model.device, offload=True, spill=run.spill)
    capture = FeatureCapture(run.data.reasoning, stream.batches, run.plan.layout, attended, kind, run.shelf)
    run.advance(layer, lrm, stream, observer=capture, sites=sites)
    with run.meter.working(run.model.device, "bases"):
        return build_bases(capture, recipe.basis, recipe.seed, layer)


def stage_two(
    run: Run, layer: int, lrm: dict[str, Tensor], others: list[TaskVector], bases: LayerBases
) -> LayerAlpha:
    """The instruction set through θ_R + λ Δ⊥ (α = 1); α of this layer from its attention."""
    if not run.plan.recipe.needs_instruction:
        return own_alpha(run, layer)
    layout = run.plan.layout
    probe = {n: t for n, t, _ in compose_layer(run, lrm, others, bases, LayerAlpha.uniform(1.0, layout))}
    run.masses[layer] = attention_masses(run, layer, lend(run, layer, lrm | probe))
    return own_alpha(run, layer)


def own_alpha(run: Run, layer: int) -> LayerAlpha:
    """α of a layer from its own attention, or the same everywhere where the recipe measures none."""
    coefficients, layout = run.plan.recipe.coefficients, run.plan.layout
    if not run.plan.recipe.needs_instruction:
        return LayerAlpha.uniform(coefficients.value, layout)
    return alphas([run.masses[layer]], coefficients, layout)[0]


def attention_masses(run: Run, layer: int, weights: dict[str, Tensor]) -> LayerMass:
    """The instruction set through one layer; alignment and leakage of its heads."""
    stream = run.streams.instruction
    if run.observer is None:
        rows = run.plan.recipe.coefficients.rows
        run.observer = AttentionMass(run.data.instruction, stream.batches, run.plan.layout.heads, rows)
    run.advance(layer, weights, stream, observer=run.observer)
    return run.observer.result()


def lend(run: Run, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's weights as the forward wants them: names inside the layer, in the compute dtype.

    Raises InputError naming every non-finite weight of the models.
    """
    if not run.streams.all():
        return {}  # a merge without calibration runs no layer
    if not bool(torch.stack([torch.isfinite(t).all() for t in tensors.values()]).all()):
        raise non_finite_everywhere(run.plan)
    prefix = run.plan.family.layer_prefix(layer)
    return {name.removeprefix(prefix): t.to(run.model.dtype) for name, t in tensors.items()}


def compose_layer(
    run: Run, lrm: dict[str, Tensor], others: Iterable[TaskVector], bases: LayerBases, alpha: LayerAlpha
) -> Iterator[tuple[str, Tensor, Composed]]:
    """Every merged tensor of a layer with bases and α, rounded to its output dtype, and what happened to it."""
    plan = run.plan
    for name, itm, base, dense in others:
        job = plan.merged[name]
        dtype = _DTYPES.get(plan.recipe.dtype) or TORCH_DTYPES[plan.lrm.tensors[name].dtype]
        with run.meter.working(run.model.device, "composing"):
            tensor, told = compose(
                job.module, lrm[name], itm, base, bases.of(job.module), alpha, plan.layout, job.lam, dtype
            )
        if dense is not None:
            told = replace(told, dense=dense.item())
        if not told.finite:
            raise non_finite_everywhere(plan, InputError(
                f"{name}: the merged weights overflow {str(dtype).removeprefix('torch.')}, in which they are written; "
                "lower lambda, or write dtype: bfloat16 (or float32) in the recipe"))
        yield name, tensor, told
