"""Planned peaks of host memory beside measured ones: four shapes under three budgets each.

    python benchmarks/bench_budget.py [--shapes NAME ...] [--dir DIR] [--out FILE] [--terms]

For every cell `streammerge plan` and then `streammerge merge` run as commands of their own, with the same --host-memory
and two threads; what is compared is the plan's sum and the kernel's high-water mark, both beyond the imports. The
budgets of a shape: none, one that makes the merge go slower, one below what its activations take, which are then
spilled to disk. Weights and texts are synthetic, tokenizer and files are real. Replaces results/cpu-budget.jsonl (a row
a cell); python benchmarks/render.py makes the README's table of it. --terms prints the sums.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import RESULTS, ROOT, Row, append, row

from streammerge.bench.shapes import Shape
from streammerge.bench.synthetic import make_trio

sys.path.insert(0, str(ROOT / "tests"))
from builders import recipe_text, save_tokenizer  # noqa: E402

_THREADS = 2


@dataclass(frozen=True)
class Case:
    """A model and its calibration: samples of each set, and the mean length of their texts, in words (of 3 tokens)."""

    shape: Shape
    dtype: str
    samples: int
    words: int
    budgets: tuple[str, str, str]
    scope: str = "model"


CASES = (
    Case(Shape("narrow and deep", "llama", 512, 2048, 6, 8, 2, 400, True), "bfloat16", 30, 90,
         ("auto", "140MB", "110MB")),
    Case(Shape("wide", "llama", 1536, 4096, 2, 12, 4, 400, True), "bfloat16", 10, 120, ("auto", "400MB", "300MB")),
    Case(Shape("many tokens", "llama", 768, 2048, 2, 12, 12, 400, True), "bfloat16", 30, 250,
         ("auto", "280MB", "180MB")),
    Case(Shape("fp32, one pass", "llama", 1024, 2816, 2, 16, 8, 400, True), "float32", 20, 100,
         ("auto", "450MB", "360MB"), "layer"),
)  # fmt: skip


def write_sets(folder: Path, samples: int, words: int) -> dict[str, Path]:
    """Calibration sets in the authors' schemas: lengths spread evenly over 0.4 to 1.6 of the mean."""
    numbers = ("one", "two", "three", "four", "five", "six", "seven")

    def text(n: int, length: int) -> str:
        return " ".join(numbers[(n * i + i * i) % 7] for i in range(length))

    thoughts, orders = [], []
    for n in range(samples):
        length = round(words * (0.4 + 1.2 * (n + 0.5) / samples))
        thoughts.append({"sample_id": f"r{n}", "prompt": f"the sum of {text(n, 5)}?", "reasoning": text(n, length),
                         "response": "it is five."})  # fmt: skip
        spans = {"prompt_spans": ["end with done"], "response_spans": ["done"], "unrelated_response_spans": []}
        orders.append({
            "id": n, "prompt": f"the sum of {text(n, length // 2)}? end with done, please!", "reason": text(n, 5),
            "response": f"it is {text(n, length // 2)} done", "unrelated_response_spans": ["it is"],
            "related_prompt_list": [{"instruction_id": "done", **spans}],
        })  # fmt: skip
    paths = {"reasoning": folder / "reasoning.json", "instruction": folder / "instruction.jsonl"}
    paths["reasoning"].write_text(json.dumps(thoughts))
    paths["instruction"].write_text("".join(json.dumps(o) + "\n" for o in orders))
    return paths


def prepare(case: Case, root: Path) -> Path:
    """The recipe of a case, its models and sets around it."""
    trio = make_trio(root / "trio", case.shape.config(dtype=case.dtype), case.dtype)
    for path in trio.values():
        save_tokenizer(path)
    recipe = root / "recipe.yml"
    sets = write_sets(root, case.samples, case.words)
    recipe.write_text(recipe_text(trio, sets, coefficients={"scope": case.scope}))
    return recipe


def command(*argv: object) -> dict[str, Any]:
    """A streammerge command in a process of its own -> what --json prints."""
    code = "import sys, checkout; from streammerge.cli import main; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    given = [sys.executable, "-c", code, *map(str, argv), "--quiet", "--json", "--threads", str(_THREADS)]
    done = subprocess.run(given, stdout=subprocess.PIPE, env=env, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}: exit code {done.returncode}")
    return json.loads(done.stdout)


def measure(case: Case, recipe: Path, budget: str) -> Row:
    """One cell: planned first, then merged."""
    given = [] if budget == "auto" else ["--host-memory", budget]
    with tempfile.TemporaryDirectory(dir=recipe.parent) as folder:
        out = Path(folder) / "out"
        plan = command("plan", recipe, out, *given)["plan"]
        report = command("merge", recipe, out, *given)
    found = report["memory"]
    if found["peak_since"] != "merge began":
        sys.exit("this kernel does not let a process reset its high-water mark: peaks cannot be measured here")
    facts = {
        "shape": case.shape.name, "hidden": case.shape.hidden, "wide": case.shape.wide, "layers": case.shape.layers,
        "heads": case.shape.heads, "kv_heads": case.shape.kv_heads, "dtype": case.dtype, "scope": case.scope,
        "tokens": report["throughput"]["calibration_tokens"], "budget": budget, "planned": plan["host_total"],
        "tokens_per_batch": plan["tokens_per_batch"], "workers": plan["workers"], "spill": plan["spill"],
        "ahead": plan["ahead"], "terms": plan["host"], "seconds": report["seconds"]["total"],
        "error": round(plan["host_total"] / found["host_beyond_imports"] - 1, 4),
    }  # fmt: skip
    if plan != report["plan"]:
        sys.exit(f"{case.shape.name}, {budget}: the plan and the merge differ: {plan} {report['plan']}")
    return row(f"merge, {case.shape.name}, --host-memory {budget}", "peak host MB beyond imports",
               [found["host_beyond_imports"] / 1e6], f"{_THREADS} threads", facts)  # fmt: skip


def told(one: Row, terms: bool) -> str:
    facts, sums = one.facts, ""
    if terms:
        sums = "".join(f"\n    {size / 1e6:8.1f}  {name}" for name, size in facts["terms"].items())
    return (f"{facts['shape']:16} {facts['budget']:>6}  planned {facts['planned'] / 1e6:6.1f} MB, measured "
            f"{one.median:6.1f} MB, {100 * facts['error']:+5.1f} %  ({facts['tokens']} tokens, batch "
            f"{facts['tokens_per_batch']} x {facts['workers']}{', spilled' if facts['spill'] else ''}, "
            f"{facts['seconds']:.1f} s){sums}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[c.shape.name for c in CASES], help="default: all")
    parser.add_argument("--dir", type=Path, help="where the models are made (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-budget.jsonl")
    parser.add_argument("--terms", action="store_true", help="print the plan's sums")
    args = parser.parse_args()
    found = []
    for case in (c for c in CASES if not args.shapes or c.shape.name in args.shapes):
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            recipe = prepare(case, Path(folder))
            for budget in case.budgets:
                found.append(measure(case, recipe, budget))
                print(told(found[-1], args.terms), flush=True)
    args.out.unlink(missing_ok=True)
    append(args.out, found)
    print(f"worst error: {max(abs(one.facts['error']) for one in found):.1%}")


if __name__ == "__main__":
    main()
