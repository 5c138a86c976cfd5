"""Markers: what the LRM's own template and tokenizer say, and what happens where they say nothing."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streammerge.errors import InputError, RecipeError
from streammerge.markers import PROFILES, find_markers, load_tokenizer, render_prompt
from streammerge.recipe import Thinking

PLAIN = "{% for m in messages %}U:{{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
OPENING = PLAIN.replace("A:{%", "A:<think>\n{%")
SPLITTING = "{# answers drop what stands between <think> and its closer #}" + PLAIN


def make_tokenizer(template=PLAIN, special=(), alphabet=None):
    """A byte-level BPE without merges: one token a byte, and `special` texts as single tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=list(special),
    )
    core.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


def test_opener_at_the_end_of_the_generation_prompt(tmp_path):
    found = find_markers(make_tokenizer(OPENING), Thinking(), tmp_path)
    assert (found.open, found.close, found.opener_in_prompt) == ("<think>", "</think>", True)
    assert (found.after_open, found.before_close, found.after_close) == ("\n", "\n", "\n\n")
    assert "generation prompt" in found.evidence


def test_prompt_evidence_beats_the_vocabulary(tmp_path):
    tokenizer = make_tokenizer(PLAIN.replace("A:{%", "A:<seed:think>{%"), ["<think>", "</think>"])
    found = find_markers(tokenizer, Thinking(), tmp_path)
    assert found.open == "<seed:think>" and found.opener_in_prompt


def test_opener_in_the_template_source_is_emitted_by_the_model(tmp_path):
    found = find_markers(make_tokenizer(SPLITTING), Thinking(), tmp_path)
    assert found.open == "<think>" and not found.opener_in_prompt and "source" in found.evidence


def test_opener_in_the_rendered_system_prompt(tmp_path):
    template = "S:{{ '[THI' + 'NK]' }} first\n" + PLAIN  # only rendering shows it
    found = find_markers(make_tokenizer(template), Thinking(), tmp_path)
    assert found.close == "[/THINK]" and not found.opener_in_prompt and "rendered" in found.evidence


def test_vocabulary_needs_opener_and_closer(tmp_path):
    found = find_markers(make_tokenizer(PLAIN, ["<thought>", "</thought>"]), Thinking(), tmp_path)
    assert found.open == "<thought>" and "vocabulary" in found.evidence
    with pytest.raises(InputError):
        find_markers(make_tokenizer(PLAIN, ["<thought>"]), Thinking(), tmp_path)


def test_a_closer_that_other_families_use_proves_nothing(tmp_path):
    with pytest.raises(InputError):
        find_markers(make_tokenizer(PLAIN + "{# <|end|> #}", ["<|end|>"]), Thinking(), tmp_path)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.open)
def test_every_profile_is_found_from_a_template_that_opens_with_it(profile, tmp_path):
    template = PLAIN.replace("A:{%", "A:" + profile.open + profile.after_open + "{%")
    found = find_markers(make_tokenizer(template), Thinking(), tmp_path)
    assert (found.open, found.close, found.opener_in_prompt) == (profile.open, profile.close, True)


def test_no_evidence_names_the_file_what_was_looked_for_and_the_keys(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError) as error:
        find_markers(make_tokenizer(), Thinking(), tmp_path)
    text = str(error.value)
    assert error.value.exit_code == 3
    for part in (str(tmp_path / "tokenizer.json"), "<think>", "[THINK]", "thinking.open", "thinking.close"):
        assert part in text


def test_hybrid_templates_are_asked_to_think(tmp_path):
    for switch in ("enable_thinking", "thinking"):
        tail = "A:{% if SWITCH is defined and SWITCH %}<think>\n{% else %}</think>{% endif %}".replace("SWITCH", switch)
        found = find_markers(make_tokenizer(PLAIN.replace("A:", tail)), Thinking(), tmp_path)
        assert found.opener_in_prompt


def test_a_template_that_ends_the_thinking_is_an_error(tmp_path):
    tokenizer = make_tokenizer(PLAIN.replace("A:{%", "A:<think>\n\n</think>\n\n{%"))
    with pytest.raises(InputError, match="after its thinking"):
        find_markers(tokenizer, Thinking(), tmp_path)


def test_named_markers_may_be_ordinary_text(tmp_path):
    found = find_markers(make_tokenizer(), Thinking(open="<<hm", close="hm>>"), tmp_path)
    assert (found.open, found.close, found.opener_in_prompt) == ("<<hm", "hm>>", False)
    assert "recipe" in found.evidence


def test_a_named_marker_is_completed_from_its_family(tmp_path):
    one = find_markers(make_tokenizer(), Thinking(open="[THINK]"), tmp_path)
    other = find_markers(make_tokenizer(), Thinking(close="[/THINK]"), tmp_path)
    assert (one.open, one.close, one.after_open) == (other.open, other.close, other.after_open)
    assert (one.close, one.after_open) == ("[/THINK]", "")


@pytest.mark.parametrize("thinking", [Thinking(open="<hm>"), Thinking(close="</hm>"), Thinking(open=" ", close="x")])
def test_half_a_pair_of_markers_is_a_recipe_error(thinking, tmp_path):
    with pytest.raises(RecipeError, match="thinking.open|thinking.close"):
        find_markers(make_tokenizer(), thinking, tmp_path)


def test_markers_that_the_tokenizer_cannot_spell(tmp_path):
    core = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", chat_template=OPENING)
    with pytest.raises(InputError, match="thinking.open"):  # unknown tokens
        find_markers(words, Thinking(), tmp_path)
    letters = make_tokenizer(OPENING)
    letters.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(InputError, match="cannot spell.*HM"):  # known tokens, but other text comes back
        find_markers(letters, Thinking(open="<HM>", close="</HM>"), tmp_path)


def test_load_tokenizer_reads_a_local_directory(tmp_path):
    make_tokenizer(OPENING, ["<think>"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.is_fast and render_prompt(tokenizer, " hé ") == "U:hé\nA:<think>\n"


def test_load_tokenizer_errors_name_the_directory(tmp_path):
    with pytest.raises(InputError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "nowhere")
    # transformers makes up an empty tokenizer for such a directory
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (bare / "chat_template.jinja").write_text(OPENING)
    with pytest.raises(InputError, match="bare: no tokenizer here"):
        load_tokenizer(bare)
    broken = tmp_path / "broken"
    make_tokenizer(OPENING).save_pretrained(broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="broken: the tokenizer cannot be loaded"):
        load_tokenizer(broken)
    silent = tmp_path / "silent"
    make_tokenizer(None).save_pretrained(silent)
    with pytest.raises(InputError, match="silent: .*chat template"):
        load_tokenizer(silent)


def test_load_tokenizer_wants_offsets(tmp_path, monkeypatch):
    make_tokenizer(OPENING).save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(InputError, match="offsets"):
        load_tokenizer(tmp_path)
