"""Attention statistics -> α: every rule, scope and bound, and what each module makes of it (Eqs. 11-15)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge import merge
from streammerge.arch import HeadLayout
from streammerge.attention import AttentionMass, LayerMass
from streammerge.batches import Batch
from streammerge.calibration import Instruction, InstructionSample
from streammerge.coefficients import alphas, spread
from streammerge.compose import LayerAlpha, scales
from streammerge.recipe import Coefficients
from streammerge.report import alpha_summary
from streammerge.sdpa import AttentionInputs

LAYOUT = HeadLayout(6, 2, 5)
WIDE = (-100.0, 100.0)  # bounds that nothing reaches


def masses(layers: int = 3, seed: int = 0) -> list[LayerMass]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.rand(layers, 2, 6, generator=generator, dtype=torch.float64) * 0.02
    return [LayerMass(a * (n + 1), u) for n, (a, u) in enumerate(both)]


def found(coefficients: Coefficients, given=None) -> np.ndarray:
    return torch.stack([a.heads for a in alphas(given or masses(), coefficients, LAYOUT)]).double().numpy()


def statistics(given=None, rho: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(g, H) in numpy: Eq. 14 and its diagonal curvature."""
    a = np.stack([m.alignment.numpy() for m in given or masses()])
    u = np.stack([m.leakage.numpy() for m in given or masses()])
    return a - rho * u, 1 + u


@pytest.mark.parametrize("kappa", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_standardized_over_the_model(kappa, rho):
    g, _ = statistics(rho=rho)
    wanted = 1 + kappa * (g - g.mean()) / g.std()
    np.testing.assert_allclose(found(Coefficients(kappa=kappa, rho=rho, bounds=WIDE)), wanted, rtol=1e-5)


def test_scope_is_what_is_given_together():
    """Layer scope calls with one layer at a time: every layer's mean is 1. Over the model only the whole mean is."""
    one_by_one = np.concatenate([found(Coefficients(bounds=WIDE), [m]) for m in masses()])
    g, _ = statistics()
    wanted = 1 + Coefficients().kappa * (g - g.mean(1, keepdims=True)) / g.std(1, keepdims=True)
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-5)
    together = found(Coefficients(bounds=WIDE))
    assert abs(together.mean() - 1) < 1e-6 and abs(together.mean(1) - 1).max() > 0.1


def test_literal():
    g, h = statistics()
    np.testing.assert_allclose(found(Coefficients(rule="literal", bounds=WIDE)), g / h, rtol=1e-5)


def test_prior():
    g, h = statistics()
    np.testing.assert_allclose(found(Coefficients(rule="prior", bounds=WIDE)), 1 + g / h, rtol=1e-6)


@pytest.mark.parametrize("rule", ["standardized", "literal", "prior"])
def test_leakage_lowers_and_alignment_raises(rule):
    base = masses()
    less = [LayerMass(m.alignment.clone(), m.leakage.clone()) for m in base]
    less[1].leakage[2] += 0.01
    more = [LayerMass(m.alignment.clone(), m.leakage.clone()) for m in base]
    more[1].alignment[2] += 0.01
    coefficients = Coefficients(rule=rule, bounds=WIDE)
    assert found(coefficients, less)[1, 2] < found(coefficients)[1, 2] < found(coefficients, more)[1, 2]


@pytest.mark.parametrize("rule", ["standardized", "literal", "prior"])
@pytest.mark.parametrize("bounds", [(0.0, 2.0), (0.9, 1.1), (1.0, 1.0)])
def test_bounds(rule, bounds):
    free = found(Coefficients(rule=rule, kappa=3.0, bounds=WIDE))
    held = found(Coefficients(rule=rule, kappa=3.0, bounds=bounds))
    np.testing.assert_allclose(held, np.clip(free, *bounds), rtol=1e-6)
    assert rule != "standardized" or (held != free).any()


@pytest.mark.parametrize("value", [0.01, 0.1, 1 / 3, 0.07])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_no_deviation_means_no_preference(layers, value):
    """Rounding in the mean of equal numbers is not a preference either."""
    same = [LayerMass(torch.full((6,), value).double(), torch.zeros(6).double()) for _ in range(layers)]
    same[0].alignment[0] *= 1 + 1e-9
    assert (found(Coefficients(), same) == 1).all()
    none = [LayerMass(torch.zeros(6).double(), torch.zeros(6).double())]
    assert (found(Coefficients(), none) == 1).all()


def test_alpha_of_every_module():
    """k and v take the mean of the query heads they serve, h // group; the FFN takes the mean of all."""
    alpha = spread(torch.tensor([0.0, 0.3, 0.6, 1.0, 1.2, 2.0]), LAYOUT)
    torch.testing.assert_close(alpha.kv_heads, torch.tensor([0.3, 1.4]))
    assert alpha.ffn == pytest.approx(0.85)
    rows = {m: scales(m, alpha, LAYOUT, torch.Size(s)) for m, s in
            {"q": (30, 8), "k": (10, 8), "v": (10, 8), "o": (8, 30), "gate": (7, 8), "up": (7, 8), "down": (8, 7)}
            .items()}  # fmt: skip
    assert rows["q"][0].tolist() == alpha.heads.repeat_interleave(5).tolist() and bool((rows["q"][1] == 1).all())
    for module in ("k", "v"):
        torch.testing.assert_close(rows[module][0], torch.tensor([0.3] * 5 + [1.4] * 5))
    assert rows["o"][1].tolist() == alpha.heads.repeat_interleave(5).tolist() and bool((rows["o"][0] == 1).all())
    for module in ("gate", "up", "down"):
        assert rows[module][0].tolist() == pytest.approx([0.85] * len(rows[module][0]))


