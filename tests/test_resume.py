"""Interrupted at any moment, gone on with by the same command: the bytes of an uninterrupted merge."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import recipe_text

from streammerge import journal, merge, parse_recipe, plain, threads
from streammerge.errors import InputError
from streammerge.journal import FILE, Journal
from streammerge.progress import Progress

KINDS = {
    "model scope": {},
    "layer scope": {"coefficients": {"scope": "layer"}},
    "plain": {"merge_method": "task_arithmetic", "lambda": 0.3},
}
TIMES = "streammerge_report.json"  # the one file that tells of the run and not of the merge


def recipe_file(folder: Path, trio, sets, **extra) -> Path:
    path = folder / "recipe.yml"
    path.write_text(recipe_text(trio, sets, **extra))
    return path


def content(out: Path) -> dict[str, bytes]:
    """Every file of an output but the report."""
    return {f.name: f.read_bytes() for f in sorted(out.iterdir()) if f.name != TIMES}


def command(recipe: Path, out: Path, *extra: str) -> list[str]:
    program = Path(sys.executable).with_name("streammerge")
    return [str(program), "merge", str(recipe), str(out), "--quiet", "--threads", "1", *extra]


class Stop(Exception):
    """Raised in a merge's face."""


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_at_every_save_it_ends_with_the_same_bytes(trio, sets, tmp_path, monkeypatch, kind):
    """A save after every layer; the run dies right after each of them, and the next goes on from there."""
    recipe = parse_recipe(recipe_text(trio, None if kind == "plain" else sets, **KINDS[kind]), "test.yml")
    merge(recipe, tmp_path / "whole")
    save, stops = Journal.save, []

    def dying(self, state, began):
        save(self, state, began)
        if len(stops) < 6:
            stops.append(state["label"])
            raise Stop

    monkeypatch.setattr(Journal, "save", dying)
    monkeypatch.setattr(threads, "_POLL", 0.01)  # a tiny plain merge is over before the first look at the clock
    chunk = plain._Worker.do
    monkeypatch.setattr(plain._Worker, "do", lambda self, job: time.sleep(0.01) or chunk(self, job))
    out = tmp_path / "out"
    for _ in range(8):
        try:
            report = merge(recipe, out, save_every=0.0)
            break
        except Stop:
            assert (out / ".streammerge" / FILE).exists()
            assert not list(out.glob("*.safetensors")), "nothing has its final name yet"
    assert len(stops) >= 3 and report["resumed_at"] == stops[-1], stops
    assert len(stops) == len(set(stops)), "a layer was done twice, or nothing new was saved"
    assert content(out) == content(tmp_path / "whole") and not (out / ".streammerge").exists()


def interrupted(recipe: Path, out: Path, *flags: str, after: float, how: int = signal.SIGKILL) -> int:
    """Run the command, send it a signal `after` so many seconds; returns its exit code."""
    child = subprocess.Popen(command(recipe, out, "--save-every", "0", *flags), stderr=subprocess.DEVNULL)
    try:
        return child.wait(after)
    except subprocess.TimeoutExpired:
        child.send_signal(how)
        return child.wait(60)


def test_a_dozen_kills_at_random_moments(trio, sets, tmp_path):
    """kill -9, spread over the whole run by a seed; each resumed output is the uninterrupted one, byte for byte."""
    recipe = recipe_file(tmp_path, trio, sets)
    began = time.monotonic()
    assert subprocess.run(command(recipe, tmp_path / "whole")).returncode == 0
    whole = time.monotonic() - began
    dice, out, kills = random.Random(12), tmp_path / "out", 0
    while kills < 12:
        code = interrupted(recipe, out, after=dice.uniform(0.4, 1.1) * whole)
        if code == 0:
            assert content(out) == content(tmp_path / "whole")
            subprocess.run(["rm", "-r", str(out)], check=True)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        done = [f.name for f in out.glob("*.safetensors")] if out.exists() else []
        if done and not (out / ".streammerge" / "lock").exists():  # the claim goes last: this one had finished
            assert content(out) == content(tmp_path / "whole")
            subprocess.run(["rm", "-r", str(out)], check=True)
    assert subprocess.run(command(recipe, out)).returncode == 0
    assert content(out) == content(tmp_path / "whole")


