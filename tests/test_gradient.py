"""Gradients and filters: mergekit 0.1.5's own answers (mergekit.config.evaluate_setting with pydantic's validators)."""

from __future__ import annotations

import pytest

from streammerge.gradient import place, read_setting, resolve, scalars, to_bool, to_float, to_int, to_text, written

Q, U, H = "model.layers.1.self_attn.q_proj.weight", "model.layers.10.mlp.up_proj.weight", "lm_head.weight"
BY_MODULE = [{"filter": "mlp", "value": [0, 1]}, {"filter": "q_proj", "value": 0.2}, {"value": 0.7}]
KINDS = {"float": to_float, "int": to_int, "bool": to_bool, "str": to_text}

# setting, tensor, t, type, what mergekit 0.1.5 returns
MERGEKIT = [
    (0.3, Q, 0.5, "float", 0.3),
    (True, Q, 0.5, "float", 1.0),
    ("1e-3", Q, 0.5, "float", 0.001),
    ([0, 0.5, 1], Q, 0.25, "float", 0.25),
    ([0.1, 0.7], Q, 1 / 3, "float", 0.3),
    ([0.2, 0.9, 0.4, 0.1], U, 10 / 23, "float", 0.7478260869565219),
    ([0.4], U, 0.7, "float", 0.4),
    ([0.1, 0.9], H, 0, "float", 0.1),
    ([0.1, 0.9], U, 1.0, "float", 0.9),
    ([False, True], Q, 0.5, "float", 0.5),
    ([], Q, 0.5, "float", None),
    (BY_MODULE, Q, 0.25, "float", 0.2),
    (BY_MODULE, U, 0.25, "float", 0.25),
    (BY_MODULE, H, 0, "float", 0.7),
    ([{"filter": "*", "value": 0.1}, {"filter": "q_proj", "value": 0.2}], Q, 0.25, "float", 0.1),
    ([{"filter": "mlp", "value": 0.1}], Q, 0.25, "float", None),
    ({"filter": "layers.1", "value": 0.1}, U, 0.25, "float", 0.1),  # a part of layers.10, too
    ([{"filter": "layers.1.", "value": []}, {"value": 2}], Q, 0.25, "float", None),  # the first that fits, even empty
    ([{"filter": "", "value": 1}], "", 0.25, "float", None),
    ([1, 2, 5], Q, 0.5, "int", 2),
    ("2.0", Q, 0.5, "int", 2),
    ([True, False, False], Q, 0.49, "bool", True),
    ([True, False, False], Q, 0.5, "bool", False),
    ("off", Q, 0.5, "bool", False),
    (["a", "b", "c"], Q, 0.99, "str", "b"),
    (["a", "b", "c"], Q, 1.0, "str", "c"),
]


@pytest.mark.parametrize(("raw", "name", "t", "kind", "wanted"), MERGEKIT)
def test_as_mergekit(raw, name, t, kind, wanted):
    found = resolve(read_setting(raw), name, t, KINDS[kind])
    assert found == wanted
    assert type(found) is type(wanted)


def test_place_of_a_layer():
    assert [place(i, 4) for i in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert place(0, 1) == 1.0  # mergekit's t where a slice has one layer: the last element


@pytest.mark.parametrize("raw", [None, [None], [[1]], [0.5, {"value": 1}], {"filter": "mlp"}, {"value": {"a": 1}},
                                 {"value": 1, "filters": "mlp"}, {"value": 1, "filter": 3}])  # fmt: skip
def test_what_is_no_setting(raw):
    with pytest.raises(ValueError):
        read_setting(raw)


@pytest.mark.parametrize(("kind", "value"), [
    ("float", "a"), ("float", ""), ("float", float("inf")), ("float", "nan"), ("float", 10**400), ("float", "0x10"),
    ("int", 2.5), ("int", "5."), ("int", "5E2"), ("int", 2**63), ("bool", 2), ("bool", " true"), ("str", 1),
])  # fmt: skip
def test_what_is_no_scalar(kind, value):
    """All but infinities, NaN and huge numbers are refused by mergekit, too."""
    with pytest.raises(ValueError):
        KINDS[kind](value)
    with pytest.raises(ValueError):
        read_setting([{"filter": "mlp", "value": [value]}], KINDS[kind])


def test_round_trip():
    for raw in (0.5, [0, 0.5], BY_MODULE):
        setting = read_setting(raw)
        assert written(setting) == raw
        assert hash(setting) is not None  # recipes are frozen
    assert written(read_setting({"value": 3})) == [{"value": 3}]
    assert scalars(read_setting(BY_MODULE)) == [0, 1, 0.2, 0.7]
