"""Methods that drop at random: the distribution that the papers state, reproducible whatever the chunks and threads."""

from __future__ import annotations

import pytest
import torch
from method_runs import merged, same_bits

from streammerge.errors import RecipeError

SHAPE = (96, 211)
DROPPING = [("dare_linear", {}), ("dare_ties", {}), ("della", {"epsilon": 0.2}), ("della_linear", {"epsilon": 0.2})]


def task_vector(method, density, *, dtype=torch.float32, shape=SHAPE, models=1, weight=1.0, seed=0, chunk=1 << 17,
                threads=1, root=None, parameters=None, **per_model):  # fmt: skip
    """-> (deltas, what is left of their sum) over a base of zeros."""
    torch.manual_seed(7)
    deltas = [torch.randn(shape).to(dtype) for _ in range(models)]
    lists = {"density": [density] * models, "weight": [weight] * models}
    lists |= {key: [value] * models for key, value in per_model.items()}
    own = {"rescale": False, "normalize": False, **(parameters or {})}
    base = torch.zeros(shape, dtype=dtype)
    return deltas, merged(root, method, deltas, base, parameters=own, seed=seed, chunk=chunk, threads=threads, **lists)


@pytest.mark.parametrize("method, options", DROPPING)
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_the_share_that_is_kept(method, options, density, tmp_path):
    (delta,), found = task_vector(method, density, root=tmp_path, **options)
    kept = found != 0
    assert torch.equal(found[kept], delta[kept])
    n = delta.numel()
    assert abs(kept.double().mean() - density) < 5 * (density * (1 - density) / n) ** 0.5
    by_row = kept.double().mean(1)  # no row and no stretch is favoured
    assert (by_row - density).abs().max() < 6 * (density * (1 - density) / SHAPE[1]) ** 0.5


def test_dare_does_not_look_at_magnitudes_and_della_does(tmp_path):
    """Of the smallest entries of a row DELLA keeps density − ε, of the largest density + ε."""
    for method, options, low, high in (("dare_linear", {}, 0.5, 0.5), ("della_linear", {"epsilon": 0.2}, 0.33, 0.67)):
        (delta,), found = task_vector(method, 0.5, shape=(600, 40), root=tmp_path, **options)
        kept = (found != 0).double().gather(1, delta.abs().argsort(1))
        n = 600 * 13
        for part, wanted in ((kept[:, :13], low), (kept[:, -13:], high)):  # thirds of the ranks
            expected = wanted if method == "dare_linear" else 0.5 + (0.2 * 26 / 39 if part is not kept else 0) * (
                1 if wanted > 0.5 else -1)  # fmt: skip
            assert abs(part.mean() - expected) < 5 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("method, options", DROPPING)
def test_the_same_seed_gives_the_same_bits(method, options, tmp_path):
    runs = [task_vector(method, 0.4, models=2, dtype=torch.bfloat16, root=tmp_path, chunk=chunk, threads=threads,
                        parameters={"rescale": True}, **options)[1]
            for chunk, threads in ((1 << 17, 1), (700, 3), (1000, 2))]  # fmt: skip
    assert same_bits(runs[0], runs[1]) and same_bits(runs[0], runs[2])
    other = task_vector(method, 0.4, models=2, dtype=torch.bfloat16, root=tmp_path, seed=1,
                        parameters={"rescale": True}, **options)[1]  # fmt: skip
    assert (runs[0] != other).double().mean() > 0.3


@pytest.mark.parametrize("method, options", DROPPING)
def test_models_and_tensors_are_drawn_apart(method, options, tmp_path):
    """Of two models with the same task vector, entries are kept independently: both with probability density²."""
    torch.manual_seed(0)
    delta, base = torch.rand(SHAPE) + 1, torch.zeros(SHAPE)
    lists = {"density": [0.5] * 2, "weight": [1.0, 10.0]} | {key: [value] * 2 for key, value in options.items()}
    own = {"rescale": False, "normalize": False}
    found = merged(tmp_path, method, [delta, delta], base, parameters=own, **lists) / delta
    both = (found > 10.5).double().mean()
    assert abs(both - 0.25) < (0.02 if options else 5 * (0.1875 / delta.numel()) ** 0.5)  # DELLA: E[p²] > density²
    again = merged(tmp_path, method, [delta, delta], base, parameters=own, name="v", **lists) / delta
    assert (found.round() != again.round()).double().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method, options", DROPPING)
def test_the_l1_norm_is_restored(method, options, dtype, tmp_path):
    (delta,), found = task_vector(method, 0.3, dtype=dtype, parameters={"rescale": True}, root=tmp_path, **options)
    kept = found != 0
    assert 0.2 < kept.double().mean() < 0.4
    assert abs(found.double().abs().sum() / delta.double().abs().sum() - 1) < (1e-5 if dtype.itemsize == 4 else 5e-3)
    assert torch.equal(found.sign()[kept], delta.sign()[kept])


@pytest.mark.parametrize("method, options", DROPPING)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(method, options, density, tmp_path):
    (delta,), found = task_vector(method, density, parameters={"rescale": True}, root=tmp_path, **options)
    assert torch.equal(found, delta * density)


def test_vectors_and_rows_of_one_entry(tmp_path):
    for shape in ((3000,), (3000, 1), (20, 30, 5)):
        _, found = task_vector("della_linear", 0.5, shape=shape, epsilon=0.2, root=tmp_path)
        assert abs((found != 0).double().mean() - 0.5) < 0.05


def test_an_epsilon_that_leaves_no_probability_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"w: density 0.1 and epsilon 0.15.*between 0 and 1"):
        task_vector("della", 0.1, epsilon=0.15, root=tmp_path)
