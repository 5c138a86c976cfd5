"""Calibration samples -> token ids and positions: Ω_think of the reasoning set, spans of the instruction set.

One rule carries this file: a sample's full text is tokenised once, and every position is found by character offsets
on the very ids that are run. Spans matched on one tokenisation and forwarded on another are off by a few tokens
wherever a merge crosses a boundary (method.md, section 5, defect 10). No sample is left out without a note.

Causality makes everything past the last needed position invisible to what is measured, so samples end there.
Holds the ids of all samples; the longest text's offsets for a moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batches import Batch, make_batches
from .errors import InputError, MarkersError, listed
from .layout import Layout, Tokens, layouter, occurrences, tokenise
from .markers import Markers, single_token
from .recipe import Recipe, Thinking
from .records import Record, Spans, read_set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batch", "CalibrationSet", "Instruction", "InstructionSample", "ReasoningSample", "load_calibration",
           "make_batches"]


@dataclass(frozen=True)
class ReasoningSample:
    """One reasoning sample, cut after the last position of Ω_think."""

    sample_id: str
    ids: tuple[int, ...]
    omega: tuple[int, ...]  # sorted positions of Ω_think
    opener: int  # position of the opener's last token
    predecessor: int  # position just before the closer's first token: the one that predicts it
    closer: int  # position of the closer's last token


@dataclass(frozen=True)
class Instruction:
    """One instruction's token positions, each sorted and unique; `aligned` or `unrelated` may be empty, not both."""

    name: str
    columns: tuple[int, ...]  # I: its prompt spans; never empty
    aligned: tuple[int, ...]  # R: the response that it constrains
    unrelated: tuple[int, ...]  # U: unrelated response, its own and the sample's, less R


@dataclass(frozen=True)
class InstructionSample:
    """One instruction sample, cut after the last position of its instructions' R and U."""

    sample_id: str
    ids: tuple[int, ...]
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """What a merge is calibrated on. A set that the recipe does not name is empty."""

    reasoning: tuple[ReasoningSample, ...]
    heldout: tuple[ReasoningSample, ...]  # of the same file, for L_think; in no basis
    instruction: tuple[InstructionSample, ...]
    notes: dict[str, Any]  # JSON-able: counts, what was left out and why


def load_calibration(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, markers: Markers, max_positions: int, lrm_path: Path
) -> CalibrationSet:
    """Both calibration sets of the recipe as ids and positions, in the LRM's own chat format (method.md, 2 and 3).

    Length limits (calibration.max_tokens and the model's `max_positions`) count the tokens that are run, after the cut.
    Raises InputError that lists all that is wrong with the files, all prompts that the template of `lrm_path` alters,
    or all samples over the limit; MarkersError when too few reasoning samples hold both markers.
    """
    options = recipe.calibration
    problems: list[str] = []
    sets = {
        kind: read_set(path, kind, limit, problems) if path else []
        for kind, path, limit in (("reasoning", options.reasoning, options.limit_reasoning),
                                  ("instruction", options.instruction, options.limit_instruction))
    }
    if problems:
        raise InputError(listed("The calibration sets have mistakes:", problems,
                                "Mend the files or the paths; copy spans letter by letter from the sample's own text."))
    lay = layouter(tokenizer, markers)
    laid = {kind: _laid_out(records, lay, lrm_path, problems) for kind, records in sets.items()}
    if problems:
        raise InputError(listed("The LRM's chat template alters prompts, so their spans cannot be placed:", problems,
                                "Change these prompts, or leave the samples out."))
    spelt = {text: tokenizer.encode(text, add_special_tokens=False) for text in (markers.open, markers.close)}
    notes: dict[str, Any] = {"markers": dict(vars(markers)), "marker_ids": spelt}
    reasoning = _reasoning(laid["reasoning"], recipe, tokenizer, markers, notes) if options.reasoning else []
    instruction = _instruction(laid["instruction"], recipe, tokenizer, notes) if options.instruction else []
    reasoning, instruction = _within_limit(reasoning, instruction, recipe, max_positions, notes)
    kept, heldout = _split(reasoning, options.holdout, recipe.seed)
    for name, samples in (("reasoning", kept), ("heldout", heldout), ("instruction", instruction)):
        notes.setdefault(name, {}).update(_sizes(samples))
    return CalibrationSet(tuple(kept), tuple(heldout), tuple(instruction), notes)


