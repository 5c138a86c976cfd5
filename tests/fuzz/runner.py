"""Runs cases of a target under a time and a memory limit and counts how they end.

`python tests/fuzz/runner.py --seed 1 --scale 1.0` runs the whole set (make test-slow does); `--only header:1234` one
case again, with its traceback. A case depends on (target, seed, number) alone.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive",
                       "TRANSFORMERS_VERBOSITY": "error"}.items():  # fmt: skip
        os.environ.setdefault(key, value)

from fuzz.targets import TARGETS, Target  # noqa: E402

from streammerge.errors import StreamMergeError  # noqa: E402
from streammerge.markers import address_space  # noqa: E402

COUNTS = {"header": 9000, "index": 4000, "recipe": 4000, "calibration": 3000, "config": 3000, "tokenizer": 500,
          "merge": 1500}  # fmt: skip
SECONDS = {"merge": 60}  # a case; others 20
MEMORY = 3 << 30  # beyond what the process holds already
EXITS = {"recipe": {2}, "header": {3}, "index": {3}, "config": {3}, "calibration": {3, 7}, "tokenizer": {3, 7},
         "merge": {2, 3, 4, 6, 7}}  # fmt: skip
# damage of a recipe can turn a path into another one, which is then named together with its key
_KEYS = r"^(base_model|instruct_model|reasoning_model|calibration\.\w+): |^  - (base_model|instruct|reasoning|calib)"


class Hang(BaseException):
    """The case took longer than its limit."""


@dataclass
class Outcome:
    target: str
    ends: Counter = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    slowest: float = 0.0


def _alarm(*_: object) -> None:
    raise Hang


def judge(target: str, run: Callable[[], None], root: Path) -> str:
    """'works' or 'exit N'; AssertionError for an error that does not keep the rules. Others pass through."""
    try:
        run()
    except StreamMergeError as error:
        told = str(error)
        assert error.exit_code in EXITS[target], f"exit code {error.exit_code}: {told}"
        named = str(root) in told or re.search(_KEYS, told)
        assert error.exit_code in (4, 6) or named, f"the message names no file: {told[:500]}"
        assert len(told.splitlines()) < 40 and len(told) < 20_000, f"{len(told)} characters: {told[:500]}"
        assert "Traceback" not in told
        return f"exit {error.exit_code}"
    return "works"


def run_case(target: Target, name: str, seed: int, number: int) -> str:
    """One case; raises whatever is a defect."""
    dice = random.Random(f"{name}/{seed}/{number}")
    previous = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS.get(name, 20))
    try:
        with address_space(MEMORY):
            return target.case(dice, lambda run, root: judge(name, run, root))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_target(name: str, root: Path, seed: int, numbers: range) -> Outcome:
    target, outcome = TARGETS[name](root / name), Outcome(name)
    for number in numbers:
        began = time.monotonic()
        try:
            outcome.ends[run_case(target, name, seed, number)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(last.filename).name}:{last.lineno}"
            outcome.defects.append(f"{type(error).__name__} at {at}: {name}:{number}, seed {seed}: {str(error)[:300]}")
        outcome.slowest = max(outcome.slowest, time.monotonic() - began)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    parser.add_argument("--targets", nargs="*", default=list(COUNTS))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="one case, with its traceback")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if args.only:
            name, number = args.only.split(":")
            print(run_case(TARGETS[name](Path(root) / name), name, args.seed, int(number)))
            return 0
        began, total, defects = time.monotonic(), 0, 0
        print(f"seed {args.seed}")
        for name in args.targets:
            since = time.monotonic()
            outcome = run_target(name, Path(root), args.seed, range(round(COUNTS[name] * args.scale)))
            count = outcome.ends.total() + len(outcome.defects)
            total, defects = total + count, defects + len(outcome.defects)
            ends = ", ".join(f"{end}: {n}" for end, n in sorted(outcome.ends.items()))
            print(f"{name}: {count} mutations ({ends}), {len(outcome.defects)} defects, slowest "
                  f"{outcome.slowest:.2f} s, {time.monotonic() - since:.0f} s in all", flush=True)
            for place, n in Counter(line.split(": ")[0] for line in outcome.defects).most_common(20):
                print(f"  {n} x " + next(x for x in outcome.defects if x.startswith(place + ": ")), flush=True)
        print(f"{total} mutations, {defects} defects, seed {args.seed}, {time.monotonic() - began:.0f} s")
    return 1 if defects or total == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
