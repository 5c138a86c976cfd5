"""Structured input by hypothesis: what a generator of JSON, YAML and names comes up with either works or is an error of
our own that names the file. Derandomised: the same cases on every run. The byte and JSON mutations are in fuzz/."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.errors import InputError, RecipeError
from streammerge.io.checkpoint import INDEX, open_checkpoint
from streammerge.io.header import encode_header, read_header, tensor_bytes
from streammerge.recipe import load_recipe, parse_recipe, to_yaml
from streammerge.records import Record, read_set

CASES = settings(max_examples=50, derandomize=True, deadline=5000, database=None,
                 suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}

numbers = st.integers() | st.integers(-2, 70) | st.floats() | st.booleans() | st.sampled_from([2**63, 2**64, 10**400])
texts = st.text(max_size=12) | st.sampled_from(["", "..", "/etc/passwd", "\ud800", "\0", "auto", "F32", "a", "~x"])
values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20).filter(str.isprintable)
shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.lists(
    st.tuples(names, st.sampled_from(sorted(SIZES)), shapes), max_size=6, unique_by=lambda t: t[0]
)  # fmt: skip
offsets = st.lists(st.integers(-1, 40) | numbers, max_size=3)
entries = values | st.fixed_dictionaries(
    {"dtype": st.sampled_from([*SIZES, "F4", ""]) | values, "shape": shapes | values, "data_offsets": offsets | values},
    optional={"extra": values},
)


shards = st.sampled_from(["s1", "../s1", "./s1"]) | texts


def as_file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@CASES
@given(tensors)
def test_what_we_write_we_read(listed):
    listed = [(name, code, tuple(shape)) for name, code, shape in listed if name != "__metadata__"]
    raw, starts = encode_header(listed)
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "x.safetensors"
        file.write_bytes(raw + bytes(sum(tensor_bytes(code, shape) for _, code, shape in listed)))
        problems: list[str] = []
        found = read_header(file, problems)
    assert not problems
    assert {n: (t.dtype, t.shape, t.start) for n, t in found.items()} == {n: (c, s, starts[n]) for n, c, s in listed}
    assert all(t.nbytes == tensor_bytes(t.dtype, t.shape) for t in found.values())


@CASES
@given(st.dictionaries(names | texts, entries, max_size=4), st.integers(0, 64))
def test_any_header_is_told_or_adds_up(header, size):
    with tempfile.TemporaryDirectory() as root:
        text = json.dumps(header).encode()
        file = as_file(Path(root) / "x.safetensors", text, bytes(size))
        problems: list[str] = []
        found = read_header(file, problems)
    assert all(p.startswith("x.safetensors: ") and len(p) < 800 for p in problems)
    if not problems:
        spans = sorted((t.start, t.start + t.nbytes) for t in found.values())
        assert sum(t.nbytes for t in found.values()) == size
        assert all(8 + len(text) <= a <= b <= 8 + len(text) + size for a, b in spans)
        assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:], strict=False))


@CASES
@given(values | st.dictionaries(st.sampled_from(["a", "b"]) | texts, shards, max_size=4), st.booleans())
def test_any_index_stays_inside(weight_map, wrapped):
    with tempfile.TemporaryDirectory() as root:
        model = Path(root).resolve() / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        raw, _ = encode_header([("a", "U8", (1,))])
        for place in (model / "s1", model.parent / "s1"):
            place.write_bytes(raw + b"x")
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map} if wrapped else weight_map))
        try:
            with open_checkpoint(model, "base_model") as checkpoint:
                assert all(t.file.resolve().parent == model for t in checkpoint.tensors.values())
        except InputError as error:
            assert str(model) in str(error) and "base_model" in str(error)


@CASES
@given(values)
def test_any_config_is_an_object_or_an_error(config):
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "config.json").write_text(json.dumps(config))
        raw, _ = encode_header([("a", "U8", (1,))])
        (Path(root) / "model.safetensors").write_bytes(raw + b"x")
        try:
            with open_checkpoint(Path(root), "base_model") as checkpoint:
                assert isinstance(checkpoint.config, dict)
        except InputError as error:
            assert "config.json" in str(error) and root in str(error)


KEYS = ["seed", "lambda", "layers", "modules", "dtype", "shard_size", "basis", "thinking", "coefficients", "budget",
        "calibration", "proxy_base", "base_model", "allow_unchanged", "merge_method"]  # fmt: skip
INNER = ["rank", "energy", "size", "oversample", "power_iterations", "before", "random", "open", "rule", "bounds",
         "kappa", "host_memory", "tokens_per_batch", "reasoning", "holdout", "max_tokens"]  # fmt: skip
settings_of = values | st.dictionaries(st.sampled_from(INNER) | texts, values, max_size=3)


@CASES
@given(st.dictionaries(st.sampled_from(KEYS) | texts, settings_of, max_size=4))
def test_any_recipe_is_told_or_survives_being_written(keys):
    models = {"merge_method": "task_arithmetic", "base_model": "b", "instruct_model": "i", "reasoning_model": "r"}
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "recipe.yml"
        file.write_bytes(yaml.safe_dump(models | keys, allow_unicode=True).encode("utf-8", "surrogatepass"))
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            assert str(file) in str(error) and len(str(error)) < 6000
        else:
            assert to_yaml(parse_recipe(to_yaml(recipe), "again")) == to_yaml(recipe)


samples = st.dictionaries(
    st.sampled_from(["prompt", "reasoning", "reason", "response", "id", "related_prompt_list"]) | texts,
    texts | values | st.lists(st.dictionaries(st.sampled_from(["prompt_spans", "response_spans"]), values), max_size=2),
)


@CASES
@given(st.lists(samples, max_size=3) | values, st.sampled_from(["reasoning", "instruction"]), st.booleans())
def test_any_set_gives_records_or_lines_that_name_it(data, kind, as_lines):
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "set.json"
        lines = data if isinstance(data, list) else [data]
        file.write_text("\n".join(map(json.dumps, lines)) if as_lines else json.dumps(data))
        problems: list[str] = []
        found = read_set(str(file), kind, None, problems)
    assert found or problems
    assert all(isinstance(r, Record) and r.prompt.encode() and r.response.encode() for r in found)
    assert all(str(file) in p and len(p) < 800 + len(str(file)) for p in problems)
