"""The layer-major forward against transformers' resident model: bit-equal in the same dtype and batch."""

from __future__ import annotations

import pytest
import torch

from streammerge import sdpa
from streammerge.arch import family_of
from streammerge.batches import make_batches
from streammerge.forward import Stream, StreamedModel
from streammerge.io.checkpoint import open_checkpoint

CPU = torch.device("cpu")


class Sample:
    """Token ids are all that a stream needs."""

    def __init__(self, length: int, seed: int):
        self.ids = tuple(torch.randint(0, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def streamed(path, samples, dtype, tokens_per_batch=160, **seen):
    """The checkpoint and hidden states after the last layer, batch by batch, one layer's weights at a time."""
    checkpoint = open_checkpoint(path, "reasoning_model")
    family = family_of(checkpoint.config, "here")
    model = StreamedModel(checkpoint, family, CPU, dtype)
    stream = Stream(make_batches(samples, tokens_per_batch), CPU)
    model.embed(stream)
    for layer in range(checkpoint.config["num_hidden_layers"]):
        prefix = family.layer_prefix(layer)
        names = [n for n in checkpoint.tensors if n.startswith(prefix)]
        model.advance(layer, {n.removeprefix(prefix): checkpoint.read(n).to(dtype) for n in names}, stream, **seen)
    return model, stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_the_resident_model(any_trio, dtype):
    from transformers import AutoModelForCausalLM

    family, paths = any_trio
    samples = [Sample(n, n) for n in (7, 30, 31, 55, 64, 3)]  # longer than the families' 24-token windows
    model, stream = streamed(paths["lrm"], samples, dtype)
    resident = AutoModelForCausalLM.from_pretrained(paths["lrm"], dtype=dtype, attn_implementation="sdpa").eval()
    assert len(stream.batches) > 1
    for n, batch in enumerate(stream.batches):
        with torch.no_grad():
            body = resident.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
        mine = torch.nn.functional.linear(resident.model.norm(stream.stash.fetch(n)), resident.lm_head.weight)
        theirs = resident.lm_head(body.last_hidden_state)
        for row, length in enumerate(batch.lengths):
            assert torch.equal(mine[row, :length], theirs[row, :length]), f"{family}: batch {n}, row {row}"


class Watcher:
    """Keeps what it is shown."""

    def __init__(self):
        self.calls, self.inputs = [], []

    def on_attention(self, batch, call):
        self.calls.append(call)

    def on_input(self, batch, site, x):
        self.inputs.append(site)


@pytest.mark.parametrize("sites", [(), ("attn_in",), ("attn_in", "attn_out"), ("mlp_in", "mlp_mid")])
def test_an_observed_stream_ends_with_the_last_layer(trio, sites, monkeypatch):
    """What no observer sees is not computed there, and every observer sees all that it asked for."""
    plain, ran = sdpa.sdpa_attention_forward, []
    monkeypatch.setattr(sdpa, "sdpa_attention_forward", lambda *a, **k: ran.append(1) or plain(*a, **k))
    watcher = Watcher()
    model, stream = streamed(trio["lrm"], [Sample(9, 1)], torch.float32, observer=watcher, sites=sites)
    layers, attends = len(watcher.calls), bool(set(sites) - {"attn_in"})
    assert layers == model.checkpoint.config["num_hidden_layers"] and watcher.inputs == [*sites] * layers
    assert len(ran) == layers - (not attends) and stream.stash.nbytes == 0
    told = [call.lse is not None for call in watcher.calls]
    assert told == [True] * (layers - 1) + [attends]


def test_attention_tells_the_denominators_of_its_rows(any_trio):
    """log Σ exp(q kᵀ) over what a row sees, with a window and without."""
    watcher = Watcher()
    streamed(any_trio[1]["lrm"], [Sample(60, 1)], torch.float32, observer=watcher)
    away = torch.arange(60)[:, None] - torch.arange(60)
    for call in watcher.calls[:-1]:
        keys = call.k.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)
        hidden = (away < 0) | (away >= (call.window or 60))
        wanted = (call.scaling * call.q.double() @ keys.mT).masked_fill(hidden, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(call.lse.double(), wanted, rtol=1e-5, atol=1e-5)


def test_sliding_window_is_applied(any_trio):
    """A family with a window must differ from the same weights without one: the mask reaches the layers."""
    family, paths = any_trio
    windowed = family in ("mistral", "qwen2")
    _, stream = streamed(paths["lrm"], [Sample(60, 1)], torch.float32)
    checkpoint = open_checkpoint(paths["lrm"], "reasoning_model")
    assert bool(checkpoint.config.get("sliding_window")) == windowed
    if windowed:
        import json
        import shutil

        open_path = paths["lrm"].parent / "no_window"
        if not open_path.exists():
            shutil.copytree(paths["lrm"], open_path)
            config = json.loads((open_path / "config.json").read_text())
            config.update(sliding_window=4096)
            (open_path / "config.json").write_text(json.dumps(config))
        _, free = streamed(open_path, [Sample(60, 1)], torch.float32)
        assert not torch.equal(stream.stash.fetch(0), free.stash.fetch(0))
        assert torch.equal(stream.stash.fetch(0)[:, :24], free.stash.fetch(0)[:, :24])


def test_final_hidden_is_in_sample_order(trio):
    samples = [Sample(n, n) for n in (20, 5, 11)]
    model, stream = streamed(trio["lrm"], samples, torch.float32)
    rows = model.final_hidden(stream, [(19,), (0, 4), (10,)])
    alone = [streamed(trio["lrm"], [s], torch.float32) for s in samples]
    wanted = torch.cat([m.final_hidden(s, [at]) for (m, s), at in zip(alone, [(19,), (0, 4), (10,)], strict=True)])
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
