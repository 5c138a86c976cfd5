"""Faults that a merge can meet while it runs, and what must become of it: for the tests and for the README's table.

Every fault is a real error of a real system call: a disk that is full, a file that is gone, an errno from the kernel's
side of the C library (shim.c). After it: one message, one exit code, and either a merge that the same command goes on
with to the same bytes, or no trace; the inputs are as they were.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from builders import recipe_text

from .workshop import REPORT, Ended, Unavailable, Workshop, content, stamps

SLOW = "write *.safetensors.partial 1+ Z20"  # a slow disk: a tiny plain merge is over before its first save otherwise
SHARD = "150KB"
MERGEKIT = {"merge_method": "ties", "parameters": {"density": 0.5}, "dtype": "float32"}
EIO, ENOSPC, EACCES = "E5", "E28", "E13"


@dataclass(frozen=True)
class Fault:
    """`rules` of the shim, with {out}, {itm}, {base}, {lrm}, {first} and {late} (shards of layers), {fill}, {side}.

    `code`: the exit code; `says`: parts of the message; `left`: "resumable" (the same command ends with the bytes of an
    uninterrupted run), "absent" (OUT is not there) or "done". `disk`: bytes beyond the weights on a tmpfs for OUT, None
    for the ordinary disk; `side`: bytes of a tmpfs for spilled activations, or for the capture cache.
    """

    name: str
    rules: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    left: str
    kinds: tuple[str, ...] = ("rain", "plain")
    disk: int | None = None
    side: int | None = None
    read_only: bool = False
    flags: tuple[str, ...] = ("--quiet",)


_IN = "Its header was fine"
FAULTS = (
    Fault("disk too small", (), 4, ("not enough disk", "Free some space"), "absent", disk=-(100 << 10)),
    Fault("disk fills up in mid-shard, nothing saved yet",
          ("reserve * 1+ E95", "write *.safetensors.partial 1 X{fill}"), 4,
          ("not enough disk", "Free some space"), "absent", disk=3 << 20),
    Fault("disk fills up in mid-shard", ("reserve * 1+ E95", "write *.safetensors.partial 24 X{fill}"), 4,
          ("disk", "the same command"), "resumable", ("rain", "plain", "tensors"), 3 << 20),
    Fault("disk full at a snapshot's activations", ("write */.streammerge/a* 9 X{fill}",), 4,
          ("not enough disk", "the same command"), "resumable", ("rain",), 3 << 20),  # full for the tokenizer, too
    Fault("disk full at the journal", ("write */journal.json.partial 2 X{fill}",), 4,
          ("not enough disk", "the same command"), "resumable", ("plain",), 3 << 20),
    Fault("no room for a snapshot, but for the output", ("write */.streammerge/a* 2 E28",), 0,
          ("goes on without this save",), "done", ("rain",), flags=("--log-format", "json")),
    Fault("no room for the journal, but for the output", ("write */journal.json.partial 1+ E28",), 0,
          ("goes on without this save",), "done", flags=("--log-format", "json")),
    Fault("no room for the journal, then a write error (EIO)",
          ("write */journal.json.partial 1+ E28", f"write *.safetensors.partial 20 {EIO}"), 4,
          ("cannot be written: Input/output error",), "absent", ("rain", "plain", "tensors")),
    Fault("disk full at the tokenizer's copy", ("write */tokenizer.json.partial 1 X{fill}",), 4,
          ("tokenizer.json.partial: not enough disk", "the same command"), "resumable", disk=3 << 20),
    Fault("disk full at the manifest", ("write */streammerge_manifest.json.partial 1 X{fill}",), 4,
          ("streammerge_manifest.json.partial", "the same command"), "resumable", disk=3 << 20),
    Fault("disk full at the report", ("write */streammerge_report.json.partial 1 X{fill}",), 4,
          ("streammerge_report.json.partial", "the same command"), "resumable", disk=3 << 20),
    Fault("scratch disk too small", (), 4, ("the activations that the host has no room for", "--scratch-dir"), "absent",
          ("spilled",), side=4 << 10),
    Fault("scratch disk full at the first activations", ("write {side}/#* 1 X{side}/filler",), 4,
          ("spilled activations cannot be written: No space left", "--scratch-dir"), "absent", ("spilled",),
          side=2 << 20),
    Fault("scratch disk fills up", ("sync */journal.json.partial 2 X{side}/filler",), 4,
          ("spilled activations cannot be written: No space left", "--scratch-dir", "the same command"), "resumable",
          ("spilled",), side=2 << 20),
    Fault("read error (EIO) of the scratch disk", (f"read {{side}}/#* 9+ {EIO}",), 4,
          ("spilled activations cannot be read: Input/output error", "the same command"), "resumable", ("spilled",),
          side=2 << 20),
    Fault("capture cache full", ("write {side}/*.partial 2 X{side}/filler",), 0,
          ("capture_cache:", "No space left on device", "the next run reads the LRM again"), "done", ("int8",),
          side=1 << 20, flags=()),
    Fault("artifacts disk full", (), 0, ("--artifacts: ", "cannot be written", "are not kept for a later one"), "done",
          ("rain",), side=40 << 10, flags=("--log-format", "json", "--artifacts", "{side}")),
    Fault("disk full at the lock", ("write */lock 1 E28",), 4, ("not enough disk",), "absent"),
    Fault("disk full at the lock, late", ("write */lock 9 E28",), 4, ("disk", "the same command"), "resumable"),
    Fault("write error (EIO) in mid-shard", (f"write *.safetensors.partial 16 {EIO}",), 4,
          ("cannot be written: Input/output error", "the same command"), "resumable"),
    Fault("fsync error (EIO) of a shard at the end", (f"sync *.safetensors.partial 14+ {EIO}",), 4,
          ("cannot be written: Input/output error", "the same command"), "resumable"),
    Fault("fsync error (EIO) of a snapshot's activations", (f"sync */.streammerge/activations-* 2 {EIO}",), 0,
          ("goes on without this save",), "done", ("rain",), flags=("--log-format", "json")),
    Fault("fsync error (EIO) of the journal", (f"sync */journal.json.partial 2 {EIO}",), 0,
          ("goes on without this save",), "done", flags=("--log-format", "json")),
    Fault("rename refused (EIO) at the end", (f"rename *.index.json 1 {EIO}",), 4,
          ("Input/output error", "the same command"), "resumable"),
    Fault("short writes", ("write *.partial 1+ H", "read */trio/* 1+ H"), 0, (), "done", ("rain",)),
    Fault("read error (EIO) of an input", (f"read {{late}} 1+ {EIO}",), 3,
          ("cannot be read: Input/output error",), "absent"),
    Fault("read error (EIO) of an input, late", (f"read {{late}} 3+ {EIO}",), 3,
          ("cannot be read: Input/output error", "the same command"), "resumable"),
    Fault("read error (EIO) of the output when it is verified", (f"read {{out}}/model-00002-* 1+ {EIO}",), 3,
          ("cannot be read: Input/output error", "the same command"), "resumable"),
    Fault("an input vanishes before it is read", ("write *.safetensors.partial 8 M{late}",), 3,
          ("cannot be opened: No such file", _IN, "the same command"), "resumable"),
    Fault("an input vanishes after it was read", ("rename *.index.json 1 M{late}",), 3,
          ("No such file", "the same command"), "resumable"),
    Fault("an input vanishes right after its header", ("open {base}/config.json 1 M{first}",), 3,
          ("No such file",), "absent"),
    Fault("an input vanishes before its first byte", ("write */lock 1 M{first}",), 3,
          ("cannot be opened: No such file", _IN), "absent", ("rain",)),
    Fault("an input shrinks", ("write *.safetensors.partial 16 T{late}",), 3,
          ("ends at byte", _IN, "the same command"), "resumable"),
    Fault("an input turns unreadable (EACCES)", (f"open {{late}} 2+ {EACCES}",), 3,
          ("cannot be opened: Permission denied", _IN, "the same command"), "resumable"),
    Fault("the tokenizer vanishes", ("write *.safetensors.partial 8 M{lrm}/tokenizer.json",), 3,
          ("tokenizer.json", "the same command"), "resumable"),
    Fault("read-only output", (), 4, ("Read-only file system",), "absent", disk=3 << 20, read_only=True),
    Fault("wall clock jumps by ten years at every look", ("clock * 1+ J",), 0, ('"ts"',), "done",
          flags=("--log-format", "json")),
)  # fmt: skip


def recipes(trio: dict[str, Path], sets: dict[str, Path]) -> dict[str, str]:
    """A recipe for every kind of merge."""
    return {"rain": recipe_text(trio, sets), "spilled": recipe_text(trio, sets),
            "int8": recipe_text(trio, sets, capture_weights="int8"),
            "plain": recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": 0.3}),
            "tensors": yaml.safe_dump(MERGEKIT | {"base_model": str(trio["base"]), "models": [
                {"model": str(trio[role]), "parameters": {"weight": 0.5}} for role in ("lrm", "itm")]})}  # fmt: skip


class Bench:
    """A trio, its recipes and the uninterrupted outputs that all others are compared with."""

    def __init__(self, shop: Workshop, root: Path, trio: dict[str, Path], recipes: dict[str, str]):
        self.shop, self.root, self.trio = shop, root, trio
        self.recipes = {kind: root / f"{kind}.yml" for kind in recipes}
        self._wholes: dict[str, dict[str, bytes]] = {}
        self._least = ""
        for kind, text in recipes.items():
            self.recipes[kind].write_text(text)

    def argv(self, kind: str, out: Path, *more: object) -> list[object]:
        """A merge that saves whenever it can."""
        flags = ["--threads", 1, "--shard-size", SHARD, "--save-every", 0]
        return ["merge", self.recipes[kind], out, *flags, *more]

    def beside(self, kind: str, side: Path) -> tuple[list[object], dict[str, str]]:
        """Flags and environment that put spilled activations, or the capture cache, into `side`."""
        if kind == "spilled":
            return ["--scratch-dir", side, "--host-memory", self.least()], {}
        return [], {"XDG_CACHE_HOME": str(side)} if kind == "int8" else {}

    def least(self) -> str:
        """The smallest host memory that a merge says it can do with: there all activations are spilled."""
        if not self._least:
            told = self.shop.do("plan", self.recipes["spilled"], "--threads", 1, "--host-memory", "1MiB").told
            needed = float(re.search(r"host memory: ([\d.]+) MiB needed", told)[1])
            self._least = f"{needed + 0.01:.2f}MiB"  # it is told in hundredths
        return self._least

    def whole(self, kind: str) -> dict[str, bytes]:
        """The files of an uninterrupted run."""
        if kind == "int8" and not importlib.util.find_spec("bitsandbytes"):
            raise Unavailable("no bitsandbytes")
        if kind not in self._wholes:
            out, side = self.root / f"whole-{kind}", self.root / f"side-{kind}"
            side.mkdir()
            flags, env = self.beside(kind, side)
            ended = self.shop.do(*self.argv(kind, out, "--quiet", *flags), **env)
            assert ended.code == 0, ended
            spill = json.loads((out / REPORT).read_text())["plan"].get("spill", False)
            assert spill == (kind == "spilled"), "at this --host-memory they should be spilled"
            self._wholes[kind] = content(out)
        return self._wholes[kind]

    def shard(self, role: str, tensor: str) -> Path:
        """The file that holds a tensor."""
        index = json.loads((self.trio[role] / "model.safetensors.index.json").read_text())
        return self.trio[role] / index["weight_map"][tensor]

    def pristine(self) -> Callable[[], None]:
        """Call it to have the inputs as they are now, times included."""
        away = self.root / "pristine"
        if not away.exists():
            shutil.copytree(self.trio["lrm"].parent, away)

        def back() -> None:
            for file in self.trio["lrm"].parent.rglob("*.away"):
                os.rename(file, file.with_suffix(""))
            for kept in (f for f in away.rglob("*") if f.is_file()):
                file = self.trio["lrm"].parent / kept.relative_to(away)
                if file.stat().st_size != kept.stat().st_size:
                    shutil.copy2(kept, file)

        return back

    def place(self, fault: Fault, kind: str) -> Path:
        """OUT's directory to be: on a tmpfs of its own, where the fault wants one."""
        folder = self.root / f"{kind}-{abs(hash(fault.name))}"
        if fault.side is not None:
            self.shop.disk(folder.with_suffix(".side"), fault.side)
            self.shop.seen(folder.with_suffix(".side") / "scratch").mkdir()
        if fault.disk is None:
            folder.mkdir()
            return folder
        weights = sum(len(raw) for name, raw in self.whole(kind).items() if name.endswith(".safetensors"))
        self.shop.disk(folder, weights + fault.disk)
        if fault.read_only:
            self.shop.run(["mount", "-o", "remount,ro", str(folder)])
        return folder


