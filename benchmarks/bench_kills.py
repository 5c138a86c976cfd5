"""kill -9 at random moments of a merge: is every resumed output the uninterrupted one, and what does a resume cost?

    python benchmarks/bench_kills.py [--seed 1] [--kills 100] [--out FILE]

Merges of a tiny trio (RAIN with scope model and layer, and without calibration), saving whenever they can, in
processes forked from one that has imported everything (tests/faults): each second of them is work. Moments by a seeded
die: half of the kills strike with half of a write to OUT done, a quarter at any other call that changes OUT (fsync,
rename, reserve), a quarter by the clock, counted from the appearance of the lock. Every third killed merge is killed
again while it resumes. Appends one row a kind to results/cpu-kills.jsonl: extra seconds by kill, the kills in `facts`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rows import RESULTS, ROOT, append, row

from streammerge import journal

sys.path.insert(0, str(ROOT / "tests"))
from builders import recipe_text, save_trio, write_sets  # noqa: E402
from faults.matrix import SLOW, Bench  # noqa: E402
from faults.workshop import Workshop, content  # noqa: E402

SHARES = {"model": 0.34, "layer": 0.33, "plain": 0.33}


def layers_done(told: str) -> int:
    """Layer passes that a run's log speaks of."""
    events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    return sum("layer" in event for event in events)


def left_by(out: Path) -> str:
    """How far the journal says that a killed merge had come."""
    found = journal.read(out / ".streammerge")
    if found:
        named = any(not f.name.endswith(".partial") for f in out.glob("model*"))
        return found[1]["label"] + (", some files named" if named else "")
    locked = (out / ".streammerge" / "lock").exists()  # the lock is the last to go
    return "nothing saved" if locked or not list(out.glob("*.safetensors*")) else "finished"


class Killer:
    """Kills merges of one kind."""

    def __init__(self, bench: Bench, kind: str, dice: random.Random):
        self.bench, self.kind, self.dice, self.wrong = bench, kind, dice, 0
        self.slow = (SLOW,) if kind == "plain" else ()
        seconds, counts = [], []
        for n in range(5):
            out = bench.root / f"{kind}-{n}"
            began = time.monotonic()
            ended = bench.shop.do(*self.argv(out), rules=(f"write {out}/* 0 K", f"change {out}/* 0 K", *self.slow))
            seconds.append(time.monotonic() - began)
            assert ended.code == 0 and content(out) == bench.whole(kind)
            counts, self.passes = ended.counts, layers_done(ended.told)
        self.seconds, (self.writes, self.changes) = statistics.median(seconds), counts[:2]

    def argv(self, out: Path) -> list[object]:
        return self.bench.argv(self.kind, out, "--log-format", "json")

    def strike(self, out: Path) -> tuple[str, int, float, str]:
        """Run until a random moment -> (how, exit code, seconds, log)."""
        how = self.dice.choices(("in a write", "at another call", "by the clock"), (2, 1, 1))[0]
        op, most = ("write", self.writes) if how == "in a write" else ("change", self.changes)
        rules = () if how == "by the clock" else (f"{op} {out}/* {self.dice.randint(1, most)} K",)
        began = time.monotonic()
        pid = self.bench.shop.start(*self.argv(out), rules=(*rules, *self.slow))
        if how == "by the clock":
            lock = out / ".streammerge" / "lock"
            while not lock.exists() and Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            time.sleep(self.dice.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)  # a zombie until it is waited for: the pid is still its own
        ended = self.bench.shop.wait(pid)
        return how, ended.code, time.monotonic() - began, ended.told

    def run(self, kills: int) -> list[dict]:
        """So many kills, each followed by a resume to the end and a comparison; what was told of each."""
        found: list[dict] = []
        while len(found) < kills:
            out, chain = self.bench.root / f"{self.kind}-{len(found)}-out", []
            done, spent, over = 0, 0.0, False
            for _ in range(1 + (self.dice.random() < 1 / 3)):
                how, code, seconds, log = self.strike(out)
                done, spent = done + layers_done(log), spent + seconds
                assert code in (0, -signal.SIGKILL), (code, log)
                if code:
                    chain.append({"how": how, "left": left_by(out)})
                over = not code or chain[-1]["left"] == "finished"
                if over:
                    break
            if not over:
                began = time.monotonic()
                ended = self.bench.shop.do(*self.argv(out), rules=self.slow)
                done, spent = done + layers_done(ended.told), spent + time.monotonic() - began
                assert ended.code == 0, ended
            self.wrong += content(out) != self.bench.whole(self.kind) or (out / ".streammerge").exists()
            if chain:
                told = {"extra": round((spent - self.seconds) / len(chain), 3)}
                told |= {"replayed": max(0, done - self.passes) / len(chain)} if self.passes else {}
                found += [{**kill, **told} for kill in chain]
            shutil.rmtree(out)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-kills.jsonl")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trio = save_trio(root / "trio", "llama", layers=6)
        (root / "sets").mkdir()
        sets = write_sets(root / "sets")
        recipes = {"model": recipe_text(trio, sets), "layer": recipe_text(trio, sets, coefficients={"scope": "layer"}),
                   "plain": recipe_text(trio, None, merge_method="task_arithmetic", **{"lambda": 0.3})}  # fmt: skip
        with Workshop(root) as shop:
            bench = Bench(shop, root, trio, recipes)
            for kind, share in SHARES.items():
                killer = Killer(bench, kind, random.Random(f"{args.seed} {kind}"))
                kills = killer.run(round(share * args.kills))
                facts = {"kind": kind, "seed": args.seed, "kills": kills, "wrong": killer.wrong,
                         "layer_passes": killer.passes, "whole_seconds": round(killer.seconds, 3)}  # fmt: skip
                extra = [kill["extra"] for kill in kills]
                made = row(f"{len(kills)} kills, {kind}: extra time of a kill", "s", extra, facts=facts)
                append(args.out, [made])
                print(f"{kind}: {len(kills)} kills, {killer.wrong} outputs differ; an uninterrupted run takes "
                      f"{killer.seconds:.2f} s, a kill adds {made.median:.2f} s (at most {max(extra):.2f} s)")


if __name__ == "__main__":
    main()
