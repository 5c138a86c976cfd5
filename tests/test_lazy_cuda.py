"""The copies of the GPU path, with every asynchronous one as late as it may be."""

from __future__ import annotations

import lazy_cuda
import pytest
import torch
from lazy_cuda import CUDA
from safetensors.torch import save_file

from streammerge.io import feed as feeding
from streammerge.io.checkpoint import open_checkpoint
from streammerge.io.stash import Stash


def test_the_model_of_cuda_is_lazy(monkeypatch):
    """Without waiting, a copy has not happened; with it, it has."""
    lazy_cuda.install(monkeypatch)
    side, source = torch.cuda.Stream(), torch.ones(4)
    with torch.cuda.stream(side):
        far = source.to(CUDA, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
    assert float(far[0]) == 77
    source.fill_(2)  # too early: the copy has not left
    torch.cuda.current_stream().wait_event(landed)
    assert float(far[0]) == 2


@pytest.mark.parametrize("slot", [64, 4096, 1 << 20])
def test_slots_are_not_filled_before_they_are_empty(tmp_path, monkeypatch, slot):
    tensors = {f"t{n}": torch.arange(n, 5000 + n, dtype=torch.int32) for n in range(6)} | {"none": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, "reasoning_model")
    lazy_cuda.install(monkeypatch)
    monkeypatch.setattr(feeding, "SLOT", slot)
    order = [(checkpoint, name) for name in (*tensors, "t3")]
    with feeding.Feed(order, CUDA, 45_000) as feed:
        for _, name in order:
            assert torch.equal(feed.take(checkpoint, name), tensors[name]), name


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_offloaded_activations_come_back_as_they_left(monkeypatch, batches):
    """Three layers, each of which adds one: what was sent is fetched, in order, with the next batch under way."""
    told = lazy_cuda.install(monkeypatch)
    stash = Stash(CUDA, offload=True)
    for n in range(batches):
        stash.put(n, torch.full((2, 3 + n, 4), float(n)))
    for layer in range(3):
        for n in range(batches):
            hidden = stash.fetch(n)
            assert hidden.shape == (2, 3 + n, 4) and float(hidden.min()) == float(hidden.max()) == n + layer
            stash.put(n, hidden + 1)
    assert float(stash.part(0, 1)[0, 0]) == 3
    assert len(told.registered) == batches and stash.nbytes == sum(2 * (3 + n) * 4 * 4 for n in range(batches))
    stash.drop()
    assert told.registered == [] and stash.nbytes == 0