@dataclass(frozen=True)
class Met:
    """What a fault did, and what the same command made of it afterwards."""

    fault: Fault
    kind: str
    ended: Ended
    left: str
    problems: tuple[str, ...]


def meet(bench: Bench, fault: Fault, kind: str) -> Met:
    """Run a merge into a fault, mend what was broken, and go on. Unavailable where this machine cannot do it."""
    back, before = bench.pristine(), stamps(bench.trio["lrm"].parent)
    bench.whole(kind)
    folder = bench.place(fault, kind)
    out, filler, side = folder / "out", folder / "filler", folder.with_suffix(".side") / "scratch"
    more, env = bench.beside(kind, side)
    paths = {role: str(path) for role, path in bench.trio.items()}
    paths |= {"out": str(out), "fill": str(filler), "side": str(side)}
    paths["first"] = str(bench.shard("lrm", "model.layers.0.input_layernorm.weight"))
    paths["late"] = str(bench.shard("itm", "model.layers.2.mlp.down_proj.weight"))
    rules = tuple(rule.format(**paths) for rule in fault.rules) + ((SLOW,) if kind in ("plain", "tensors") else ())
    flags = [flag.format(**paths) for flag in fault.flags]
    ended = bench.shop.do(*bench.argv(kind, out, *flags, *more), rules=rules, **env)
    seen = bench.shop.seen(out)
    left = state(seen)
    said = " ".join(ended.told.split())  # a table for a terminal breaks lines
    problems = [f"says not {part!r}" for part in fault.says if part not in said]
    problems += [f"exit code {ended.code}, not {fault.code}"] if ended.code != fault.code else []
    problems += ["a traceback"] if "Traceback" in ended.told else []
    problems += [f"left {left}, not {fault.left}"] if left != fault.left else []
    if not fault.read_only:
        bench.shop.seen(filler).unlink(missing_ok=True)
    bench.shop.seen(side / "filler").unlink(missing_ok=True)
    back()
    if stamps(bench.trio["lrm"].parent) != before:
        problems.append("the inputs are not as they were")
    if not fault.read_only and left != "done" and (fault.disk is None or fault.disk > 0):
        if fault.side is not None and not fault.rules:
            more, env = bench.beside(kind, bench.root)  # on a larger disk
        again = bench.shop.do(*bench.argv(kind, out, "--quiet", *more), **env)
        if again.code:
            problems.append(f"going on ended with {again.code}: {again.told}")
        elif content(seen) != bench.whole(kind):
            problems.append("the bytes are not those of an uninterrupted run")
        elif (seen / ".streammerge").exists():
            problems.append(f".streammerge is left: {list((seen / '.streammerge').rglob('*'))}")
    if left == "done" and content(seen) != bench.whole(kind):
        problems.append("the bytes are not those of an uninterrupted run")
    return Met(fault, kind, ended, left, tuple(problems))


def state(out: Path) -> str:
    """absent, done, resumable, or what lies there."""
    if not out.exists():
        return "absent"
    found = sorted(str(f.relative_to(out)) for f in out.rglob("*"))
    if ".streammerge/journal.json" in found:
        return "resumable"
    return "done" if "streammerge_report.json" in found and ".streammerge" not in found else f"odd: {found}"
