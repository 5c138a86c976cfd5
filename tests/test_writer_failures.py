"""The writer when things go wrong: a directory in use, a killed process, a full disk. Nothing is left half done."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streammerge.errors import InputError, ResourceError
from streammerge.io.writer import CheckpointWriter, OutTensor

INDEX = "model.safetensors.index.json"
PLAN = [OutTensor("a", "F32", (20,)), OutTensor("b", "F32", (20,))]


def write_all(out: Path) -> None:
    with CheckpointWriter(out, PLAN, 1 << 20) as writer:
        for tensor in PLAN:
            writer.write(tensor.name, torch.full((20,), 7.0))
        writer.finish()


def run(code: str, *args: object, prefix=(), check: bool = True) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_output_directory_in_use(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for i in range(7):
        (out / f"f{i}").write_text("mine")
    with pytest.raises(InputError, match="out is not empty: found f0, f1, f2, f3, f4 and 2 more; choose"):
        CheckpointWriter(out, PLAN, 64)
    assert len(list(out.iterdir())) == 7
    with pytest.raises(InputError, match="f0: is a file, wanted a new directory"):
        CheckpointWriter(out / "f0", PLAN, 64)
    write_all(tmp_path / "done")
    before = (tmp_path / "done" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="not empty: found model.safetensors;"):
        write_all(tmp_path / "done")
    assert (tmp_path / "done" / "model.safetensors").read_bytes() == before


VICTIM = """
    import sys, time, torch
    from pathlib import Path
    from streammerge.io.writer import CheckpointWriter, OutTensor
    tensors = [OutTensor(n, "F32", (1000,)) for n in "abc"]
    with CheckpointWriter(Path(sys.argv[1]), tensors, 4000) as writer:
        for name in "abc"[:int(sys.argv[2])]:
            writer.write(name, torch.full((1000,), float(ord(name))))
        writer.add_file("config.json", b"{}")
        print("ready", flush=True)
        if sys.argv[3:] == ["die"]:
            import os, signal
            rename = os.rename
            os.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if "00002" in str(b) else rename(a, b)
        if sys.argv[2] == "3":
            writer.finish()
        else:
            time.sleep(60)
"""


@contextlib.contextmanager
def living_writer(out: Path):
    command = [sys.executable, "-c", textwrap.dedent(VICTIM), str(out), "2"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_two_writers_and_a_kill(tmp_path):
    """A second writer is refused while the first lives; after a SIGKILL the same command gives the same bytes."""
    out = tmp_path / "out"
    with living_writer(out) as child:
        before = sorted(out.rglob("*"))
        with pytest.raises(InputError, match=rf"another merge \(pid {child.pid}\) is writing to {out}"):
            CheckpointWriter(out, PLAN, 64)
        assert sorted(out.rglob("*")) == before
    left = os.listdir(out)
    assert ".streammerge" in left and all(f == ".streammerge" or f.endswith(".partial") for f in left)
    run(VICTIM, out, 3)
    run(VICTIM, tmp_path / "other", 3)
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "other"))
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_a_kill_between_two_renames(tmp_path):
    out = tmp_path / "out"
    assert run(VICTIM, out, 3, "die", check=False).returncode == -signal.SIGKILL
    assert "model-00001-of-00003.safetensors" in os.listdir(out) and INDEX not in os.listdir(out)
    (out / "notes.txt").write_text("not ours")
    with pytest.raises(InputError, match="not empty: found notes.txt;"):
        CheckpointWriter(out, PLAN, 64)
    (out / "notes.txt").unlink()
    run(VICTIM, out, 3)
    assert sorted(os.listdir(out))[-1] == INDEX and len(os.listdir(out)) == 5


def test_preflight_and_write_errors(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 50, 50))
        with pytest.raises(ResourceError, match=r"not enough disk: the weights need .*, 50 B \(50 bytes\) were free"):
            CheckpointWriter(tmp_path / "out", PLAN, 64)
    assert not (tmp_path / "out").exists()
    for number, wanted in ((errno.ENOSPC, "not enough disk"), (errno.EIO, "cannot be written: Input/output error")):
        with pytest.raises(ResourceError, match=f"model.safetensors.partial: {wanted}"):
            with CheckpointWriter(tmp_path / "out", PLAN, 1 << 20) as writer, monkeypatch.context() as patch:

                def failing(*_, number=number):
                    raise OSError(number, os.strerror(number))

                patch.setattr(os, "pwrite", failing)
                writer.write("a", torch.ones(20))
        assert not (tmp_path / "out").exists()


def test_no_fallocate(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_all(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["b"].tolist() == [7.0] * 20


def test_a_disk_that_is_really_full(tmp_path):
    """On a 1 MiB tmpfs of its own: too large a plan fails before any work, a side file too many fails cleanly."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs in a namespace of our own")
    code = """
        import os, shutil, sys
        from pathlib import Path
        from streammerge.errors import ResourceError
        from streammerge.io.writer import CheckpointWriter, OutTensor
        disk = Path(sys.argv[1])
        def attempt(elements, side=0, preflight=True):
            shutil.disk_usage = usage if preflight else lambda p: shutil._ntuple_diskusage(0, 0, 10 ** 9)
            try:
                with CheckpointWriter(disk / "out", [OutTensor("a", "F32", (elements,))], 1 << 30) as writer:
                    writer.add_file("side", bytes(side))
            except ResourceError as error:
                print(error)
            assert os.listdir(disk) == [], os.listdir(disk)
        usage = shutil.disk_usage
        attempt(10 ** 6); attempt(10 ** 6, preflight=False); attempt(200_000, side=400_000); attempt(1000)
    """
    shell = f"mount -t tmpfs -o size=1m none {tmp_path} && exec \"$@\""
    done = run(code, tmp_path, prefix=["unshare", "-rm", "sh", "-c", shell, "sh"])
    preflight, real, side = done.stdout.splitlines()
    assert "out: not enough disk: the weights need 3.81 MiB" in preflight and "1020.00 KiB" in preflight
    assert "model.safetensors.partial: not enough disk" in real and "side.partial: not enough disk" in side
