"""What happens when a disk fills up, an input vanishes, a system call fails: every fault of tests/faults, met once.

    python benchmarks/bench_faults.py [--out FILE]

Each fault strikes a RAIN merge and a merge without calibration of a tiny trio; then what was broken is mended and the
same command goes on. Replaces results/cpu-faults.jsonl by one row; python benchmarks/render.py makes the README's table
of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from rows import RESULTS, ROOT, append, row

sys.path.insert(0, str(ROOT / "tests"))
from builders import save_trio, write_sets  # noqa: E402
from faults.matrix import FAULTS, Bench, Met, meet, recipes  # noqa: E402
from faults.workshop import Unavailable, Workshop  # noqa: E402


def described(met: Met) -> dict:
    """A fault and what became of it; of the message the first line, with file names in place of paths."""
    first = met.ended.told.partition("\n")[0].removeprefix("streammerge: error: ") if met.ended.code else _note(met)
    said = re.sub(r"/[^\s:,]*/", "", first)
    return {"fault": met.fault.name, "kind": met.kind, "code": met.ended.code, "says": said, "left": met.left,
            "problems": list(met.problems)}  # fmt: skip


def _note(met: Met) -> str:
    """What a merge that went on told of the fault, as JSON lines or under its table; "" where it told nothing."""
    if "json" in met.fault.flags:
        notes = [json.loads(line)["event"] for line in met.ended.told.splitlines() if line.startswith("{")]
    else:
        notes = re.findall(r"note: (.*?)(?= note: | peak memory )", " ".join(met.ended.told.split()))
    return next((note for note in notes if met.fault.says and met.fault.says[0] in note), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-faults.jsonl")
    args = parser.parse_args()
    found, skipped = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trio = save_trio(root / "trio", "llama")
        (root / "sets").mkdir()
        with Workshop(root) as shop:
            bench = Bench(shop, root, trio, recipes(trio, write_sets(root / "sets")))
            for fault, kind in [(one, kind) for one in FAULTS for kind in one.kinds]:
                try:
                    found.append(described(meet(bench, fault, kind)))
                except Unavailable as why:
                    skipped.append(f"{fault.name}, {kind}: {why}")
    wrong = sum(bool(met["problems"]) for met in found)
    args.out.unlink(missing_ok=True)
    append(args.out, [row("faults whose end was not the wanted one", "count", [wrong], "; ".join(skipped),
                          {"faults": found})])  # fmt: skip
    for met in found:
        print(f"{met['fault']}, {met['kind']}: {met['code']}, {met['left']} {met['problems'] or ''}")
    print(f"{len(found)} faults met, {wrong} ended otherwise than wanted, {len(skipped)} could not be made here")


if __name__ == "__main__":
    main()