def _laid_out(
    records: list[Record], lay: Callable[[Record], Layout | None], lrm_path: Path, problems: list[str]
) -> list[tuple[Record, Layout]]:
    """Records with their texts; a prompt that the template alters goes to `problems`."""
    out = []
    for record in records:
        layout = lay(record)
        if layout is None:
            problems.append(f"{record.where}: 'prompt' is not in what the template of {lrm_path} renders from it")
        else:
            out.append((record, layout))
    return out


def _reasoning(
    laid: list[tuple[Record, Layout]], recipe: Recipe, tokenizer, markers: Markers, notes: dict[str, Any]
) -> list[ReasoningSample]:
    """Samples that hold both markers, as positions; MarkersError where these are too few."""
    single = {text: single_token(tokenizer, text) for text in (markers.open, markers.close)}
    samples, without = [], []
    for record, layout in laid:
        tokens = tokenise(tokenizer, layout.text)
        opener, closer = tokens.over(layout.open), tokens.over(layout.close)
        why = "its reasoning is empty" if not layout.thinking.strip() else ""
        if markers.close in layout.thinking:  # the model would have gone on to the response there
            why = f"{markers.close!r} also occurs inside its reasoning"
        for positions, marker in ((opener, markers.open), (closer, markers.close)):
            ids = [tokens.ids[p] for p in positions]
            back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if marker not in back or (single[marker] is not None and single[marker] not in ids):
                why = why or f"the tokens of {marker!r} read back as {back!r}"
        if not why and opener[-1] >= closer[0]:
            why = "opener and closer share a token"
        if why:
            without.append({"id": record.sample_id, "why": why})
            continue
        dice = random.Random(f"thinking {recipe.seed} {record.index}")
        omega = _omega(recipe.thinking, opener, closer, len(tokens.ids), dice)
        samples.append(ReasoningSample(record.sample_id, tuple(tokens.ids[: omega[-1] + 1]), omega, opener[-1],
                                       closer[0] - 1, closer[-1]))
    share = len(samples) / len(laid)
    notes["reasoning"] = {"file": recipe.calibration.reasoning, "samples": len(laid), "marker_share": share,
                          "without_markers": without}
    if share < recipe.thinking.min_share or not samples:
        raise MarkersError(listed(
            f"{recipe.calibration.reasoning}: only {share:.1%} of {len(laid)} reasoning samples hold both thinking "
            f"markers ({markers.open!r} … {markers.close!r}; {markers.evidence}); wanted at least "
            f"{recipe.thinking.min_share:.0%} (thinking.min_share):",
            [f"sample {one['id']}: {one['why']}" for one in without],
            "Check thinking.open and thinking.close against the LRM, and that the file is its reasoning.", most=8))
    return samples


def _omega(thinking: Thinking, opener: list[int], closer: list[int], end: int, dice: random.Random) -> tuple[int, ...]:
    """Ω_think: sorted positions of both markers and of the recipe's window around them (method.md, section 2).

    The random positions are drawn from what the window leaves, strictly between the markers.
    """
    first, last = opener[-1] + 1, closer[0]  # the thinking is [first, last)
    chosen = {*opener, *closer}
    for marker in (opener, closer):
        chosen.update(range(max(0, marker[0] - thinking.before), marker[0]))
    chosen.update(range(first, min(last, first + thinking.inside)))
    chosen.update(range(max(first, last - thinking.inside), last))
    chosen.update(range(closer[-1] + 1, min(end, closer[-1] + 1 + thinking.after)))
    free = [position for position in range(first, last) if position not in chosen]
    chosen.update(dice.sample(free, min(thinking.random, len(free))))
    return tuple(sorted(chosen))


