"""S(Δ): exact thresholds against a full sort, masks that know nothing but the seed, the tensor's name and the place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge import sparsify as module
from streammerge.sparsify import sparsify


def _trimmed(x: torch.Tensor, density: float) -> torch.Tensor:
    """The definition, by a stable sort of the whole tensor."""
    order = np.argsort(-np.abs(x.double().numpy().ravel()), kind="stable")
    kept = np.zeros(x.numel(), bool)
    kept[order[: max(1, int(density * x.numel()))]] = True
    return torch.where(torch.from_numpy(kept).reshape(x.shape), x, 0)


def _magnitude(x: torch.Tensor, density: float) -> torch.Tensor:
    return sparsify(x.clone(), "magnitude", density, rescale=True, seed=0, name="w")


def _dare(x: torch.Tensor, density: float, rescale: bool = False, seed: int = 0, name: str = "w") -> torch.Tensor:
    return sparsify(x.clone(), "dare", density, rescale=rescale, seed=seed, name=name)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("kind", ["normal", "ties", "tiny", "zeros", "one value", "fp64"])
def test_trim_keeps_the_largest(kind, density, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 256)  # several chunks, ties across them
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 53, generator=generator)
    x = {"normal": x, "ties": (x * 4).round() / 4, "tiny": x * 1e-40, "zeros": x.masked_fill(x.abs() < 1, 0.0),
         "one value": torch.full_like(x, -0.5), "fp64": x.double() + 1e-12 * x.double().square()}[kind]  # fmt: skip
    found = _magnitude(x, density)
    assert torch.equal(found, _trimmed(x, density))
    assert found.dtype == x.dtype


def test_trim_keeps_one_element_at_least():
    x = torch.tensor([[0.1, -0.3, 0.2]])
    assert _magnitude(x, 0.01).tolist() == [[0.0, x[0, 1].item(), 0.0]]


def test_chunks_do_not_matter(monkeypatch):
    x = torch.randn(301, 77).round(decimals=1)
    whole = _magnitude(x, 0.3), _dare(x, 0.3)
    monkeypatch.setattr(module, "_CHUNK", 1024)
    assert torch.equal(_magnitude(x, 0.3), whole[0])
    assert torch.equal(_dare(x, 0.3), whole[1])


def test_dare_is_counted():
    """Element i of the mask is word i of Philox under the tensor's key, whatever came before it."""
    x = torch.ones(5, 1000)
    found = _dare(x, 0.3, seed=7, name="layer.weight").bool()
    for at in (0, 8, 1000, 4096):
        generator = np.random.Philox(key=module._key(7, "layer.weight")).advance(at // 8)
        words = generator.random_raw(4).astype("<u8").view("<u4")
        assert found.flatten()[at : at + 8].tolist() == (words < round(0.3 * 2**32)).tolist()
    assert module._key(7, "layer.weight").tolist() == [11121100304144714772, 4536101147266551977]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_dare_share_and_scale(density):
    x = torch.randn(500, 600)
    found = _dare(x, density, rescale=True)
    kept, n = int(found.count_nonzero()), x.numel()
    assert abs(kept - density * n) < 5 * (n * density * (1 - density)) ** 0.5
    assert torch.equal(found[found != 0], (x / density)[found != 0])  # one rounding
    assert torch.equal(_dare(x, density)[found != 0], x[found != 0])
    assert found.double().mean().item() == pytest.approx(x.double().mean().item(), abs=5 / (n * density) ** 0.5)


def test_masks_are_independent():
    """Other seeds and other tensors: the share that two masks of density 1/2 have in common is a quarter."""
    x = torch.ones(400, 400)
    masks = [_dare(x, 0.5, seed=s, name=n) for s, n in ((0, "a"), (1, "a"), (0, "b"))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((masks[one] * masks[other]).mean()) - 0.25) < 0.006  # five standard deviations
    assert torch.equal(masks[0], _dare(x, 0.5, name="a"))


@pytest.mark.parametrize("method", ["none", "magnitude", "dare"])
def test_whole(method):
    x = torch.randn(9, 9)
    assert torch.equal(sparsify(x.clone(), method, 1.0, rescale=True, seed=0, name="w"), x)


@pytest.mark.parametrize("method", ["magnitude", "dare"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(method, bad):
    x = torch.randn(64, 64)
    x[::2, ::2] = bad  # more than are kept
    assert not torch.isfinite(sparsify(x, method, 0.1, rescale=True, seed=0, name="w")).all()
