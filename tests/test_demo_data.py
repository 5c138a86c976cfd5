"""The shipped trio, its data files, the checkers and the evaluator (benchmarks/train_trio.py writes what is tested)."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from streammerge.demo import checks
from streammerge.demo import evaluate as ev

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "streammerge" / "demo" / "data"
MODELS = ("base", "itm", "lrm")


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import trio_data

        yield trio_data
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def instruction_samples():
    return [json.loads(line) for line in (DATA / "calibration" / "instruction.jsonl").read_text().splitlines()]


def reasoning_samples(name="calibration/reasoning.json"):
    return json.loads((DATA / name).read_text())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_one_family_small_and_plain():
    shapes = []
    for name in MODELS:
        path = DATA / name / "model.safetensors"
        assert path.stat().st_size <= 6e6
        with safe_open(path, "pt") as f:
            assert f.metadata() == {"format": "pt"}
            shapes.append({k: tuple(f.get_slice(k).get_shape()) for k in f.keys()})
            assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
        config = json.loads((DATA / name / "config.json").read_text())
        assert config["model_type"] == "llama"
        assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len({(DATA / n / "tokenizer.json").read_bytes() for n in MODELS}) == 1
    assert len({(DATA / n / "model.safetensors").read_bytes() for n in MODELS}) == 3


@pytest.mark.parametrize("name", MODELS)
def test_auto_tokenizer_reads_tokenizer_json_as_written(name):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(DATA / name)
    plain = Tokenizer.from_file(str(DATA / name / "tokenizer.json"))
    think, close = (auto.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    assert think != close and auto.unk_token_id not in (think, close)
    assert "<think>" not in auto.all_special_tokens
    for s in instruction_samples():
        text = f"{s['prompt']}<think>\n{s['reason']}\n</think>\n\n{s['response']} été"
        ids = auto(text, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(text, add_special_tokens=False).ids == auto(text)["input_ids"]
        assert ids.count(think) == ids.count(close) == 1
        assert auto.decode(ids) == text


def test_only_the_lrm_template_opens_thinking():
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Hi"}]
    for name in MODELS:
        tok = AutoTokenizer.from_pretrained(DATA / name)
        text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|begin|><|User|>Hi<|Assistant|>" + ("<think>\n" if name == "lrm" else "")
    turn = [*chat, {"role": "assistant", "content": "why\n</think>\n\nHello"}]
    assert tok.apply_chat_template(turn, tokenize=False).endswith("<|Assistant|>Hello<|end|>")


# ---- data files ----------------------------------------------------------------------------------------------------


def test_prompts_are_disjoint_between_files(world):
    strip = [w for wordings in world.world.PARAPHRASES.values() for w in wordings]

    def problem(prompt):
        for wording in strip:
            prompt = prompt.replace(wording, "")
        return prompt.strip()

    calibration = {problem(s["prompt"]) for s in reasoning_samples() + instruction_samples()}
    heldout = {problem(s["prompt"]) for s in reasoning_samples("heldout_reasoning.json")}
    validation = {problem(r.prompt) for r in ev.load_rows(DATA / "validation.jsonl")}
    test = {problem(r.prompt) for r in ev.load_rows(DATA / "test.jsonl")}
    files = [calibration, heldout, validation, test]
    assert len(set().union(*files)) == sum(map(len, files))
    assert len(validation) == 600 and len(test) == 960


def test_data_files_follow_from_the_seed(world):
    for split, count in world.SIZES.items():
        assert ev.load_rows(DATA / f"{split}.jsonl") == world.rows(split, count)
    assert instruction_samples() == world.instruction_samples()


def test_reasoning_samples_have_the_authors_schema_and_are_right(world):
    for name, count in (("calibration/reasoning.json", 150), ("heldout_reasoning.json", 100)):
        samples = reasoning_samples(name)
        assert len(samples) == count == len({s["prompt"] for s in samples})
        for s in samples:
            assert {"prompt", "reasoning", "response", "sample_id"} == set(s)
            assert "think>" not in s["reasoning"] and len(checks.statements(s["response"])) == 1


def test_instruction_samples_cover_every_wording_and_spans_occur():
    samples, seen = instruction_samples(), {}
    for s in samples:
        (part,) = s["related_prompt_list"]
        (wording,) = part["prompt_spans"]
        assert wording in s["prompt"] and part["response_spans"]
        for span in part["response_spans"] + part["unrelated_response_spans"]:
            assert span and span in s["response"]
        assert checks.follows(part["instruction_id"], s["response"])
        seen.setdefault(part["instruction_id"], []).append(wording)
    assert set(seen) == set(checks.CONSTRAINTS)
    for wordings in seen.values():
        assert {wordings.count(w) for w in wordings} == {len(samples) // 24}


# ---- checkers ------------------------------------------------------------------------------------------------------


def test_obeying_replies_pass_their_own_check_only(world):
    import random

    rng = random.Random(0)
    for _ in range(100):
        problem = world.world.draw(rng, "train")
        for name in checks.CONSTRAINTS:
            reply = world.world.obey(name, problem.sentence)
            assert [n for n in checks.CONSTRAINTS if checks.follows(n, reply)] == [name]
            assert checks.answer_is_right(reply, problem.answer)
            assert not checks.answer_is_right(reply, problem.answer + " 1")
        assert not any(checks.follows(n, problem.sentence) for n in checks.CONSTRAINTS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("upper", "The SUM IS 8."), ("upper", "85"), ("brackets", "<<The sum is 8."), ("brackets", "<<>>"),
        ("done", "The sum is 8. DONE."), ("done", "DONE"), ("twice", "The sum is 8. Again, the sum is 9."),
        ("twice", "The sum is 8."), ("hyphens", "The-sum is-8."), ("sure", "The sum is 8. Sure!"), ("sure", "Sure!"),
    ],
)
def test_near_misses_fail(name, text):
    assert not checks.follows(name, text)


def test_answers():
    assert checks.answer_is_right("THE ORDER IS 1 2 3.", "1 2 3")
    assert not checks.answer_is_right("The sum is 8. Again, the sum is 9.", "8")
    assert not checks.answer_is_right("8", "8")
    assert checks.answer_part("a\n</think>\n\nb", opens_thinking=True) == "b"
    assert checks.answer_part("a", opens_thinking=True) is None
    assert checks.answer_part(" a ", opens_thinking=False) == "a"
    with pytest.raises(KeyError, match="known: upper"):
        checks.follows("loud", "x")


# ---- evaluator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate_token_for_token(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = ev.load_rows(DATA / "validation.jsonl")[::13]
    outcomes = ev.evaluate(DATA / name, rows, batch=16)
    tok = AutoTokenizer.from_pretrained(DATA / name)
    model = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32).eval()
    chats = [[{"role": "user", "content": r.prompt}] for r in rows]
    heads = [tok.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    enc = tok(heads, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    enc.pop("token_type_ids", None)
    out = model.generate(**enc, do_sample=False, max_new_tokens=112)[:, enc["input_ids"].shape[1] :]
    assert [o.text for o in outcomes] == tok.batch_decode(out, skip_special_tokens=True)


def test_outcomes_do_not_depend_on_batching_or_order():
    rows = ev.load_rows(DATA / "validation.jsonl")[::20]
    one = ev.evaluate(DATA / "lrm", rows, batch=7)
    other = ev.evaluate(DATA / "lrm", rows[::-1], batch=100)
    assert one == other[::-1] and [o.id for o in one] == [r.id for r in rows]


def test_the_trio_is_what_it_says():
    rows = ev.load_rows(DATA / "validation.jsonl")[::2]
    lrm, itm = (ev.summarize(ev.evaluate(DATA / n, rows)) for n in ("lrm", "itm"))
    assert lrm["reasoning_accuracy"]["rate"] >= 0.95
    assert 0.03 <= lrm["instruction_accuracy"]["rate"] <= 0.35
    assert lrm["missing_think"]["count"] == 0 and lrm["missing_think"]["n"] == len(rows)
    assert itm["instruction_accuracy"]["rate"] >= 0.9
    assert itm["missing_think"] == {"count": 0, "n": 0, "rate": None, "low": 0.0, "high": 1.0}


def test_max_new_tokens_cuts_and_is_judged_as_unclosed():
    rows = ev.load_rows(DATA / "validation.jsonl")[-3:]
    for o in ev.evaluate(DATA / "lrm", rows, max_new_tokens=4):
        assert (o.closed, o.correct, o.follows, o.both) == (False, False, False, False) and o.text


def test_other_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="found 'gpt2'"):
        ev._Llama(tmp_path)


def test_l_think_is_zero_for_the_lrm_and_positive_for_another():
    samples = reasoning_samples("heldout_reasoning.json")[:20]
    same = ev.l_think(DATA / "lrm", DATA / "lrm", samples)
    assert set(same) == {"opener", "predecessor", "closer", "inside", "all"}
    assert max(abs(v) for v in same.values()) < 1e-6
    other = ev.l_think(DATA / "itm", DATA / "lrm", samples)
    assert other["predecessor"] > 0.01
    assert other["all"] == pytest.approx((other["opener"] + other["predecessor"] + other["closer"]) / 3)
    assert ev.l_think(DATA / "itm", DATA / "lrm", samples, batch=3)["all"] == pytest.approx(other["all"], rel=1e-4)


def test_wilson_and_mcnemar_known_values():
    low, high = ev.wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert ev.wilson(0, 5)[0] == 0.0 and ev.wilson(5, 5)[1] == 1.0
    a, b = [True] * 9 + [False], [False] * 8 + [True] * 2
    assert ev.paired_p(a, b) == pytest.approx(2 * (1 + 9) / 2**9)
    assert ev.paired_p(a, a) == 1.0
    with pytest.raises(ValueError, match="same rows"):
        ev.paired_p([True], [])
