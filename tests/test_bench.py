"""`streammerge bench` on a shape of a few kilobytes: every number is there, adds up, and nothing stays behind."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from streammerge.bench import run, samples, shapes
from streammerge.bench.extrapolate import Whole, extrapolate
from streammerge.bench.measure import Measured
from streammerge.bench.run import Question, bench
from streammerge.bench.table import print_answer
from streammerge.cli import main
from streammerge.errors import ResourceError
from streammerge.forward import StreamedModel
from streammerge.io.checkpoint import open_checkpoint
from streammerge.recipe import Budget
from streammerge.run import Meter, Run

TINY = shapes.Shape("tiny", "qwen2", 64, 160, 6, 4, 2, 700, False)


def ask(scratch: Path, **changed) -> Question:
    given = {"layers": 2, "tokens": 3000, "calibration_tokens": 20000, "device": "cpu", "scratch": scratch}
    return Question(TINY, **(given | changed))


@pytest.fixture(scope="module", params=["model", "layer"])
def report(request, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("scratch")
    found = bench(ask(scratch, scope=request.param))
    assert not list(scratch.iterdir())
    return found


def test_every_number_is_finite(report):
    def numbers(value):
        if isinstance(value, dict):
            yield from (n for v in value.values() for n in numbers(v))
        elif isinstance(value, float | int):
            yield value

    found = list(numbers(report))
    assert len(found) > 60 and all(math.isfinite(n) and n >= 0 for n in found)
    assert json.loads(json.dumps(report)) == report


def test_the_answer_adds_up(report):
    found, whole, answer = report["measured"], report["whole"], report["extrapolated"]
    assert answer["total"] == pytest.approx(sum(answer["parts"].values()))
    assert answer["total"] >= whole["layers"] * answer["layer"]["seconds"] > 0
    assert answer["layer"]["seconds"] >= max(answer["layer"]["work"], 0.999 * answer["layer"]["disk"])
    assert sum(found["parts"].values()) + found["waited"] + found["blocked"] <= found["sweep"]
    assert set(found["parts"]) == {"embedding", "reasoning", "instruction", "reference", "verification", "bases",
                                   "composing"}  # fmt: skip
    passes = 2 if report["scope"] == "model" else 1
    assert whole["passes"] == passes
    assert found["nbytes"] == found["layers"] * (passes * whole["lrm"] + whole["others"])


def test_the_whole_merge_is_planned_not_the_small_one(report):
    config = TINY.config()
    size = sum(2 * math.prod(t.shape) for t in shapes.tensors(config))
    whole = report["whole"]
    assert report["plan"]["disk"] == size == whole["layers"] * whole["lrm"] + whole["outside"]
    assert report["measured"]["layers"] == 2 < whole["layers"] == 6
    rows = report["thinking_positions"]
    assert rows["measured"] == rows["whole"] > 0  # bases cost what they will
    assert sum(report["measured"]["tokens"].values()) < sum(whole["tokens"].values())


def test_the_table_tells_the_total(report, capsys):
    print_answer(report)
    told = " ".join(capsys.readouterr().err.split())
    assert f"Total {report['extrapolated']['total'] / 60:.1f} minutes" in told
    assert "Extrapolated from 2 to 6 layers" in told and "tokenisation is left out" in told
    assert all(term in told for term, nbytes in report["plan"]["host"].items() if nbytes)


TOKENS = {"reasoning": 100, "instruction": 50, "reference": 10, "verification": 10}
SECONDS = {"reasoning": 14.0, "instruction": 6.0, "reference": 1.0, "verification": 1.0, "bases": 4.0, "composing": 3.0}
MEASURED = Measured(
    layers=2, tokens=TOKENS, parts=SECONDS | {"embedding": 1.7}, sweep=40.7, waited=5.0, blocked=1.0, busy=None,
    think=0.5, verify=2.0, nbytes=0, written=400, rank=0.1, read_rate=100.0, memory={},
)  # fmt: skip
WHOLE = Whole(layers=8, tokens={k: 10 * v for k, v in TOKENS.items()}, lrm=1000, others=1800, outside=600,
              vocabulary=4.0, passes=2, kept=0.25)  # fmt: skip


def test_the_arithmetic():
    """By hand: a layer's rest is (40.7 - 6 - 30.7) / 2 = 2 s, its features 7 - 5 = 2 s beyond the held-out rate."""
    found = extrapolate(MEASURED, WHOLE, 10.0, {"imports": 3.0})
    parts = {part: round(seconds, 6) for part, seconds in found.parts.items()}
    assert parts == {
        "imports": 3.0, "embedding": 17.0, "forwards: reasoning": 8 * 52.0, "forwards: instruction": 8 * 30.0,
        "forwards: reference": 8 * 5.0, "forwards: verification": 8 * 5.0, "bases": 16.0, "composing": 12.0,
        "the rest of the sweep": 16.0, "waiting for the disk": 8 * (125.5 - 67.5) + 10.0,
        "copying what is outside the layers": 66.0, "L_think": 2.0, "verification": 92.0,
    }  # fmt: skip
    # first pass: 30 s of work hide 10 of disk; second: 52 + 5 + 5 + 2 + 1.5 + 2 = 67.5 beside (750 + 1800) / 100 +
    # 1000 / 10 = 125.5
    assert found.layer == {"work": 97.5, "disk": 135.5, "seconds": 155.5}
    assert found.total == pytest.approx(sum(found.parts.values()))
    once = extrapolate(MEASURED, dataclasses.replace(WHOLE, passes=1), 50.0, {})
    assert once.layer == {"work": 97.5, "disk": 48.0, "seconds": 97.5}


