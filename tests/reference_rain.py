"""RAIN stage by stage on whole resident models: the plain form that the single sweep must reproduce bit for bit.

Every stage runs over all layers before the next begins, with transformers' own models in memory: features of θ_R,
all bases, the whole of θ_R + λ Δ⊥, its attention, all α, the merged model. Nothing of sweep.py, forward.py's
streaming or the writer is used; the arithmetic of one layer (bases, compose, coefficients) is the package's own.
"""

from __future__ import annotations

import torch

from streammerge.attention import AttentionMass
from streammerge.bases import LayerBases, build_bases, feature_kind
from streammerge.batches import make_batches
from streammerge.capture import FeatureCapture
from streammerge.coefficients import alphas
from streammerge.compose import LayerAlpha, compose
from streammerge.forward import SITES
from streammerge.sdpa import ATTENTION


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION).eval()


def watch(model, plan, batches, make_observer, sites):
    """One whole forward of every batch; the observers of all layers."""
    observers = [make_observer() for _ in model.model.layers]
    for n, batch in enumerate(batches):
        hooks = []
        for layer, observer in zip(model.model.layers, observers, strict=True):
            for site in sites:
                linear = layer.get_submodule(plan.family.modules[SITES[site][0]])
                hooks.append(linear.register_forward_pre_hook(
                    lambda _, args, o=observer, s=site, n=n: o.on_input(n, s, args[0])()))  # fmt: skip
            layer.self_attn._streammerge_first = not sites and layer is model.model.layers[-1]
            layer.self_attn._streammerge_watcher = lambda call, o=observer, n=n: (o.on_attention(n, call) or int)()
        with torch.no_grad():
            model.model(input_ids=batch.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    return observers


def stage_by_stage(plan, data, tokens_per_batch):
    """(bases, α, merged weights by key) of the whole model; every dtype fp32."""
    recipe, layout = plan.recipe, plan.layout
    reasoning = make_batches(data.reasoning, tokens_per_batch)
    instruction = make_batches(data.instruction, tokens_per_batch)
    lrm = load(plan.lrm.path)

    def capture():
        kind = feature_kind(recipe.basis)
        return FeatureCapture(data.reasoning, reasoning, layout, recipe.thinking.attended_values, kind)

    captured = watch(lrm, plan, reasoning, capture, tuple(SITES))
    bases = [build_bases(c, recipe.basis, recipe.seed, i) for i, c in enumerate(captured)]

    def merged_with(alpha: list[LayerAlpha], bases: list[LayerBases]) -> dict[str, torch.Tensor]:
        out = {}
        for name, job in plan.merged.items():
            three = (m.read(name) for m in (plan.lrm, plan.itm, plan.base))
            out[name], _ = compose(
                job.module, *three, bases[job.layer].of(job.module), alpha[job.layer], layout, recipe.lam,
                plan.lrm.read(name).dtype,
            )  # fmt: skip
        return out

    probe = load(plan.lrm.path)
    if recipe.coefficients.scope == "layer":
        ones = [LayerAlpha.uniform(1.0, layout)] * plan.layers
        probe.load_state_dict(merged_with(ones, bases), strict=False)

    def mass():
        return AttentionMass(data.instruction, instruction, layout.heads, recipe.coefficients.rows)

    masses = [o.result() for o in watch(probe, plan, instruction, mass, ())]
    if recipe.coefficients.scope == "layer":
        alpha = [alphas([m], recipe.coefficients, layout)[0] for m in masses]
    else:
        alpha = alphas(masses, recipe.coefficients, layout)
    return bases, alpha, merged_with(alpha, bases)
