"""Calibration: samples to ids and positions, on the very ids that are run; bad files; batches."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streammerge.calibration import load_calibration, make_batches
from streammerge.errors import InputError, MarkersError
from streammerge.markers import find_markers
from streammerge.recipe import Calibration, Coefficients, Recipe, Thinking

REAL = Path(__file__).parents[1].parent / "shared/calibration"
PLAIN = ("<s>{% for m in messages %}User: {{ m['content'] | trim }}\n{% endfor %}"
         "{% if add_generation_prompt %}A:{% endif %}")
OPENING = PLAIN.replace("A:{%", "A:<think>\n{%")  # as in DeepSeek-R1's distills
EMITTING = "{# <think> #}" + PLAIN
# As in Llama 3 and Qwen: punctuation takes the newlines behind it along, so that ">\n\n" can be one token.
PIECES = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s*[\r\n]+|\s+")


def make_tokenizer(template, special=("<s>",)):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False, special_tokens=list(special))
    text = "User: write a list of what you want.\n<think>\nOkay, the user wants this.\n</think>\n\nHere it is."
    core.train_from_iterator([text] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


SPECIAL = ("<s>", "<think>", "</think>")
CASES = {
    "special token, in the prompt": (OPENING, SPECIAL),
    "special token, emitted": (EMITTING, SPECIAL),
    "plain text, in the prompt": (OPENING, ("<s>",)),
    "plain text, emitted": (EMITTING, ("<s>",)),
}


@pytest.fixture(params=CASES, scope="module")
def tokenizer(request):
    return make_tokenizer(*CASES[request.param])


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer(OPENING, ("<s>",))


def reasoning(n=10, **changes):
    return [{"sample_id": f"r{i}", "prompt": f" how many are {i}? ", "reasoning": f"Okay, {i} it is. " * (i + 3),
             "response": f"There are {i}.", **changes} for i in range(n)]


def instruction(n=4, **changes):
    entry = {"instruction_id": "case", "prompt_spans": ["upper case"], "response_spans": ["HELLO"],
             "unrelated_response_spans": ["you"]}
    return [{"id": i, "prompt": f"say hello {i} in upper case ", "reason": "The user wants a greeting.",
             "response": "HELLO to you, yes to you. Bye", "related_prompt_list": [{**entry, **changes}],
             "unrelated_response_spans": ["yes"]} for i in range(n)]


def write(path, samples, lines=False):
    path.write_text("\n".join(map(json.dumps, samples)) if lines else json.dumps(samples), encoding="utf-8")
    return str(path)


def load(tokenizer, reasoning_file="", instruction_file="", thinking=None, positions=10**6, seed=0, **options):
    thinking = thinking or Thinking()
    options.setdefault("holdout", 0.0)
    recipe = Recipe("rain", "itm", "lrm", "base", seed=seed, thinking=thinking,
                    calibration=Calibration(reasoning_file, instruction_file, **options))
    markers = find_markers(tokenizer, thinking, Path("lrm"))
    return load_calibration(recipe, tokenizer, markers, positions, Path("lrm"))


def decode(tokenizer, ids, positions):
    return tokenizer.decode([ids[p] for p in positions], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(positions):
    """Positions in groups of neighbours."""
    groups = []
    for p in positions:
        if groups and groups[-1][-1] == p - 1:
            groups[-1].append(p)
        else:
            groups.append([p])
    return groups


# Ω_think


def test_the_text_is_written_and_tokenised_once(tokenizer, tmp_path):
    file = write(tmp_path / "r.json", reasoning(1))
    [sample] = load(tokenizer, file, thinking=Thinking(after=999)).reasoning
    text = "<s>User: how many are 0?\nA:<think>\n" + "Okay, 0 it is. " * 3 + "\n</think>\n\nThere are 0."
    assert list(sample.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_markers_and_predecessors(tokenizer, tmp_path):
    file = write(tmp_path / "r.json", reasoning())
    for sample in load(tokenizer, file, thinking=Thinking(before=1, random=0)).reasoning:
        ids, omega = sample.ids, sample.omega
        assert list(omega) == sorted(set(omega))
        split = omega.index(sample.predecessor)
        assert "<think>" in decode(tokenizer, ids, omega[1:split]) and omega[split - 1] == sample.opener
        assert "</think>" in decode(tokenizer, ids, omega[split + 1:])
        assert "<think>" not in decode(tokenizer, ids, omega[1:split - 1] or omega[:1])
        assert omega[-1] == sample.closer and omega[split + 1] == sample.predecessor + 1
        assert omega[1] == omega[0] + 1  # the position that predicts the opener
        # causality: nothing past the last needed position is run
        assert len(ids) == omega[-1] + 1
        assert "There" not in tokenizer.decode(ids)


def test_a_token_shared_with_the_text_around_a_marker_counts(plain, tmp_path):
    [sample] = load(plain, write(tmp_path / "r.json", reasoning(1)), thinking=Thinking(before=0, random=0)).reasoning
    assert plain.convert_ids_to_tokens(sample.ids[sample.closer]).endswith(">ĊĊ")  # ">\n\n" is one token here
    assert plain.convert_ids_to_tokens(sample.ids[sample.opener]).endswith(">Ċ")


def test_window_sizes(tokenizer, tmp_path):
    file = write(tmp_path / "r.json", reasoning(1))

    def omega(**window):
        base = {"before": 0, "inside": 0, "after": 0, "random": 0}
        return load(tokenizer, file, thinking=Thinking(**{**base, **window})).reasoning[0]

    markers = omega()
    opener = [p for p in markers.omega if p <= markers.opener]
    closer = [p for p in markers.omega if p > markers.opener]
    before = omega(before=2).omega
    assert set(before) - set(markers.omega) == {opener[0] - 2, opener[0] - 1, closer[0] - 2, closer[0] - 1}
    inside = omega(inside=2).omega
    assert set(inside) - set(markers.omega) == {opener[-1] + 1, opener[-1] + 2, closer[0] - 2, closer[0] - 1}
    after = omega(after=2)
    assert set(after.omega) - set(markers.omega) == {closer[-1] + 1, closer[-1] + 2}
    assert len(after.ids) == len(markers.ids) + 2
    everything = omega(inside=10**4, before=10**4).omega  # no further than the markers, or the text
    assert everything == tuple(range(closer[-1] + 1))
    drawn = set(omega(random=5).omega) - set(markers.omega)
    assert len(drawn) == 5 and all(opener[-1] < p < closer[0] for p in drawn)
    assert len(omega(inside=2, random=5).omega) == len(inside) + 5  # drawn from what the window leaves
    crowded = omega(random=10**4).omega
    assert crowded == tuple(range(opener[0], closer[-1] + 1))


def test_random_positions_depend_on_seed_and_index_alone(plain, tmp_path):
    samples = reasoning(12)
    whole = load(plain, write(tmp_path / "r.json", samples)).reasoning
    assert whole == load(plain, str(tmp_path / "r.json")).reasoning
    first = load(plain, str(tmp_path / "r.json"), limit_reasoning=5).reasoning
    assert first == whole[:5]
    other = load(plain, str(tmp_path / "r.json"), seed=1).reasoning
    assert [s.omega for s in other] != [s.omega for s in whole]
    twice = load(plain, write(tmp_path / "t.json", reasoning(1) * 2)).reasoning
    assert twice[0].ids == twice[1].ids and twice[0].omega != twice[1].omega
    longer = [{**s, "reasoning": "Hmm. " * 300} if i == 3 else s for i, s in enumerate(samples)]
    dropped = load(plain, write(tmp_path / "x.json", longer), max_tokens=250, on_long="drop").reasoning
    assert dropped == whole[:3] + whole[4:]


def test_reasoning_that_brings_its_markers_gets_no_second_pair(tokenizer, tmp_path):
    bare = load(tokenizer, write(tmp_path / "a.json", reasoning())).reasoning
    for form in ("<think>\n{}\n</think>", "\n<think>{}</think>\n", "{}\n</think>"):
        marked = [{**s, "reasoning": form.format(s["reasoning"])} for s in reasoning()]
        assert load(tokenizer, write(tmp_path / "b.json", marked)).reasoning == bare


def test_what_is_missing_after_an_opener_in_the_prompt(tmp_path):
    bare = make_tokenizer(OPENING.replace("<think>\n", "<think>"), SPECIAL)
    full = make_tokenizer(OPENING, SPECIAL)
    file = write(tmp_path / "r.json", reasoning(2))
    assert load(bare, file).reasoning == load(full, file).reasoning


def test_markers_must_be_in_enough_samples(plain, tmp_path):
    samples = reasoning()
    samples[2]["reasoning"] = " \n"
    samples[5]["reasoning"] = "First.\n</think>\n\nSecond."
    file = write(tmp_path / "r.json", samples)
    loaded = load(plain, file, thinking=Thinking(min_share=0.8))
    assert [s.sample_id for s in loaded.reasoning] == [f"r{i}" for i in range(10) if i not in (2, 5)]
    notes = loaded.notes["reasoning"]
    assert notes["marker_share"] == 0.8 and [one["id"] for one in notes["without_markers"]] == ["r2", "r5"]
    with pytest.raises(MarkersError, match="80.0%.*10") as error:
        load(plain, file)
    assert error.value.exit_code == 7
    for part in ("r2", "r5", "empty", "inside", "90%", file, "thinking.open"):
        assert part in str(error.value)


def test_a_special_marker_must_be_there_as_its_token(tmp_path):
    tokenizer = make_tokenizer(OPENING, SPECIAL)
    markers = find_markers(tokenizer, Thinking(), Path("lrm"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>\n"]})  # swallows the marker in running text
    recipe = Recipe("rain", "itm", "lrm", "base", calibration=Calibration(write(tmp_path / "r.json", reasoning())))
    with pytest.raises(MarkersError, match="0.0%"):
        load_calibration(recipe, tokenizer, markers, 10**6, Path("lrm"))


def test_even_without_a_minimum_some_sample_must_hold_markers(plain, tmp_path):
    file = write(tmp_path / "r.json", reasoning(reasoning=""))
    with pytest.raises(MarkersError):
        load(plain, file, thinking=Thinking(min_share=0.0))


def test_heldout_samples(plain, tmp_path):
    file = write(tmp_path / "r.json", reasoning(12))
    everything = load(plain, file).reasoning
    part = load(plain, file, holdout=0.25)
    assert len(part.heldout) == 3 and len(part.reasoning) == 9
    assert sorted(part.reasoning + part.heldout, key=lambda s: int(s.sample_id[1:])) == list(everything)
    assert part == load(plain, file, holdout=0.25)
    other = load(plain, file, holdout=0.25, seed=1)
    assert {s.sample_id for s in part.heldout} != {s.sample_id for s in other.heldout}
    assert len(load(plain, file, holdout=0.01).heldout) == 1
    alone = load(plain, write(tmp_path / "one.json", reasoning(1)), holdout=0.5)
    assert len(alone.reasoning) == 1 and not alone.heldout
    assert part.notes["heldout"]["used"] == 3


# instruction spans


def test_spans_are_placed_on_the_ids_that_run(tokenizer, tmp_path):
    loaded = load(tokenizer, instruction_file=write(tmp_path / "i.jsonl", instruction(), lines=True))
    assert not loaded.reasoning and not loaded.heldout and len(loaded.instruction) == 4
    for sample in loaded.instruction:
        [one] = sample.instructions
        assert one.name == "case"
        assert "upper case" in decode(tokenizer, sample.ids, one.columns)
        assert "HELLO" in decode(tokenizer, sample.ids, one.aligned)
        said = [decode(tokenizer, sample.ids, run).strip() for run in runs(one.unrelated)]
        assert said == ["you", "yes"]  # its own and the sample's
        assert len(sample.ids) == max(one.aligned + one.unrelated) + 1  # causality
        assert "The user wants a greeting.\n</think>\n\nHELLO" in tokenizer.decode(sample.ids)
        assert "Bye" not in tokenizer.decode(sample.ids)


def test_the_kth_listing_is_the_kth_occurrence(plain, tmp_path):
    def unrelated(times):
        file = write(tmp_path / "i.json", instruction(1, unrelated_response_spans=["you"] * times))
        [sample] = load(plain, instruction_file=file).instruction
        return decode(plain, sample.ids, sample.instructions[0].unrelated), sample

    assert unrelated(1)[0].count("you") == 1
    assert unrelated(2)[0].count("you") == 2
    assert unrelated(3) == unrelated(2)  # fewer occurrences: the last one again


def test_a_short_prompt_is_not_looked_for_in_the_frame(plain, tmp_path):
    samples = instruction(1, prompt_spans=["A"])
    samples[0]["prompt"] = " A "  # "A" is in the frame too, and "A:" follows it
    [sample] = load(plain, instruction_file=write(tmp_path / "i.json", samples)).instruction
    [column] = sample.instructions[0].columns
    assert plain.decode(sample.ids[:column]).rstrip().endswith("User:")


def test_a_span_may_hold_what_the_template_trims(plain, tmp_path):
    file = write(tmp_path / "i.json", instruction(1, prompt_spans=["upper case "]))
    [sample] = load(plain, instruction_file=file).instruction
    assert decode(plain, sample.ids, sample.instructions[0].columns) == "upper case"  # and nothing of the frame


def test_a_token_of_both_kinds_is_aligned(plain, tmp_path):
    file = write(tmp_path / "i.json", instruction(1, unrelated_response_spans=["HELLO to"]))
    [sample] = load(plain, instruction_file=file).instruction
    one = sample.instructions[0]
    assert not set(one.aligned) & set(one.unrelated)
    assert "HELLO" in decode(plain, sample.ids, one.aligned)


def test_instructions_without_rows_are_noted(plain, tmp_path):
    samples = instruction(3)
    samples[0]["related_prompt_list"][0]["response_spans"] = []
    samples[1]["related_prompt_list"][0].update(response_spans=[], unrelated_response_spans=[])
    samples[1]["unrelated_response_spans"] = []
    loaded = load(plain, instruction_file=write(tmp_path / "i.json", samples))
    assert [s.sample_id for s in loaded.instruction] == ["0", "2"]
    notes = loaded.notes["instruction"]
    assert notes["instructions_without_aligned"] == 2 and notes["instructions_without_unrelated"] == 1
    assert notes["without_instructions"] == ["1"] and notes["instructions_used"] == 2
    with pytest.raises(InputError, match="nothing to measure"):
        load(plain, instruction_file=write(tmp_path / "i.json", samples[1:2]))


def test_a_template_that_alters_prompts_is_an_error(tmp_path):
    shouting = make_tokenizer(OPENING.replace("trim", "upper"))
    with pytest.raises(InputError, match="alters"):
        load(shouting, instruction_file=write(tmp_path / "i.json", instruction()))
    assert load(shouting, write(tmp_path / "r.json", reasoning())).reasoning  # no spans to place


# lengths


def test_long_samples_are_an_error_or_a_note(plain, tmp_path):
    samples = reasoning(6)
    for i in (1, 4):
        samples[i]["reasoning"] = "Hmm. " * 300
    files = write(tmp_path / "r.json", samples), write(tmp_path / "i.json", instruction())
    with pytest.raises(InputError) as error:
        load(plain, *files, max_tokens=300)
    lengths = {s.sample_id: len(s.ids) for s in load(plain, *files).reasoning}
    assert f"r1: {lengths['r1']} tokens" in str(error.value) and f"r4: {lengths['r4']} tokens" in str(error.value)
    assert "r2:" not in str(error.value) and "on_long" in str(error.value)
    loaded = load(plain, *files, max_tokens=300, on_long="drop")
    assert [s.sample_id for s in loaded.reasoning] == ["r0", "r2", "r3", "r5"]
    assert loaded.notes["reasoning"]["dropped_long"] == [{"id": i, "tokens": lengths[i]} for i in ("r1", "r4")]
    with pytest.raises(InputError, match="the model takes 300"):
        load(plain, *files, positions=300)
    with pytest.raises(InputError, match="all 4 samples"):
        load(plain, instruction_file=files[1], max_tokens=8, on_long="drop")


def test_only_what_is_run_counts_as_length(plain, tmp_path):
    file = write(tmp_path / "r.json", reasoning(3, response="And so on. " * 500))
    assert len(load(plain, file, max_tokens=200).reasoning) == 3


def test_notes_are_json_and_count_everything(plain, tmp_path):
    files = write(tmp_path / "r.json", reasoning(10)), write(tmp_path / "i.json", instruction())
    loaded = load(plain, *files, holdout=0.2)
    notes = json.loads(json.dumps(loaded.notes))
    assert notes["markers"]["open"] == "<think>" and notes["markers"]["evidence"]
    assert notes["reasoning"]["samples"] == 10 and notes["reasoning"]["used"] == 8 and notes["heldout"]["used"] == 2
    for name in ("reasoning", "heldout", "instruction"):
        samples = getattr(loaded, name)
        assert notes[name]["tokens"] == sum(len(s.ids) for s in samples)
        assert notes[name]["longest"]["tokens"] == max(len(s.ids) for s in samples)
    assert notes["reasoning"]["omega"] == sum(len(s.omega) for s in loaded.reasoning)


# files


def test_json_and_json_lines_are_told_apart_by_content(plain, tmp_path):
    a = load(plain, write(tmp_path / "r.jsonl", reasoning()), write(tmp_path / "i.json", instruction(), lines=True))
    b = load(plain, write(tmp_path / "r.json", reasoning(), lines=True), write(tmp_path / "i.jsonl", instruction()))
    assert (a.reasoning, a.instruction) == (b.reasoning, b.instruction)
    assert len(load(plain, write(tmp_path / "one", reasoning(1), lines=True)).reasoning) == 1


def failure(plain, *files, **options):
    with pytest.raises(InputError) as error:
        load(plain, *files, **options)
    return str(error.value)


@pytest.mark.parametrize(("content", "said"), [
    ("", "empty"), ("[]", "empty"), ("hello", "neither JSON nor JSON Lines"), ("[{]", "neither JSON nor JSON Lines"),
    ('{"data": []}', "one object with the keys data"), ("3", "a number; wanted a list"), ("[3]", "item 1: a number"),
    ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"), (b"\xff\xfe", "cannot be read"),
])
def test_broken_files(plain, tmp_path, content, said):
    path = tmp_path / "set.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for files in ((str(path), ""), ("", str(path))):
        text = failure(plain, *files)
        assert said in text and str(path) in text


def test_missing_files_are_named_together(plain, tmp_path):
    text = failure(plain, str(tmp_path / "no.json"), str(tmp_path / "nothing.jsonl"))
    assert "no.json" in text and "nothing.jsonl" in text and "calibration.instruction" in text


def test_exchanged_files_are_called_that(plain, tmp_path):
    text = failure(plain, write(tmp_path / "a", instruction()), write(tmp_path / "b", reasoning()))
    assert "this is an instruction set" in text and "this is a reasoning set" in text and "exchanged" in text


def test_all_wrong_keys_are_listed(plain, tmp_path):
    bad = reasoning(4)
    del bad[0]["reasoning"], bad[1]["response"]
    bad[0]["prompt"], bad[2]["prompt"], bad[3]["reasoning"] = 3, "  ", ["a"]
    worse = instruction(5)
    worse[0]["related_prompt_list"] = "none"
    del worse[1]["related_prompt_list"][0]["response_spans"]
    worse[2]["related_prompt_list"] = [7]
    del worse[3]["unrelated_response_spans"]
    worse[4]["related_prompt_list"][0]["prompt_spans"] = [""]
    text = failure(plain, write(tmp_path / "r.json", bad), write(tmp_path / "i.jsonl", worse, lines=True))
    for said in ("sample r0 (item 1): the key 'reasoning' is missing", "sample r0 (item 1): 'prompt' is a number",
                 "sample r1 (item 2): the key 'response' is missing", "sample r2 (item 3): 'prompt' is empty",
                 "sample r3 (item 4): 'reasoning' is a list; wanted a text",
                 "sample 0 (line 1): 'related_prompt_list' is a text; wanted a list",
                 "sample 1 (line 2), instruction 1: the key 'response_spans' is missing",
                 "sample 2 (line 3), instruction 1: a number",
                 "sample 3 (line 4): the key 'unrelated_response_spans' is missing",
                 "sample 4 (line 5), instruction 1: 'prompt_spans' holds entries that are empty"):
        assert said in text


def test_spans_that_are_not_in_their_text_are_all_listed(plain, tmp_path):
    samples = instruction(3)
    samples[0]["related_prompt_list"][0]["prompt_spans"] = ["lower case"]
    samples[1]["related_prompt_list"][0]["response_spans"] = ["HELLO", "hello"]
    samples[2]["unrelated_response_spans"] = ["never said"]
    text = failure(plain, instruction_file=write(tmp_path / "i.json", samples))
    for said in ("sample 0 (item 1), instruction 1: prompt_spans has 'lower case', which is not in the prompt",
                 "sample 1 (item 2), instruction 1: response_spans has 'hello', which is not in the response",
                 "sample 2 (item 3): unrelated_response_spans has 'never said', which is not in the response"):
        assert said in text
    assert load(plain, instruction_file=write(tmp_path / "i.json", instruction(1) + samples),
                limit_instruction=1).instruction  # what is not used is not judged


def test_sets_that_the_recipe_does_not_name_are_empty(plain):
    recipe = Recipe("rain", "itm", "lrm", "base", coefficients=Coefficients(rule="uniform"))
    loaded = load_calibration(recipe, plain, find_markers(plain, Thinking(), Path("lrm")), 100, Path("lrm"))
    assert loaded.reasoning == loaded.heldout == loaded.instruction == ()


# batches


def test_batches_keep_the_budget_and_every_sample(plain, tmp_path):
    samples = load(plain, write(tmp_path / "r.json", reasoning(25)), thinking=Thinking(random=0)).reasoning[::-1]
    longest = max(len(s.ids) for s in samples)
    for budget in (1, longest, 3 * longest, 10**6):
        batches = make_batches(samples, budget)
        assert sorted(i for b in batches for i in b.samples) == list(range(25))
        for batch in batches:
            assert batch.ids.dtype == torch.long and tuple(batch.ids.shape) == (len(batch.samples), max(batch.lengths))
            assert batch.ids.numel() <= budget or len(batch.samples) == 1
            for row, (i, length) in enumerate(zip(batch.samples, batch.lengths, strict=True)):
                assert tuple(batch.ids[row, :length].tolist()) == samples[i].ids
        lengths = [length for b in batches for length in b.lengths]
        assert lengths == sorted(lengths, reverse=True)
        again = make_batches(samples, budget)
        assert [b.samples for b in again] == [b.samples for b in batches]
    assert len(make_batches(samples, 10**6)) == 1 and len(make_batches(samples, 1)) == 25
    assert make_batches([], 100) == []


def test_equally_long_samples_keep_their_order(plain, tmp_path):
    samples = load(plain, instruction_file=write(tmp_path / "i.json", instruction(9))).instruction
    assert [i for b in make_batches(samples, 300) for i in b.samples] == list(range(9))


# the authors' sets


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the authors' calibration sets are not at {REAL}")
@pytest.mark.parametrize("case", ["special token, in the prompt", "plain text, emitted"])
def test_the_authors_sets(case):
    tokenizer = make_tokenizer(*CASES[case])
    files = {"reasoning": REAL / "reasoning_calibration_set.json",
             "instruction": REAL / "instruction_calibration_set.jsonl"}
    loaded = load(tokenizer, str(files["reasoning"]), str(files["instruction"]), holdout=0.1)
    assert (len(loaded.reasoning), len(loaded.heldout)) == (135, 15)
    assert loaded.notes["reasoning"]["marker_share"] == 1.0
    for sample in loaded.reasoning + loaded.heldout:
        around = [p for p in sample.omega if p > sample.predecessor]
        assert "</think>" in decode(tokenizer, sample.ids, around) and len(sample.ids) == sample.closer + 1
        assert "<think>" in decode(tokenizer, sample.ids, [p for p in sample.omega if p <= sample.opener])
        assert sample.predecessor in sample.omega
        assert len([p for p in sample.omega if sample.opener < p < sample.predecessor]) == 4
    raw = {str(s["id"]): s for s in map(json.loads, files["instruction"].read_text(encoding="utf-8").splitlines())}
    assert len(raw) == len(files["instruction"].read_text(encoding="utf-8").splitlines()) == 365
    notes = loaded.notes["instruction"]
    assert notes["samples"] == 365 and notes["instructions"] == 609
    assert len(loaded.instruction) + len(notes["without_instructions"]) == 365
    for sample in loaded.instruction:
        entry = raw[sample.sample_id]
        usable = [e for e in entry["related_prompt_list"]
                  if e["response_spans"] or e["unrelated_response_spans"] or entry["unrelated_response_spans"]]
        assert [one.name for one in sample.instructions] == [e["instruction_id"] for e in usable]
        for one, spans in zip(sample.instructions, usable, strict=True):
            everything = [s for key in ("response_spans", "unrelated_response_spans") for s in spans[key]]
            everything += entry["unrelated_response_spans"]
            for positions, wanted in ((one.columns, spans["prompt_spans"]), (one.aligned, spans["response_spans"]),
                                      (sorted({*one.aligned, *one.unrelated}), everything)):
                texts = [decode(tokenizer, sample.ids, run) for run in runs(positions)]
                assert all(any(span.strip() in text for text in texts) for span in wanted)
                assert len("".join(texts)) <= sum(len(span) + 40 for span in wanted)  # and little more than the spans