def test_measured_in_full_is_what_was_measured():
    """No factor is left where layers and tokens are all measured."""
    whole = dataclasses.replace(WHOLE, layers=2, tokens=TOKENS, passes=1, vocabulary=1.0)
    found = extrapolate(dataclasses.replace(MEASURED, read_rate=1e9), whole, 1e9, {})
    assert found.total == pytest.approx(40.7 - 6.0 + 0.5 + 16.0, abs=1e-3)  # a quick disk: no waits


def test_the_meter_tells_waits_for_the_writer():
    """The second piece waits for room until the first is written, and leaving waits for the second."""
    at_work = SimpleNamespace(ahead=10, meter=Meter())
    with Run.drain(at_work) as drain:
        for _ in range(2):
            drain.hand(lambda: time.sleep(0.2), 8)
    assert 0.35 < at_work.meter.blocked < 2


def test_samples_are_as_asked():
    whole = samples.calibration(samples.AUTHORS, 500, 0.1)
    assert (len(whole.reasoning), len(whole.heldout), len(whole.instruction)) == (135, 15, 365)
    every = (*whole.reasoning, *whole.heldout, *whole.instruction)
    assert sum(len(s.ids) for s in every) == pytest.approx(samples.AUTHORS, rel=0.01)
    few = samples.calibration(4000, 500, 0.1, samples.rows(whole))
    assert samples.rows(few) == samples.rows(whole) == 8 * 135
    for sample in (*few.reasoning, *few.heldout):
        assert list(sample.omega) == sorted(set(sample.omega)) and sample.omega[-1] < len(sample.ids)
        assert max(sample.ids) < 500
    for sample in few.instruction:
        for one in sample.instructions:
            assert max(one.columns) < min(one.aligned) and not set(one.aligned) & set(one.unrelated)


def test_the_trio_is_of_the_shape_and_three_models(tmp_path):
    paths, rate = run._make(tmp_path, TINY.config(2))
    opened = {role: open_checkpoint(path, role) for role, path in paths.items()}
    wanted = {t.name: t.shape for t in shapes.tensors(TINY.config(2))}
    name = "model.layers.1.mlp.down_proj.weight"
    assert rate > 0 and all({t.name: t.shape for t in c.tensors.values()} == wanted for c in opened.values())
    lrm, itm, base = (opened[role].read(name).float() for role in ("lrm", "itm", "base"))
    for other in (lrm, itm):
        assert 0 < (other - base).std() < 0.1 * base.std()
    assert not torch.equal(lrm, itm) and base.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("flags, code, told", [
    (["--shape", "8b"], 2, "70b"),
    (["--shape", "0.5b", "--layers", "25"], 2, "has 24 layers"),
    (["--shape", "0.5b", "--layers", "0"], 2, "at least 1"),
    (["--shape", "0.5b", "--scratch-dir", "nowhere"], 2, "nowhere: no such directory"),
    (["--shape", "0.5b", "--device", "tpu"], 2, "--device tpu"),
    (["--shape", "70b", "--host-memory", "1GiB"], 4, "given"),
    ([], 2, "--shape"),
])  # fmt: skip
def test_mistakes_are_told(flags, code, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        ended = main(["bench", *flags, "--device", "cpu"] if "--device" not in flags else ["bench", *flags])
    except SystemExit as stop:
        ended = stop.code
    text = capsys.readouterr()
    assert ended == code and told in text.err and not text.out
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_it_is_full(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ResourceError, match=r"1.00 MiB free; .*fewer --layers"):
        bench(ask(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_budget_shapes_the_plan_and_the_run(tmp_path):
    found = bench(ask(tmp_path, budget=Budget(tokens_per_batch=4096), calibration_tokens=3000, tokens=None))
    assert found["plan"]["tokens_per_batch"] == 4096
    assert found["measured"]["tokens"] == found["whole"]["tokens"]  # all of them were measured


def test_a_device_budget_without_a_gpu_is_answered_by_the_plan(report, tmp_path, capsys):
    assert report["plan_on_gpu"] is None
    found = bench(ask(tmp_path, budget=Budget(device_memory="3GiB")))
    assert 0 < found["plan_on_gpu"]["device_total"] <= 3 << 30 and not found["plan"]["device"]
    print_answer(found)
    assert "with a GPU, whose time cannot be measured here" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ResourceError, match="device memory: .* 1.00 MiB given"):
        bench(ask(tmp_path, budget=Budget(device_memory="1MiB")))


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(ask(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.SHAPES, "0.5b", TINY)  # argparse looks the name up, and nothing else
    flags = ["--layers", "1", "--tokens", "2000", "--calibration-tokens", "4000", "--scratch-dir", str(tmp_path)]
    assert main(["bench", "--shape", "0.5B", *flags, "--device", "cpu", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["measured"]["layers"] == 1 and "Total" in told.err


def test_the_last_layer_measured_is_a_whole_one(tmp_path, monkeypatch):
    """A merge ends its observed streams early in the last layer; here that layer stands for many others."""
    advance, went_on = StreamedModel.advance, []

    def watched(self, layer, weights, stream, observer=None, *args, **kwargs):
        advance(self, layer, weights, stream, observer, *args, **kwargs)
        if observer is not None and layer == 1:
            went_on.append(stream.stash.fetch(0).shape[-1])

    monkeypatch.setattr(StreamedModel, "advance", watched)
    bench(ask(tmp_path))
    assert went_on == [TINY.hidden, TINY.hidden]  # of the instruction and of the reasoning set