def saved_halfway(trio, sets, folder: Path, monkeypatch, **extra) -> tuple[Path, Path]:
    """An unfinished merge that saved after its second layer; (recipe file, OUT)."""
    recipe, out, saves = recipe_file(folder, trio, sets, **extra), folder / "out", []
    save = Journal.save

    def dying(self, state, began):
        save(self, state, began)
        saves.append(state)
        if len(saves) == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Journal, "save", dying)
        merge(parse_recipe(recipe.read_text(), str(recipe)), out, save_every=0.0)
    return recipe, out


def test_another_recipe_is_refused_with_the_differences_or_restarted(trio, sets, tmp_path, monkeypatch):
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch)
    before = sorted((f.relative_to(out), f.stat().st_mtime_ns) for f in out.rglob("*"))
    other = parse_recipe(recipe_text(trio, sets, **{"lambda": 0.5}), "test.yml")
    with pytest.raises(InputError, match=r"(?s)recipe: lambda: was 1.0, is 0.5.*--restart"):
        merge(other, out)
    assert sorted((f.relative_to(out), f.stat().st_mtime_ns) for f in out.rglob("*")) == before
    merge(other, out, restart=True)
    merge(other, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_changed_input_is_noticed(sets, tmp_path, monkeypatch):
    from builders import save_trio

    trio = save_trio(tmp_path / "trio", "llama")
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch)
    shard = sorted(trio["itm"].glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(InputError, match=rf"instruct_model: {shard.name}: was"):
        merge(parse_recipe(recipe.read_text(), str(recipe)), out)


def test_a_changed_calibration_file_is_noticed(trio, tmp_path, monkeypatch):
    from builders import write_sets

    (tmp_path / "sets").mkdir()
    sets = write_sets(tmp_path / "sets")
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch)
    sets["instruction"].write_text(sets["instruction"].read_text() + "\n")
    with pytest.raises(InputError, match=r"calibration.instruction: .*: was"):
        merge(parse_recipe(recipe.read_text(), str(recipe)), out)


@pytest.mark.parametrize("damage", ["journal", "a byte of the journal", "partial gone", "partial shorter", "header"])
def test_damaged_remains_are_told_or_begun_anew(trio, sets, tmp_path, monkeypatch, damage):
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch, coefficients={"scope": "layer"})
    partial = sorted(out.glob("*.safetensors.partial"))[0]
    if damage == "journal":  # nothing of it can be believed: from the start
        (out / ".streammerge" / FILE).write_text("{")
    elif damage == "a byte of the journal":
        text = (out / ".streammerge" / FILE).read_text()
        (out / ".streammerge" / FILE).write_text(text.replace('"layer": 2', '"layer": 1'))
        assert text != (out / ".streammerge" / FILE).read_text()
    elif damage == "partial gone":
        partial.unlink()
    elif damage == "partial shorter":
        os.truncate(partial, partial.stat().st_size - 1)
    else:
        with open(partial, "r+b") as f:
            f.write(b"\xff")
    parsed = parse_recipe(recipe.read_text(), str(recipe))
    if "journal" not in damage:
        with pytest.raises(InputError, match=rf"{partial.name}: is not what.*--restart"):
            merge(parsed, out)
    merge(parsed, out, restart="journal" not in damage)
    merge(parsed, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_sigterm_says_how_to_go_on(trio, sets, tmp_path):
    recipe = recipe_file(tmp_path, trio, sets)
    out = tmp_path / "out"
    child = subprocess.Popen(command(recipe, out, "--save-every", "0"), stderr=subprocess.PIPE, text=True)
    while not (out / ".streammerge" / FILE).exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGTERM)
    told = child.communicate(timeout=60)[1]
    assert child.returncode == 75 and "the same command" in told and "Traceback" not in told, told
    _, state = journal.read(out / ".streammerge")
    assert state["label"].startswith(("survey", "merge"))
    assert subprocess.run(command(recipe, out)).returncode == 0


