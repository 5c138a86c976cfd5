"""A place where merges meet faults: the compiled shim, a server that forks commands, disks of a few pages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
REPORT = "streammerge_report.json"  # the one file that tells of the run and not of the merge


class Unavailable(Exception):
    """This machine cannot do it: no compiler, or no namespaces."""


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal), what it told on stderr, calls that each rule saw."""

    code: int
    told: str
    counts: list[int] = field(default_factory=list)


def compile_shim(folder: Path) -> Path:
    """shim.c as a library. Unavailable without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise Unavailable("no C compiler for tests/faults/shim.c")
    library = folder / "shim.so"
    done = subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, HERE / "shim.c", "-ldl"],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise Unavailable(f"{compiler} cannot compile shim.c: {done.stderr[:300]}")
    return library


class Workshop:
    """A context manager. `root` sees what the commands see, their mounts included; `mounts`: whether there can be."""

    def __init__(self, folder: Path):
        self.folder, self._runs = folder, 0
        shim = compile_shim(folder)
        space = ["unshare", "-rm", "--propagation", "private"]
        tried = shutil.which("unshare") and subprocess.run([*space, "true"], capture_output=True)
        self.mounts = bool(tried) and tried.returncode == 0
        env = os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                            "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        command = [*(space if self.mounts else ()), sys.executable, str(HERE / "server.py"), str(shim)]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        if json.loads(self._server.stdout.readline() or "null") != "ready":
            raise RuntimeError("the server did not start")
        self._root = Path(f"/proc/{self._server.pid}/root") if self.mounts else Path("/")

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()

    def seen(self, path: Path) -> Path:
        """A path as the commands see it, for reading and writing from here."""
        return self._root / path.relative_to("/")

    def disk(self, path: Path, size: int) -> None:
        """A tmpfs of `size` bytes at a new directory. Unavailable where mounts are refused."""
        if not self.mounts:
            raise Unavailable("no mount namespace here")
        self.seen(path).mkdir()
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)])

    def run(self, argv: list[str]) -> None:
        """A program beside the commands, in their namespace. Unavailable where it fails."""
        code, told = self._ask(do="run", argv=argv)
        if code:
            raise Unavailable(f"{' '.join(argv)}: {told.strip()}")

    def start(self, *argv: object, rules: tuple[str, ...] = (), **env: str) -> int:
        """Begin a command under rules of the shim; returns its pid."""
        self._runs += 1
        files = {name: str(self.folder / f"{self._runs}.{name}") for name in ("stdout", "stderr")}
        pid = self._ask(do="start", argv=[*map(str, argv)], rules=rules, env=env, **files)
        self._files = getattr(self, "_files", {}) | {pid: files}
        return pid

    def wait(self, pid: int) -> Ended | None:
        """How it ended; None once it has stopped (SIGSTOP)."""
        code = self._ask(do="wait", pid=pid)
        if code is None:
            return None
        counts = Path(self._files[pid]["stdout"] + ".counts")
        told = Path(self._files[pid]["stderr"]).read_text()
        return Ended(code, told, json.loads(counts.read_text()) if counts.exists() else [])

    def do(self, *argv: object, rules: tuple[str, ...] = (), **env: str) -> Ended:
        """Run a command to its end."""
        return self.wait(self.start(*argv, rules=rules, **env))

    def _ask(self, **request: object) -> object:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the server died")
        return json.loads(line)


def content(out: Path) -> dict[str, bytes]:
    """Every file of an output but the report."""
    return {f.name: f.read_bytes() for f in sorted(out.iterdir()) if f.is_file() and f.name != REPORT}


def stamps(*folders: Path) -> dict[str, tuple[str, int]]:
    """Every file below: its hash and its time."""
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns)
            for folder in folders for f in sorted(folder.rglob("*")) if f.is_file()}  # fmt: skip