def test_uniform():
    alpha = LayerAlpha.uniform(0.4, LAYOUT)
    assert alpha.heads.tolist() == pytest.approx([0.4] * 6) and alpha.kv_heads.tolist() == pytest.approx([0.4] * 2)
    assert alpha.ffn == 0.4


# ---- the statistics


def mass_of(rows: str, instructions, length: int = 12) -> LayerMass:
    """One sample, two heads, scores that depend on the position of the row alone: A[t, τ] is 1 / (t + 1)."""
    sample = InstructionSample("s", tuple(range(length)), tuple(instructions))
    batch = Batch(torch.zeros(1, length + 3, dtype=torch.long), (length,), (0,))
    observer = AttentionMass([sample], [batch], 2, rows)
    q, k = torch.zeros(1, 2, length + 3, 4), torch.zeros(1, 1, length + 3, 4)
    observer.on_attention(0, AttentionInputs(q, k, 0.5, None))
    return observer.result()


@pytest.mark.parametrize("rows, shift", [("predicting", 1), ("token", 0)])
def test_rows_at_the_token_or_at_its_prediction(rows, shift):
    found = mass_of(rows, [Instruction("i", (1, 2), (5, 9), (7,))])
    a = np.mean([1 / (t - shift + 1) for t in (5, 9)])
    torch.testing.assert_close(found.alignment, torch.full((2,), a, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.leakage, torch.full((2,), 1 / (8 - shift), dtype=torch.float64), rtol=1e-6, atol=0)


def test_means_are_over_instructions_that_have_such_rows():
    """An instruction without unrelated rows says nothing about leakage: it must not count as zero."""
    found = mass_of("token", [Instruction("i", (1,), (3,), ()), Instruction("j", (1,), (7,), (9,))])
    assert found.alignment.tolist() == pytest.approx([(1 / 4 + 1 / 8) / 2] * 2)
    assert found.leakage.tolist() == pytest.approx([1 / 10] * 2)


def test_nothing_measured_is_zero():
    found = mass_of("token", [])
    assert found.alignment.tolist() == found.leakage.tolist() == [0, 0]


# ---- what a run says


def test_summary():
    second = spread(torch.tensor([0.0, 0.5, 1.0, 1.0, 1.5, 2.0]), LAYOUT)
    told = alpha_summary({1: second, 0: LayerAlpha.uniform(1.0, LAYOUT)}, (0.0, 2.0))
    assert (told["min"], told["max"]) == (0.0, 2.0) and told["mean"] == pytest.approx(1.0)
    assert told["share_at_bounds"] == pytest.approx(2 / 12)
    assert told["heads"] == [[1.0] * 6, [0.0, 0.5, 1.0, 1.0, 1.5, 2.0]]  # in the order of the layers


@pytest.mark.parametrize("options", [
    {}, {"scope": "model"}, {"rule": "prior"}, {"rho": 0.0, "kappa": 1.5, "bounds": [0.5, 1.5]},
    {"rule": "uniform", "value": 0.6},
])  # fmt: skip
def test_the_report_holds_alpha_and_what_it_came_from(make_recipe, tmp_path, options):
    """α in the report follows from the attention statistics beside it, by the formulas above."""
    recipe = make_recipe(coefficients=options)
    report = merge(recipe, tmp_path / "out")
    alpha, attention = report["alpha"], report["attention"]
    heads = np.array(alpha["heads"])
    assert heads.shape == (3, 4)
    assert (alpha["min"], alpha["max"]) == pytest.approx((heads.min(), heads.max()), abs=1e-6)
    assert alpha["mean"] == pytest.approx(heads.mean(), abs=1e-6)
    low, high = recipe.coefficients.bounds
    assert alpha["share_at_bounds"] == pytest.approx(((heads <= low + 1e-6) | (heads >= high - 1e-6)).mean())
    if recipe.coefficients.rule == "uniform":
        assert attention == {} and (heads == 0.6).all()
        assert report["totals"]["applied_over_delta"] == pytest.approx(0.6 * report["totals"]["kept_over_delta"])
        return
    a, u = (np.array([attention[str(n)][key] for n in range(3)]) for key in ("alignment", "leakage"))
    g = a - recipe.coefficients.rho * u
    if recipe.coefficients.rule == "prior":
        wanted = 1 + g / (1 + u)
    else:
        axis = None if recipe.coefficients.scope == "model" else 1
        z = (g - g.mean(axis, keepdims=True)) / g.std(axis, keepdims=True)
        wanted = 1 + recipe.coefficients.kappa * z
    np.testing.assert_allclose(heads, np.clip(wanted, low, high), atol=2e-6)
    assert heads.std() > 1e-4
