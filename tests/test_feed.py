"""The feed and the drain: order, bounds, errors on the other thread."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from streammerge.errors import InputError
from streammerge.io.checkpoint import open_checkpoint
from streammerge.io.drain import Drain
from streammerge.io.feed import Feed, Lane

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    """Eight tensors of 4 KiB, one of none."""
    tensors = {f"t{n}": torch.full((1024,), float(n)) for n in range(8)} | {"empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return open_checkpoint(tmp_path, "reasoning_model")


def wait_for(condition) -> bool:
    """True as soon as it holds, within two seconds."""
    until = time.monotonic() + 2
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("ahead", [1, 4096, 10_000, 1 << 20])
def test_tensors_arrive_in_order_whatever_the_bound(checkpoint, ahead):
    names = [*(f"t{n}" for n in (3, 1, 7, 0, 3)), "empty"]
    with Feed([(checkpoint, n) for n in names], CPU, ahead) as feed:
        for name in names:
            assert torch.equal(feed.take(checkpoint, name), checkpoint.read(name))
    assert feed.nbytes == 5 * 4096 and feed.waited >= 0


def test_the_thread_stays_within_its_bound(checkpoint, monkeypatch):
    read = []
    plain = type(checkpoint).read
    monkeypatch.setattr(type(checkpoint), "read", lambda self, name: read.append(name) or plain(self, name))
    with Feed([(checkpoint, f"t{n}") for n in range(8)], CPU, 3 * 4096) as feed:
        assert wait_for(lambda: len(read) == 3)
        time.sleep(0.1)
        assert len(read) == 3  # three are waiting: no fourth is begun
        feed.take(checkpoint, "t0")
        assert wait_for(lambda: len(read) == 4)
    assert len(read) == 4  # left early: the thread has gone


def test_another_tensor_than_the_next_is_a_bug_and_says_so(checkpoint):
    with Feed([(checkpoint, "t0")], CPU, 1 << 20) as feed, pytest.raises(RuntimeError, match=r"'t1'.*'t0'"):
        feed.take(checkpoint, "t1")


def test_asking_past_the_end_does_not_hang(checkpoint):
    with Feed([(checkpoint, "t0")], CPU, 1 << 20) as feed:
        feed.take(checkpoint, "t0")
        with pytest.raises(RuntimeError, match="asks for more"):
            feed.take(checkpoint, "t1")


def test_a_reading_error_is_the_consumers_after_what_was_read_before(checkpoint):
    file = checkpoint.tensors["t7"].file
    with open(file, "r+b") as f:
        f.truncate(checkpoint.tensors["t7"].start + 8)
    with Feed([(checkpoint, "t0"), (checkpoint, "t7")], CPU, 1 << 20) as feed:
        assert float(feed.take(checkpoint, "t0")[0]) == 0
        with pytest.raises(InputError, match="t7.*ends at byte"):
            feed.take(checkpoint, "t7")


def test_drain_works_in_order_and_waits_at_the_end():
    done = []
    with Drain(10) as drain:
        for n in range(20):
            drain.hand(lambda n=n: (time.sleep(0.001), done.append(n)), 4)
    assert done == list(range(20))


def test_drain_holds_no_more_than_its_bound():
    gate, begun = threading.Event(), []
    with Drain(10) as drain:
        for _ in range(2):
            drain.hand(lambda: (begun.append(1), gate.wait()), 5)
        third = threading.Thread(target=lambda: drain.hand(lambda: begun.append(3), 5))
        third.start()
        time.sleep(0.1)
        assert third.is_alive() and begun == [1]  # one at work, one waiting, no room for the third
        gate.set()
        third.join(2)
    assert begun == [1, 1, 3]


def test_an_error_in_the_drain_reaches_its_owner():
    def broken():
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"), Drain(10) as drain:
        drain.hand(broken, 1)
    with pytest.raises(OSError, match="on fire"), Drain(10) as drain:
        for _ in range(100):
            drain.hand(broken, 10)
            time.sleep(0.001)
        pytest.fail("work was taken after the thread had died")


def test_left_by_an_error_the_drain_drops_what_has_not_begun():
    gate, done = threading.Event(), []
    with pytest.raises(ValueError), Drain(100) as drain:
        drain.hand(lambda: (gate.wait(2), done.append(0)), 1)
        drain.hand(lambda: done.append(1), 1)
        threading.Timer(0.1, gate.set).start()
        raise ValueError
    assert done in ([0], [])


def test_a_closed_lane_frees_a_waiting_producer():
    lane, freed = Lane(1), []
    lane.reserve(1)

    def producer():
        try:
            lane.reserve(1)
        except Exception as error:
            freed.append(type(error).__name__)

    thread = threading.Thread(target=producer)
    thread.start()
    lane.close()
    thread.join(2)
    assert freed == ["Closed"]
