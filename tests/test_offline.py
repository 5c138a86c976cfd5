"""Offline: merge, plan and verify from local paths and the Hub cache, without a network and without trying one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import recipe_text

PROGRAM = Path(sys.executable).with_name("streammerge")
GUARD = """
import os, socket, sys
def guard(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        address = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        if not isinstance(address, (str, bytes)) or event.startswith("socket.get"):  # a path is a local socket
            with open(os.environ["GUARD_LOG"], "a") as log:
                log.write(f"{event} {address}\\n")
            raise OSError("the test's guard: no network")
sys.addaudithook(guard)
open(os.environ["GUARD_LOG"], "a").close()
"""


def cached(cache: Path, repo: str, model: Path) -> None:
    """A model in the Hub cache's layout: snapshots of links into blobs, and a ref."""
    root, commit = cache / ("models--" + repo.replace("/", "--")), "a" * 40
    for part in (root / "snapshots" / commit, root / "blobs", root / "refs"):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for n, file in enumerate(sorted(f for f in model.iterdir() if f.is_file())):
        shutil.copy(file, root / "blobs" / f"{n:064x}")
        (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{n:064x}")


@pytest.fixture(scope="module")
def place(tmp_path_factory, trio, sets):
    """A folder with recipes by local path and by Hub id, a cache that has the ids, and a guard against sockets."""
    root = tmp_path_factory.mktemp("offline")
    for role, path in trio.items():
        cached(root / "cache", f"some/{role}", path)
    (root / "local.yml").write_text(recipe_text(trio, sets))
    ids = {"base_model": "some/base", "instruct_model": "some/itm@main", "reasoning_model": "some/lrm"}
    (root / "hub.yml").write_text(yaml.safe_dump(yaml.safe_load(recipe_text(trio, sets)) | ids))
    (root / "plain.yml").write_text(yaml.safe_dump(
        yaml.safe_load(recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": 0.3})) | ids))  # fmt: skip
    (root / "guard").mkdir()
    (root / "guard" / "sitecustomize.py").write_text(GUARD)
    return root


def environment(place: Path, log: Path, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_HUB_CACHE": str(place / "cache"), "HF_HOME": str(place / "home"), "GUARD_LOG": str(log)}
    return env | {"PYTHONPATH": str(place / "guard"), "OMP_NUM_THREADS": "1", **more}


def run(place: Path, log: Path, *argv: object, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    command = [*prefix, str(PROGRAM), *map(str, argv), "--quiet"]
    return subprocess.run(command, env=environment(place, log, **env), capture_output=True, text=True, timeout=120)


CASES = [("local", "1"), ("hub", None), ("plain", None)]


@pytest.mark.parametrize(("recipe", "offline"), CASES)
def test_nothing_is_asked_of_a_network(place, tmp_path, recipe, offline):
    """The merge with and without HF_HUB_OFFLINE: no name is looked up, nothing is connected to."""
    log = tmp_path / "log"
    more = {"HF_HUB_OFFLINE": offline} if offline else {}
    done = run(place, log, "merge", place / f"{recipe}.yml", tmp_path / "out", **more)
    assert done.returncode == 0, done.stderr
    assert log.exists(), "the guard was not in force"
    assert log.read_text() == ""


def test_a_model_that_is_nowhere_is_not_looked_for(place, tmp_path):
    recipe, log = tmp_path / "recipe.yml", tmp_path / "log"
    recipe.write_text(yaml.safe_dump(yaml.safe_load((place / "plain.yml").read_text()) | {"base_model": "some/absent"}))
    done = run(place, log, "merge", recipe, tmp_path / "out")
    assert done.returncode == 3 and "hf download some/absent" in done.stderr and log.read_text() == "", done.stderr


def test_the_guard_hears_of_a_connection(place, tmp_path):
    log = tmp_path / "log"
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    subprocess.run([sys.executable, "-c", code], env=environment(place, log), capture_output=True)
    assert "socket.getaddrinfo" in log.read_text()


def isolated() -> tuple[str, ...]:
    """How to run something in a network namespace without interfaces; skips where that is refused."""
    prefix = ("unshare", "-rn")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    return prefix


def test_without_an_interface(place, tmp_path):
    """plan, merge and verify by Hub ids, where not even the loopback is up; strace sees no socket but local ones."""
    prefix, calls = isolated(), tmp_path / "calls"
    strace = ("strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=socket,connect,sendto", "-o", str(calls))
    traced = shutil.which("strace") and not subprocess.run([*strace, "true"], capture_output=True).returncode
    prefix += strace if traced else ()
    recipe, out, log = place / "hub.yml", tmp_path / "out", tmp_path / "log"
    for argv in (["plan", recipe, out, "--json"], ["merge", recipe, out, "--json"], ["verify", out, "--json"]):
        done = run(place, log, *argv, prefix=prefix)
        assert done.returncode == 0 and json.loads(done.stdout), done.stderr
        if traced:
            remote = [c for c in calls.read_text().splitlines() if re.search(r"AF_INET6?\b", c)]
            assert not remote, remote[:5]
    assert log.read_text() == ""
