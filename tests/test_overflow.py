"""Numbers at the edge: overflow, switches that lower the precision, mixed dtypes, and the floor of a covariance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import recipe_text, save_trio
from safetensors.torch import load_file, save_file

from streammerge import linalg, memory, merge, parse_recipe, sdpa, sweep
from streammerge.arch import HeadLayout
from streammerge.attention import AttentionMass
from streammerge.bases import SiteBasis
from streammerge.batches import Batch
from streammerge.calibration import Instruction, InstructionSample
from streammerge.compose import LayerAlpha, compose
from streammerge.errors import InputError, RecipeError
from streammerge.pipeline import pick_device
from streammerge.planned import make_plan
from streammerge.sdpa import AttentionInputs

CPU = torch.device("cpu")


def rewrite(path, change) -> None:
    """Every tensor of a checkpoint through change(name, tensor)."""
    for file in path.glob("*.safetensors"):
        save_file({n: change(n, t) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def hot(tmp_path_factory):
    """A trio whose second layer has attention scores beyond fp16, though every weight fits."""
    paths = save_trio(tmp_path_factory.mktemp("hot"), "llama")
    rewrite(paths["lrm"], lambda n, t: t * 3e4 if "1.self_attn.q_proj" in n or "1.self_attn.k_proj" in n else t)
    return paths


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_attention_that_overflows_is_an_error_and_no_uniform_alpha(hot, sets, tmp_path, scope):
    extra = {"compute_dtype": "float16", "basis": {"rank": "none"}, "coefficients": {"scope": scope}}
    with pytest.raises(InputError, match="attention masses.*compute_dtype: float32"):
        merge(parse_recipe(recipe_text(hot, sets, **extra), "test.yml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_l_think_that_overflows_is_an_error(hot, sets, tmp_path):
    extra = {"compute_dtype": "float16", "basis": {"rank": "none"}, "coefficients": {"rule": "uniform"}}
    with pytest.raises(InputError, match="held-out samples.*compute_dtype: float32"):
        merge(parse_recipe(recipe_text(hot, sets, **extra), "test.yml"), tmp_path / "out")


def test_masses_that_are_not_finite():
    sample = InstructionSample("s", (1, 2, 3), (Instruction("i", (0,), (2,), ()),))
    observer = AttentionMass([sample], [Batch(torch.tensor([[1, 2, 3]]), (3,), (0,))], 2, "token")
    q = torch.full((1, 2, 3, 4), float("inf"))
    observer.on_attention(0, AttentionInputs(q, torch.ones(1, 1, 3, 4), 1.0, None))
    with pytest.raises(InputError, match="compute_dtype"):
        observer.result()


def test_weights_that_overflow_the_output_dtype_are_the_users_to_mend(make_recipe, tmp_path):
    recipe = dataclasses.replace(make_recipe(dtype="float16"), lam=1e9)
    with pytest.raises(InputError, match="overflow float16.*lower lambda"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_dtype_that_config_json_contradicts_is_told(make_recipe):
    assert not [w for w in make_plan(make_recipe()).warnings if "config.json" in w]
    told = make_plan(make_recipe(dtype="bfloat16")).warnings
    assert any("written as bfloat16" in w and "load them as float32" in w for w in told)


@pytest.mark.parametrize("double", [0, 1, 2])
def test_one_model_in_float64(double):
    """Mixed dtypes merge in the widest of the three."""
    three = [torch.randn(6, 10, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    u = torch.linalg.qr(torch.randn(10, 3, generator=torch.Generator().manual_seed(9)))[0]
    bases, layout = (SiteBasis(u, 1.0, 3),), HeadLayout(2, 1, 3)
    alpha = LayerAlpha.uniform(1.0, layout)
    wanted, _ = compose("q", *three, bases, alpha, layout, 0.7, torch.float32)
    three[double] = three[double].double()
    found, told = compose("q", *three, bases, alpha, layout, 0.7, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert told.leak < 1e-5


# ---- precision switches


@pytest.mark.parametrize("lower", ["old switch", "new switch"])
def test_products_are_full_fp32_whatever_the_process_set(make_recipe, tmp_path, monkeypatch, lower):
    """TF32 and autocast would break ‖Δ⊥ U‖ <= 1e-5 ‖Δ U‖; the caller's settings come back afterwards."""
    seen = []
    plain = sweep.compose

    def spy(*args):
        seen.append((torch.backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return plain(*args)

    monkeypatch.setattr(sweep, "compose", spy)
    try:
        if lower == "old switch":
            torch.set_float32_matmul_precision("medium")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = merge(make_recipe(), tmp_path / "out")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("ieee", False)}
    assert report["totals"]["leak"] < 1e-5


# ---- the floor of a covariance


def outlier(width: int, tail: int, share: float) -> torch.Tensor:
    """Rows with one dominating direction and `tail` directions of energy `share` of it, as language models have."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(width, tail + 1, generator=generator))[0]
    left = torch.linalg.qr(torch.randn(2 * width, tail + 1, generator=generator))[0]
    return 40 * (left * torch.tensor([1.0] + [share**0.5] * tail)) @ directions.T


@pytest.mark.parametrize("share", [1e-4, 1e-5])
def test_a_dominating_direction_does_not_hide_the_others_from_a_covariance(share):
    h = outlier(1024, 300, share)
    cov = torch.zeros(1024, 1024)
    for part in h.split(64):
        cov.addmm_(part.T, part)
    assert linalg.numerical_rank(linalg.exact_covariance(cov), is_cov=True) == 301
    found = linalg.randomized(cov, 400, torch.Generator().manual_seed(1), is_cov=True, oversample=16, iterations=2)
    assert linalg.numerical_rank(found, is_cov=True) == 301


# ---- the CUDA path, as far as a CPU can tell


@pytest.mark.parametrize("grouped", [True, False])
def test_heads_are_repeated_where_sdpa_has_no_lean_kernel_for_groups(any_trio, monkeypatch, grouped):
    from test_forward import Sample, streamed

    _, paths = any_trio
    wanted = streamed(paths["lrm"], [Sample(40, 1)], torch.float32)[1].stash.fetch(0)
    asked = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa, "_reads_grouped_heads", lambda query: grouped)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **k: asked.append(k.get("enable_gqa", False)) or plain(*a, **k))  # fmt: skip
    found = streamed(paths["lrm"], [Sample(40, 1)], torch.float32)[1].stash.fetch(0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(asked) == 3 and (grouped or not any(asked))


def test_a_pass_holds_the_activations_of_its_own_streams_only(make_recipe, tmp_path, monkeypatch):
    """In the survey the instruction set's, in the merging pass all others': never both at once."""
    held = []
    plain = {name: getattr(sweep, name) for name in ("survey_layer", "merge_layer")}

    def look(name):
        def looking(run, *args):
            held.append((name, {n for n, s in run.streams.named().items() if s.stash.nbytes}))
            return plain[name](run, *args)

        return looking

    for name in plain:
        monkeypatch.setattr(sweep, name, look(name))
    merge(make_recipe(), tmp_path / "out")
    others = {"reasoning", "reference", "verification"}
    assert held == [("survey_layer", {"instruction"})] * 3 + [("merge_layer", others)] * 3


def test_the_meter_of_a_numbered_device_is_reset_after_cuda_has_started(monkeypatch):
    """torch refuses the reset of cuda:N with 'did you call init?' in a process that has not touched CUDA yet."""
    called = []
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append(str(device)))
    memory.reset_device_peak(torch.device("cuda:1"))
    memory.reset_device_peak(CPU)
    assert called == ["init", "cuda:1"]


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_nothing_was_written_for(name):
    with pytest.raises(RecipeError, match="cpu and cuda"):
        pick_device(name)
