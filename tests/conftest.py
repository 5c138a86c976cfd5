"""Fixtures: trios and calibration sets, made once a session."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow a busy machine tenfold

import pytest
from builders import FAMILIES, recipe_text, save_trio, write_sets

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it, merges included


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_trio(request, tmp_path_factory):
    """(family, paths of base, itm and lrm), for each of the four families; fp32, sharded."""
    return request.param, save_trio(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    """A Llama trio: grouped-query attention, tied embeddings."""
    return save_trio(tmp_path_factory.mktemp("trio"), "llama")


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Small calibration sets: {'reasoning': path, 'instruction': path}."""
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture()
def make_recipe(trio, sets):
    """A function of recipe keys that gives the parsed recipe over the Llama trio."""
    from streammerge import parse_recipe

    return lambda **extra: parse_recipe(recipe_text(trio, sets, **extra), "test.yml")


@pytest.fixture()
def one_thread():
    """One thread for each of torch's operators: matrix products then have the same bits wherever they run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M as LRM with two perturbed copies, bf16, sharded; kept in the user's cache between runs."""
    import smollm2

    if smollm2.missing():
        pytest.skip(smollm2.missing())
    return smollm2.smollm2_trio()