def test_a_flipped_bit_in_the_activations_is_noticed(trio, sets, tmp_path, monkeypatch):
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch, coefficients={"scope": "layer"})
    file = out / ".streammerge" / journal.read(out / ".streammerge")[1]["activations"]
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{file.name}: is not what.*hash.*--restart"):
        merge(parse_recipe(recipe.read_text(), str(recipe)), out)


@pytest.mark.parametrize("fails", ["activations", "journal"])
def test_a_save_without_room_does_not_end_the_merge(trio, sets, tmp_path, monkeypatch, capsys, fails):
    """Told once, on stderr and in the report; the output has its own room. What a failed save wrote is removed."""
    import builtins
    import errno

    recipe, plain_open, failed = parse_recipe(recipe_text(trio, sets), "test.yml"), open, []

    def full(file, *args, **kwargs):
        name = Path(file).name if isinstance(file, (str, Path)) else ""
        if name.startswith(fails) and "w" in "".join(args[:1]):
            failed.append(name)
            plain_open(file, *args, **kwargs).close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return plain_open(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        report = merge(recipe, tmp_path / "out", save_every=0.0, progress=Progress("auto"))
    merge(recipe, tmp_path / "whole")
    assert len(failed) > 2 and content(tmp_path / "out") == content(tmp_path / "whole")
    told = [w for w in report["warnings"] if "No space left" in w]
    assert len(told) == 1 and "goes on without" in told[0] and capsys.readouterr().err.count("No space left") == 1
    assert not (tmp_path / "out/.streammerge").exists()


@pytest.mark.parametrize("kind", ["model scope", "plain"])
def test_killed_while_it_tidies_up_nothing_is_done_again(trio, sets, tmp_path, monkeypatch, kind):
    """Between clearing the state and dropping the lock: the merge is whole, and the same command says so."""
    from streammerge.io.claim import Claim
    from streammerge.planning.run import plan_merge

    text, out = recipe_text(trio, None if kind == "plain" else sets, **KINDS[kind]), tmp_path / "out"
    recipe = parse_recipe(text, "test.yml")
    clear = Claim._clear_state

    def dying(self):
        clear(self)
        if (self.out / TIMES).exists():
            os.close(self._fd)  # as a kill does
            self._fd = -1
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Claim, "_clear_state", dying)
        merge(recipe, out)
    assert (out / ".streammerge/lock").exists() and (out / TIMES).exists()
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(out.iterdir()) if f.is_file()}
    with pytest.raises(InputError, match="holds a finished merge.*streammerge verify"):
        plan_merge(recipe, out)
    with pytest.raises(InputError, match="holds a finished merge.*streammerge verify"):
        merge(recipe, out, restart=True)
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(out.iterdir()) if f.is_file()} == before
    assert not (out / ".streammerge").exists()
    with pytest.raises(InputError, match="is not empty"):
        merge(recipe, out)


def test_a_refusal_does_not_promise_that_the_same_command_goes_on(trio, sets, tmp_path, monkeypatch, capsys):
    from streammerge.cli import main

    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch)
    assert main(["merge", str(recipe), str(out), "--lambda", "0.5", "--quiet"]) == 3
    told = capsys.readouterr().err
    assert "differs from this one" in told and "the same command" not in told


@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_byte_of_the_same_size_and_time_is_noticed_with_hash_inputs(sets, tmp_path, monkeypatch, whole):
    from builders import save_trio

    trio = save_trio(tmp_path / "trio", "llama")
    recipe, out = saved_halfway(trio, sets, tmp_path, monkeypatch, hash_inputs=whole)
    shard = sorted(trio["itm"].glob("*.safetensors"))[-1]  # same_size_and_time
    raw, times = bytearray(shard.read_bytes()), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    raw[-1] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=times)
    parsed = parse_recipe(recipe.read_text(), str(recipe))
    if whole:
        with pytest.raises(InputError, match=rf"instruct_model: {shard.name}: SHA256: was"):
            merge(parsed, out)
    else:
        merge(parsed, out)
