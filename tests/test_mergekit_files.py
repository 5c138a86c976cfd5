"""What lies beside the tensors of a mergekit merge: tokenizer, template, config; and models of the Hub cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stand_ins import save_words, stand_in

from streammerge.errors import InputError, RecipeError
from streammerge.io.checkpoint import open_checkpoint
from streammerge.jobs import Fill, Source, mapped_rows
from streammerge.mergekit import make_tensor_plan, parse_config

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: 1}\n"
ONE, TWO = "{% for m in messages %}one {{ m.content }}{% endfor %}", "{{ messages[0].content }} and two"


def plan(text: str, folder):
    return make_tensor_plan(parse_config(text, "c.yml", folder))


def refused(text: str, folder, error=InputError) -> str:
    with pytest.raises(error) as caught:
        plan(text, folder)
    return str(caught.value)


@pytest.fixture()
def folder(tmp_path):
    """a, b, c with tokenizers of their own: b has x1 and x2 exchanged, c lacks x4 and has new1; 32 rows each."""
    words = ["unk", "x1", "x2", "x3", "x4"]
    known = {"a": words, "b": ["unk", "x2", "x1", "x3", "x4"], "c": ["unk", "x1", "x2", "x3", "new1"]}
    for seed, (name, vocabulary) in enumerate(known.items()):
        stand_in(tmp_path / name, 1, seed=seed, eos_token_id=seed)
        save_words(tmp_path / name, vocabulary)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": seed}))
        (tmp_path / name / "LICENSE").write_text(f"licence of {name}")
        (tmp_path / name / "README.md").write_text("a card")
    return tmp_path


def embedding(done):
    return next(job for job in done.jobs if job.out.name == "model.embed_tokens.weight")


def test_without_tokenizer_source_nothing_is_looked_at(folder):
    done = plan(LINEAR, folder)
    assert embedding(done).out.shape == (32, 8) and all(s.rows is None for s in embedding(done).sources)
    assert done.sides["tokenizer.json"] == folder / "a/tokenizer.json" and "README.md" not in done.sides
    assert done.sides["LICENSE"] == folder / "a/LICENSE" and done.sides["generation_config.json"].parent.name == "a"


def test_rows_of_a_model_s_tokenizer(folder):
    job = embedding(plan(LINEAR + "tokenizer_source: a\n", folder))
    assert job.out.shape == (5, 8)
    assert [s.rows.tolist() for s in job.sources] == [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, -1]]
    assert [len(s.fills) for s in job.sources] == [0, 0, 1]
    (fill,) = job.sources[2].fills
    assert fill.at.tolist() == [4]
    assert [(donor.path.name, rows.tolist()) for donor, _, rows in fill.donors] == [("a", [4]), ("b", [4])]
    stored = {n: open_checkpoint(folder / n, n).read("model.embed_tokens.weight") for n in "abc"}
    mine = mapped_rows(job.sources[2], 0, 5, torch.float32)
    assert torch.equal(mine[:4], stored["c"][:4])
    assert torch.equal(mine[4], (stored["a"][4] + stored["b"][4]) / 2)


def test_the_base_fills_in_and_so_does_the_only_model_that_has_a_token(folder):
    ties = LINEAR.replace("linear", "ties").replace("models: [{model: a}, ", "base_model: a\nmodels: [")
    job = embedding(plan(ties + "tokenizer_source: base\n", folder))
    (fill,) = job.sources[1].fills
    assert [d[0].path.name for d in fill.donors] == ["a"] and job.base.rows.tolist() == [0, 1, 2, 3, 4]
    job = embedding(plan(ties + "tokenizer_source: c\n", folder))
    assert job.base.rows.tolist() == [0, 1, 2, 3, -1] and job.base.fills[0].donors[0][0].path.name == "c"


def test_the_lender_s_tokenizer_files_are_copied_and_its_ids_told(folder):
    done = plan(LINEAR + "tokenizer: {source: c, pad_to_multiple_of: 5}\n", folder)
    assert done.sides["tokenizer.json"] == folder / "c/tokenizer.json"
    assert done.sides["generation_config.json"] == folder / "c/generation_config.json"
    assert done.sides["LICENSE"] == folder / "a/LICENSE" and done.donor.path.name == "a"
    assert (done.config["vocab_size"], done.config["eos_token_id"]) == (5, 2)
    assert json.loads(done.sides["config.json"]) == done.config
    assert any("vocab_size is 5" in w for w in done.warnings) and any("eos_token_id is 2" in w for w in done.warnings)


def test_the_same_ids_and_as_many_rows_are_taken_as_stored(tmp_path):
    words = [f"w{i}" for i in range(32)]
    for name in "abc":
        stand_in(tmp_path / name, 1)
        save_words(tmp_path / name, words)
    done = plan(LINEAR + "tokenizer_source: base\n", tmp_path)
    assert all(s.rows is None and not s.fills for job in done.jobs for s in job.sources)
    assert done.config["vocab_size"] == 32 and done.sides["config.json"] == tmp_path / "a/config.json"


def test_a_permuted_embedding_is_no_copy(tmp_path):
    words = [f"w{i}" for i in range(32)]
    stand_in(tmp_path / "a", 1)
    save_words(tmp_path / "a", words)
    save_words(tmp_path / "lender", words[::-1])
    text = "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer_source: %s\n"
    copied = {who: set(plan(text % who, tmp_path).output.copies) for who in ("a", "lender")}
    assert copied["a"] - copied["lender"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert embedding(plan(text % "lender", tmp_path)).sources[0].rows.tolist() == list(range(32))[::-1]


def test_a_tokenizer_from_a_model_that_is_not_merged(folder, tmp_path):
    save_words(tmp_path / "lender", ["unk", "x3", "x1"])
    job = embedding(plan(LINEAR + "tokenizer_source: lender\n", folder))
    assert [s.rows.tolist() for s in job.sources] == [[0, 3, 1], [0, 3, 2], [0, 3, 1]]


def test_tokenizers_that_cannot_be_used(folder):
    message = refused(LINEAR + "tokenizer: {source: a, pad_to_multiple_of: 4}\n", folder)
    assert "tokenizer.pad_to_multiple_of: 4: the 5 tokens would need rows that are no token's" in message
    (folder / "b/tokenizer.json").unlink()
    stand_in(folder / "c", 1, vocab_size=4)
    save_words(folder / "c", ["unk", "x1", "x2", "x3", "x4"])
    assert "b: the tokenizer cannot be loaded" in refused(LINEAR + "tokenizer_source: a\n", folder)
    two = LINEAR.replace("{model: b}, ", "")
    assert "1 tokens of its tokenizer, such as 'x4', have ids beyond its vocab_size (4)" in refused(
        two + "tokenizer_source: a\n", folder
    )
    assert "lost" in refused(LINEAR + "tokenizer_source: lost\n", folder)
    told = json.loads((folder / "c/config.json").read_text())
    (folder / "c/config.json").write_text(json.dumps({k: v for k, v in told.items() if k != "vocab_size"}))
    assert plan(two + "tokenizer_source: a\n", folder).config["vocab_size"] == 5
    save_words(folder / "c", [f"x{i}" for i in range(40)])
    message = refused(two + "tokenizer_source: c\n", folder)
    assert "c: model.embed_tokens.weight in " in message and "has 32 rows; its tokenizer has ids up to 39" in message


def test_rows_by_ranges_and_what_no_model_has(folder):
    a, b = (open_checkpoint(folder / n, n) for n in "ab")
    key = "model.embed_tokens.weight"
    fills = (Fill(np.array([1, 4]), ((b, key, np.array([7, 8])),)), Fill(np.array([5]), ()))
    source = Source(a, key, {}, np.array([3, -1, 0, 0, -1, -1]), fills)
    first, second = a.read(key), b.read(key)
    wanted = torch.stack([first[3], second[7], first[0], first[0], second[8], torch.zeros(8)])
    assert torch.equal(mapped_rows(source, 0, 6, torch.float32), wanted)
    for begin in range(6):
        for end in range(begin, 7):
            assert torch.equal(mapped_rows(source, begin, end, torch.bfloat16), wanted[begin:end].bfloat16())
    vector = Source(a, "model.norm.weight", {}, np.array([2, 2, -1]))
    norm = a.read("model.norm.weight")
    assert torch.equal(mapped_rows(vector, 0, 3, torch.float32), torch.stack([norm[2], norm[2], torch.zeros(())]))


def template(done) -> str | None:
    side = done.sides.get("chat_template.jinja")
    return side.decode() if isinstance(side, bytes) else side and side.read_text()


def test_the_template_that_most_models_have(folder):
    for name, text in (("a", TWO), ("b", ONE), ("c", f"  {ONE}\n")):
        (folder / name / "chat_template.jinja").write_text(text)
    assert template(plan(LINEAR, folder)) == TWO
    assert template(plan(LINEAR + "chat_template: auto\n", folder)) == ONE
    (folder / "b/chat_template.jinja").unlink()
    assert template(plan(LINEAR + "chat_template: auto\n", folder)) == TWO  # of equals the first
    told = json.loads((folder / "b/tokenizer_config.json").read_text())
    for form in (ONE, [{"name": "default", "template": ONE}, {"name": "tools", "template": TWO}]):
        (folder / "b/tokenizer_config.json").write_text(json.dumps({**told, "chat_template": form}))
        assert template(plan(LINEAR + "chat_template: auto\n", folder)) == ONE
    for name in "abc":
        (folder / name / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "b/tokenizer_config.json").write_text(json.dumps(told))
    done = plan(LINEAR + "chat_template: auto\n", folder)
    assert template(done) is None and "auto found no template in any model" in done.warnings[0]


def test_a_template_in_the_recipe_is_the_only_one(folder, tmp_path):
    from transformers import AutoTokenizer

    told = json.loads((folder / "a/tokenizer_config.json").read_text())
    (folder / "a/tokenizer_config.json").write_text(json.dumps({**told, "chat_template": TWO}))
    (folder / "a/chat_template.json").write_text("{}")
    done = plan(LINEAR + f"chat_template: '{ONE}'\n", folder)
    assert template(done) == ONE and "chat_template.json" not in done.sides
    assert json.loads(done.sides["tokenizer_config.json"]) == {**told, "chat_template": ONE}
    for name, side in done.sides.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(side if isinstance(side, bytes) else side.read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == ONE


@pytest.mark.parametrize("name, wanted", [
    ("chatml", "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n"),
    ("llama3", "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user"
               "<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
])  # fmt: skip
def test_named_templates(name, wanted, folder, tmp_path):
    from transformers import AutoTokenizer

    save_words(tmp_path / "t", ["unk", "<s>"], template(plan(LINEAR + f"chat_template: {name}\n", folder)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t", bos_token="<s>")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hi "}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == wanted


@pytest.mark.parametrize("written, says", [
    ("alpaca", "chat_template: alpaca is not supported: several formats go by that name"),
    ("mistral", "chat_template: mistral is not supported"), ("exaone", "chat_template: exaone is not supported"),
    ("chatlm", "chat_template is 'chatlm'; wanted auto, chatml, llama3, or the text"),
    ("'{{ short }}'", "chat_template is '{{ short }}'; wanted auto"),
])  # fmt: skip
def test_templates_that_are_refused(written, says, folder):
    assert says in refused(LINEAR + f"chat_template: {written}\n", folder, RecipeError)


def test_a_model_of_the_hub_cache_with_its_revision(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache/models--org--one"
    for commit, ref in (("1" * 40, "main"), ("2" * 40, "v1")):
        stand_in(root / "snapshots" / commit, 1, seed=int(commit[0]))
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    for written, commit in (("org/one", "1"), ("org/one@v1", "2"), ("'{model: {path: org/one, revision: v1}}'", "2")):
        done = plan(LINEAR.replace("{model: b}", f"{{model: {written.strip(chr(39))}}}"), folder)
        assert done.inputs[1].path.name == commit * 40
    assert "org/one@v2" in refused(LINEAR.replace("model: b", "model: org/one@v2"), folder)


def test_paths_are_relative_to_the_configuration(folder, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert plan(LINEAR, folder).donor.path == folder / "a"
    monkeypatch.chdir(folder)
    (tmp_path / "elsewhere").mkdir()
    assert plan(LINEAR, tmp_path / "elsewhere").donor.path.resolve() == folder / "a"