def _instruction(
    laid: list[tuple[Record, Layout]], recipe: Recipe, tokenizer, notes: dict[str, Any]
) -> list[InstructionSample]:
    """Samples with at least one instruction that can be measured; the others are counted in `notes`."""
    samples, without_rows, empty = [], [], {"columns": 0, "aligned": 0, "unrelated": 0}
    for record, layout in laid:
        tokens = tokenise(tokenizer, layout.text)
        usable = []
        for spans in record.instructions:
            instruction = _placed(spans, record, layout, tokens)
            for key in empty:
                empty[key] += not getattr(instruction, key)
            if instruction.columns and (instruction.aligned or instruction.unrelated):
                usable.append(instruction)
        if not usable:
            without_rows.append(record.sample_id)
            continue
        end = 1 + max(max(i.aligned + i.unrelated) for i in usable)
        samples.append(InstructionSample(record.sample_id, tuple(tokens.ids[:end]), tuple(usable)))
    file = recipe.calibration.instruction
    notes["instruction"] = {"file": file, "samples": len(laid),
                            "instructions": sum(len(record.instructions) for record, _ in laid),
                            "instructions_used": sum(len(sample.instructions) for sample in samples),
                            **{f"instructions_without_{key}": count for key, count in empty.items()},
                            "without_instructions": without_rows}
    if not samples:
        raise InputError(f"{file}: no sample has an instruction with prompt_spans and response_spans (or unrelated "
                         "ones), so there is nothing to measure attention on; annotate spans, or set "
                         "coefficients.rule: uniform")
    return samples


def _placed(spans: Spans, record: Record, layout: Layout, tokens: Tokens) -> Instruction:
    """One instruction's I, R and U on the sample's own tokens. A token in both R and U is R's."""
    low, high = layout.body
    asked = [(max(low, layout.prompt + a), min(high, layout.prompt + b))  # a span may hold what the template trimmed
             for a, b in occurrences(record.prompt, spans.prompt)]
    aligned, own, common = (
        tokens.over_all((layout.response + a, layout.response + b) for a, b in occurrences(record.response, texts))
        for texts in (spans.response, spans.unrelated, record.unrelated)
    )
    return Instruction(spans.name, tuple(sorted(tokens.over_all(asked))), tuple(sorted(aligned)),
                       tuple(sorted((own | common) - aligned)))


def _within_limit(reasoning: list, instruction: list, recipe: Recipe, max_positions: int, notes: dict) -> tuple:
    """Both sets without samples over the length limit: an error that lists them, or dropped with a note."""
    options, out, problems = recipe.calibration, [], []
    limit = min(max_positions, options.max_tokens or max_positions)
    for kind, samples in (("reasoning", reasoning), ("instruction", instruction)):
        long = [{"id": s.sample_id, "tokens": len(s.ids)} for s in samples if len(s.ids) > limit]
        kept = [sample for sample in samples if len(sample.ids) <= limit]
        file = getattr(options, kind)
        problems += [f"{file}, sample {one['id']}: {one['tokens']} tokens" for one in long]
        if samples:
            notes[kind].update(limit=limit, dropped_long=long)
        if samples and not kept and options.on_long == "drop":
            shortest = min(one["tokens"] for one in long)
            raise InputError(f"{file}: all {len(samples)} samples are longer than {limit} tokens, the shortest has "
                             f"{shortest}; raise calibration.max_tokens (the model takes {max_positions})")
        out.append(kept)
    if problems and options.on_long == "error":
        raise InputError(listed(
            f"Samples longer than {limit} tokens (calibration.max_tokens: {options.max_tokens}; the model takes "
            f"{max_positions}):", problems, "Write calibration.on_long: drop to leave them out"
            + (", or raise calibration.max_tokens." if limit < max_positions else "; the report will name them.")))
    return tuple(out)


def _split(samples: list, holdout: float, seed: int) -> tuple[list, list]:
    """(samples for the bases, held-out samples), both in file order. One sample always stays for the bases."""
    wanted = max(1, round(holdout * len(samples))) if holdout > 0 else 0
    order = list(range(len(samples)))
    random.Random(f"holdout {seed}").shuffle(order)
    out = set(order[: max(0, min(wanted, len(samples) - 1))])
    return [s for i, s in enumerate(samples) if i not in out], [s for i, s in enumerate(samples) if i in out]


def _sizes(samples: list) -> dict[str, Any]:
    """Counts for the report."""
    sizes: dict[str, Any] = {"used": len(samples), "tokens": sum(len(sample.ids) for sample in samples)}
    if samples:
        longest = max(samples, key=lambda sample: len(sample.ids))
        sizes["longest"] = {"id": longest.sample_id, "tokens": len(longest.ids)}
    if samples and isinstance(samples[0], ReasoningSample):
        sizes["omega"] = sum(len(sample.omega) for sample in samples)
    return sizes
