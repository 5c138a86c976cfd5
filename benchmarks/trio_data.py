"""Write the data files that ship beside the demo trio: calibration, held-out, validation and test.

What: reasoning samples are the LRM's own correct greedy outputs; instruction samples pair the training distribution's
trace with a reply that obeys, and mark the spans; validation and test are prompts with their expected answers.
Holds in memory: the LRM (fp32) and a few thousand short rows.
Why this way: splits are disjoint by construction (world.split_of), tasks and constraints are dealt round robin, so
every file is balanced, and a prompt never occurs twice in a file.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import world

from streammerge.demo.evaluate import Row, evaluate

SEED = 5
SIZES = {"validation": 300, "test": 480}  # rows of each kind


def _fresh(rng: random.Random, split: str, index: int, used: set[str]) -> world.Problem:
    while True:
        problem = world.draw(rng, split, index % len(world.TASKS))
        if problem.question not in used:
            used.add(problem.question)
            return problem


def rows(split: str, count: int) -> list[Row]:
    """`count` plain rows and `count` constrained rows, all on different problems."""
    rng, used, found = random.Random(f"{SEED}-{split}"), set(), []
    names = list(world.PARAPHRASES)
    for i in range(count):
        p = _fresh(rng, split, i, used)
        found.append(Row(f"{split}-r{i:03d}", "reasoning", p.question, p.answer, None))
    for i in range(count):
        p, name = _fresh(rng, split, i, used), names[i % len(names)]
        wording = world.PARAPHRASES[name][i // len(names) % 4]
        prompt = world.with_constraint(p.question, wording, rng)
        found.append(Row(f"{split}-i{i:03d}", "instruction", prompt, p.answer, name))
    return found


def reasoning_samples(lrm: Path, split: str, count: int) -> list[dict]:
    """The LRM's own correct greedy outputs, in the authors' schema."""
    rng, used = random.Random(f"{SEED}-{split}"), set()
    drawn = [_fresh(rng, split, i, used) for i in range(count + count // 4)]
    asked = [Row(str(i), "reasoning", p.question, p.answer, None) for i, p in enumerate(drawn)]
    kept = [(r, o.text) for r, o in zip(asked, evaluate(lrm, asked), strict=True) if o.correct and o.closed]
    parts = [(r.prompt, *text.split("\n</think>\n\n")) for r, text in kept][:count]
    if len(parts) < count:
        raise RuntimeError(f"the LRM solves only {len(parts)} of {len(asked)} {split} problems; {count} are wanted")
    keys = ("prompt", "reasoning", "response")
    return [{**dict(zip(keys, part, strict=True)), "sample_id": f"{split}_{i:04d}"} for i, part in enumerate(parts)]


def instruction_samples(per_wording: int = 8) -> list[dict]:
    """Constrained prompts with an obeying reply and its spans: every wording of every constraint equally often."""
    rng, used, found = random.Random(f"{SEED}-instruction"), set(), []
    for turn in range(per_wording * 4):
        for name, wordings in world.PARAPHRASES.items():
            p, wording = _fresh(rng, "calibration", len(found) + turn, used), wordings[turn % 4]
            related, unrelated = world.spans(name, p.sentence)
            span = {"instruction_id": name, "prompt_spans": [wording], "response_spans": related,
                    "unrelated_response_spans": unrelated}
            found.append({
                "id": len(found), "prompt": world.with_constraint(p.question, wording, rng), "reason": p.reasoning,
                "response": world.obey(name, p.sentence), "related_prompt_list": [span],
                "unrelated_response_spans": [],
            })
    return found


def _lines(items) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def write_all(out: Path) -> None:
    (out / "calibration").mkdir(parents=True, exist_ok=True)
    reasoning = reasoning_samples(out / "lrm", "calibration", 150)
    (out / "calibration" / "reasoning.json").write_text(json.dumps(reasoning, indent=1) + "\n")
    (out / "calibration" / "instruction.jsonl").write_text(_lines(instruction_samples()))
    heldout = reasoning_samples(out / "lrm", "heldout", 100)
    (out / "heldout_reasoning.json").write_text(json.dumps(heldout, indent=1) + "\n")
    for split, count in SIZES.items():
        (out / f"{split}.jsonl").write_text(_lines(asdict(row) for row in rows(split, count)))
