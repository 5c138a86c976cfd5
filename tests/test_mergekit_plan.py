"""From a mergekit configuration to jobs: layers, gradients, filters, stacking, ties, dtypes, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from stand_ins import llama_tensors, save, stand_in

from streammerge.errors import InputError, RecipeError
from streammerge.mergekit import make_tensor_plan, parse_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a, b, c: three models of five layers; b stores no head."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        stand_in(root / name, head=name != "b", seed=seed)
    return root


def plan(text: str, folder):
    return make_tensor_plan(parse_config(text, "c.yml", folder))


def jobs(text: str, folder) -> dict:
    return {job.out.name: job for job in plan(text, folder).jobs}


def refused(text: str, folder, error=InputError) -> str:
    with pytest.raises(error) as caught:
        plan(text, folder)
    return str(caught.value)


def slerp(t: str) -> str:
    return f"merge_method: slerp\nbase_model: a\nmodels: [{{model: a}}, {{model: c}}]\nparameters:\n  t: {t}\n"


def passed(*ranges: tuple[str, int, int]) -> str:
    slices = (f"  - sources: [{{model: {m}, layer_range: [{a}, {b}]}}]" for m, a, b in ranges)
    return "merge_method: passthrough\nslices:\n" + "\n".join(slices) + "\n"


def test_a_gradient_runs_over_the_layers_and_the_rest_takes_its_first_element(folder):
    found = jobs(slerp("[0, 1, 0.5]"), folder)
    t = [found[f"model.layers.{i}.mlp.up_proj.weight"].parameters["t"] for i in range(5)]
    assert t == [0.0, 0.5, 1.0, 0.75, 0.5]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert found[name].parameters["t"] == 0.0


def test_filters_are_parts_of_names_and_the_first_that_fits_decides(folder):
    found = jobs(slerp("[{filter: q_proj, value: 0.1}, {filter: self_attn, value: [0, 1]}, {filter: '*', value: 0.3},"
                       " {filter: mlp, value: 0.9}]"), folder)  # fmt: skip
    layer = {n.removeprefix("model.layers.4."): j.parameters["t"] for n, j in found.items() if ".layers.4." in n}
    assert layer["self_attn.q_proj.weight"] == 0.1 and layer["self_attn.k_proj.weight"] == 1.0
    assert layer["mlp.up_proj.weight"] == layer["input_layernorm.weight"] == 0.3


def test_the_nearest_scope_decides_and_a_filter_that_does_not_fit_passes_on(folder):
    text = """\
merge_method: linear
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
        parameters: {weight: {filter: q_proj, value: 5}}
      - {model: c, layer_range: [0, 2]}
    parameters:
      weight: [{filter: mlp, value: 7}, {filter: q_proj, value: 6}]
      normalize: false
parameters:
  weight: 9
"""
    found = jobs(text, folder)

    def weights(name):
        return [s.parameters["weight"] for s in found[name].sources]

    assert weights("model.layers.1.self_attn.q_proj.weight") == [5, 6]
    assert weights("model.layers.1.mlp.up_proj.weight") == [7, 7]
    assert weights("model.embed_tokens.weight") == [9, 9]
    assert not any(job.parameters["normalize"] for job in found.values())


def test_filters_see_the_model_s_own_layer_numbers_and_the_output_s_for_the_merge_itself(folder):
    """mergekit asks per-model settings by the input's name and the merge's own by the output's."""
    text = """\
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: c, layer_range: [3, 5]}]
parameters:
  weight: [{filter: layers.3., value: 2}, {value: 1}]
  normalize: [{filter: layers.0., value: false}, {value: true}]
"""
    found = jobs(text, folder)["model.layers.0.mlp.up_proj.weight"]
    assert [s.key for s in found.sources] == ["model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    assert [s.parameters["weight"] for s in found.sources] == [1, 2] and found.parameters["normalize"] is False


def test_layers_are_stacked_and_renumbered(folder):
    done = plan(passed(("a", 0, 3), ("c", 1, 5)), folder)
    sources = {j.out.name: (j.sources[0].checkpoint.path.name, j.sources[0].key) for j in done.jobs}
    assert sources["model.layers.2.mlp.up_proj.weight"] == ("a", "model.layers.2.mlp.up_proj.weight")
    assert sources["model.layers.3.mlp.up_proj.weight"] == ("c", "model.layers.1.mlp.up_proj.weight")
    assert sources["model.layers.6.mlp.up_proj.weight"] == ("c", "model.layers.4.mlp.up_proj.weight")
    # what comes before the layers is the first slice's, what comes after them the last's
    assert [sources[n][0] for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == list("acc")
    assert done.config["num_hidden_layers"] == 7 and len(done.jobs) == 3 + 7 * 9
    assert json.loads(done.sides["config.json"])["num_hidden_layers"] == 7
    numbers = [int(j.out.name.split(".")[2]) for j in done.jobs if ".layers." in j.out.name]
    assert numbers == sorted(numbers) and done.jobs[0].out.name == "model.embed_tokens.weight"


def test_a_slice_of_one_layer_takes_the_last_element(folder):
    text = passed(("a", 0, 1), ("a", 1, 3)) + "parameters: {scale: [1, 2, 3]}\n"
    scales = [jobs(text, folder)[f"model.layers.{i}.mlp.up_proj.weight"].sources[0].parameters["scale"] for i in
              range(3)]  # fmt: skip
    assert scales == [3, 1, 3]


def test_lists_with_an_entry_a_layer_are_stacked_with_the_layers(tmp_path):
    stand_in(tmp_path / "a", 3, layer_types=["x", "y", "z"])
    stand_in(tmp_path / "b", 2, layer_types=["p", "q"])
    assert plan(passed(("a", 1, 3), ("b", 0, 2)), tmp_path).config["layer_types"] == ["y", "z", "p", "q"]
    stand_in(tmp_path / "c", 2)
    assert "layer_types" in refused(passed(("a", 1, 3), ("c", 0, 2)), tmp_path)


def test_sources_and_base_of_each_kind_of_method(folder):
    task = "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a}, {model: c}]\nparameters: {weight: 1}\n"
    job = plan(task, folder).jobs[5]
    assert [s.checkpoint.path.name for s in job.sources] == ["a", "c"] and job.base.checkpoint.path.name == "b"
    linear = task.replace("task_arithmetic", "linear")
    job = plan(linear, folder).jobs[5]
    assert [s.checkpoint.path.name for s in job.sources] == ["a", "c", "b"] and job.base is None
    assert plan(task, folder).donor.path.name == plan(linear, folder).donor.path.name == "b"
    assert plan(linear.replace("base_model: b\n", ""), folder).donor.path.name == "a"
    roles = [c.role for c in plan(task, folder).inputs]
    assert roles == ["base_model", "models[0].model", "models[1].model"]


def test_parameters_of_the_base_are_told_to_have_no_effect(folder):
    text = slerp("0.5").replace("slerp", "ties").replace("t: 0.5", "weight: 1")
    warned = plan(text.replace("{model: a}", "{model: a, parameters: {weight: 3}}"), folder).warnings
    assert warned == ("c.yml:3: models: parameters of the base have no effect (weight)",)
    assert plan(text, folder).warnings == ()


def test_a_model_that_ties_its_head_gives_its_embedding(folder):
    linear = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    head = jobs(linear, folder)["lm_head.weight"]
    assert [s.key for s in head.sources] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert plan(linear, folder).config["tie_word_embeddings"] is False and not plan(linear, folder).warnings
    swapped = plan(linear.replace("[{model: a}, {model: b}]", "[{model: b}, {model: a}]"), folder)
    assert swapped.config["tie_word_embeddings"] is False  # b says true, and would lose the head
    assert "tie_word_embeddings set to false" in swapped.warnings[0]
    assert "lm_head.weight" not in jobs(passed(("b", 0, 5)), folder)
    lent = plan("base_model: a\n" + passed(("b", 0, 5)), folder)  # a says false, and its head would be random
    assert lent.config["tie_word_embeddings"] is True and "tie_word_embeddings set to true" in lent.warnings[0]


def test_dtypes_are_promoted_cast_or_written_as_asked(tmp_path):
    for name, dtype in (("h", torch.float16), ("b", torch.bfloat16), ("f", torch.float32)):
        stand_in(tmp_path / name, 1, dtype=dtype, torch_dtype="bfloat16")
    text = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"
    for pair, wanted in ((("h", "b"), "F32"), (("b", "b2"), "BF16"), (("h", "f"), "F32")):
        stand_in(tmp_path / "b2", 1, dtype=torch.bfloat16)
        assert {j.out.dtype for j in plan(text % pair, tmp_path).jobs} == {wanted}
    promoted = plan(text % ("h", "b"), tmp_path)
    assert promoted.config["torch_dtype"] == "bfloat16" and "tensors are written as float32" in promoted.warnings[0]
    cast = plan(text % ("h", "b") + "dtype: float16\n", tmp_path)
    assert {(j.dtype, j.out.dtype) for j in cast.jobs} == {("F16", "F16")} and cast.config["torch_dtype"] == "float16"
    out = plan(text % ("h", "b") + "dtype: float32\nout_dtype: bfloat16\n", tmp_path)
    assert {(j.dtype, j.out.dtype) for j in out.jobs} == {("F32", "BF16")} and out.config["torch_dtype"] == "bfloat16"


def test_nothing_is_edited_where_nothing_changes(folder):
    done = plan(passed(("a", 0, 5)), folder)
    assert done.sides["config.json"] == folder / "a/config.json"
    assert done.text.startswith("merge_method") and done.output.mergekit == done.text


BROKEN = {
    "missing tensor": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
                       "x has no tensor model.layers.1.mlp.up_proj.weight; a has one"),
    "extra tensor": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}),
                     "a has no tensor model.layers.0.self_attn.q_proj.bias; x has one"),
    "extra loose tensor": (lambda t: t.update({"score.weight": torch.zeros(8)}), "a has no tensor score.weight; x has"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "x has no tensor model.norm.weight; a has one"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.zeros(9)}), "has shape [9]; a has [8]"),
    "vocabulary": (lambda t: t.update({"model.embed_tokens.weight": torch.zeros(40, 8)}),
                   "has shape [40, 8]; a has [32, 8]; the vocabularies differ: set tokenizer_source to base"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.zeros(8, dtype=torch.int64)}), "is I64; a has F32"),
    "fp8": (lambda t: t.update({"model.norm.weight": torch.zeros(8).to(torch.float8_e4m3fn)}), "is F8_E4M3"),
    "gap": (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "model.layers.1 is missing, there is"),
    "layers beyond": (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(16, 8)}),
                      "config.json says num_hidden_layers: 3, the tensors model.layers.… have 4 layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named(name, tmp_path):
    stand_in(tmp_path / "a", 3)
    tensors, (damage, says) = llama_tensors(3), BROKEN[name]
    damage(tensors)
    save(tmp_path / "x", tensors, num_hidden_layers=3)
    linear = "merge_method: linear\nmodels: [{model: a}, {model: x}]\nparameters: {weight: 1}\n"
    assert says in refused(linear, tmp_path)


def test_everything_that_does_not_fit_is_in_one_message(tmp_path):
    stand_in(tmp_path / "a", 3)
    tensors = llama_tensors(3)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.zeros(9)
    tensors.pop("lm_head.weight")
    tensors.pop("model.embed_tokens.weight")
    save(tmp_path / "x", tensors)
    message = refused("merge_method: linear\nmodels: [{model: a}, {model: x}]\nparameters: {weight: 1}\n", tmp_path)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert f"x has no tensor {name}" in message
    tensors = llama_tensors(3)
    tensors |= {"model.norm.weight": torch.zeros(9), "model.layers.2.input_layernorm.weight": torch.zeros(7)}
    save(tmp_path / "x", tensors)
    message = refused("merge_method: linear\nmodels: [{model: a}, {model: x}]\nparameters: {weight: 1}\n", tmp_path)
    assert "[9]" in message and "[7]" in message


def test_models_that_cannot_be_merged_at_all(tmp_path, folder):
    stand_in(tmp_path / "a", 3)
    stand_in(tmp_path / "q", 3, quantization_config={})
    stand_in(tmp_path / "m", 3, model_type="mistral")
    stand_in(tmp_path / "long", 4)
    linear = "merge_method: linear\nmodels: [{model: a}, {model: %s}]\nparameters: {weight: 1}\n"
    assert "full-precision" in refused(linear % "q", tmp_path)
    assert "model_type 'mistral', models[0].model has 'llama'" in refused(linear % "m", tmp_path)
    message = refused(linear % "long", tmp_path)
    assert "not as many in all models (a has 3, long has 4): choose them with slices and layer_range" in message
    message = refused(passed(("a", 0, 5), ("a", 2, 6)), folder)
    assert "slices[1].sources[0].layer_range ends at 6; a has 5 layers" in message
    message = refused(linear % "org/gone" + "base_model: lost\n", tmp_path)
    assert "org/gone" in message and "lost" in message and "c.yml:2" in message


def test_eight_bit_floats_are_refused_though_all_models_have_them(tmp_path):
    tensors = llama_tensors(1) | {"model.norm.weight": torch.ones(8).to(torch.float8_e4m3fn)}
    for name in "ac":
        save(tmp_path / name, tensors)
    message = refused(slerp("0.5"), tmp_path)
    assert "model.norm.weight" in message and "is F8_E4M3; give a checkpoint in BF16, F16, F32, F64" in message


def test_parameters_that_fit_only_some_tensors(folder):
    text = slerp("{filter: mlp, value: 0.5}")
    message = refused(text, folder, RecipeError)
    assert "t has no value: no filter fits" in message and "(model.embed_tokens.weight and " in message
    linear = "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, 0]}}, {model: b}]\n"
    plain, linear = linear, linear + "parameters: {weight: 0}\n"
    assert "the weights sum to 0" in refused(linear, folder, RecipeError)
    assert "(model.layers.4." in refused(linear, folder, RecipeError)
    assert plan(plain + "parameters: {weight: 0, normalize: false}\n", folder).jobs
    della = "merge_method: della\nbase_model: a\nmodels: [{model: c}]\n"
    della += "parameters: {weight: 1, density: %s, epsilon: %s}\n"
    for density, epsilon in ((0.75, 0.25), (0.25, 0.25)):
        says = f"density {density} and epsilon {epsilon}: density ± epsilon must lie between 0 and 1"
        assert says in refused(della % (density, epsilon), folder, RecipeError)
    assert plan(della % (0.5, 0.4), folder).jobs and plan(della % (1, 0.4), folder).jobs
    karcher = "merge_method: karcher\nmodels: [{model: a}, {model: c}]\nparameters: {max_iter: [1, 2]}"
    assert "max_iter: wanted a whole number below 2**63 in every layer" in refused(karcher, folder, RecipeError)


def test_buffers_that_models_compute_are_left_out_and_told(tmp_path):
    tensors = llama_tensors(2) | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    save(tmp_path / "old", tensors)
    stand_in(tmp_path / "new", 2)
    done = plan("merge_method: linear\nmodels: [{model: old}, {model: new}]\nparameters: {weight: 1}\n", tmp_path)
    assert not any("inv_freq" in job.out.name for job in done.jobs)
    assert "2 buffers that models compute when they are loaded are left out" in done.warnings[0]


def test_integers_are_copied_where_all_models_agree(tmp_path):
    for name, value in (("a", 3), ("b", 3), ("c", 4)):
        save(tmp_path / name, llama_tensors(1) | {"model.steps": torch.tensor([value])})
    linear = "merge_method: linear\ndtype: bfloat16\nmodels: [{model: a}, {model: %s}]\nparameters: {weight: 1}\n"
    job = jobs(linear % "b", tmp_path)["model.steps"]
    assert (job.method, job.out.dtype, len(job.sources)) == ("passthrough", "I64", 1)
    assert "model.steps" in plan(linear % "b", tmp_path).output.copies
    assert "c: model.steps is I64, which cannot be merged, and differs" in refused(linear % "c", tmp_path)


@pytest.mark.parametrize("layer", ["transformer.h.", "gpt_neox.layers.", "transformer.blocks.", "decoder.layers."])
def test_layers_of_any_family(layer, tmp_path):
    tensors = {f"{layer}{i}.mlp.weight": torch.ones(2, 2) for i in range(12)}
    for name in "ab":
        save(tmp_path / name, {**tensors, "transformer.wte.weight": torch.ones(4, 2), "ln_f.weight": torch.ones(2)},
             num_hidden_layers=12)  # fmt: skip
    found = jobs(slerp("[0, 1]").replace("model: c", "model: b"), tmp_path)
    assert found[f"{layer}11.mlp.weight"].parameters["t"] == 1 and found["ln_f.weight"].parameters["t"] == 0
    assert list(found)[0] == "transformer.wte.weight" and list(found)[-1] == "ln_f.weight"


def test_two_stacks_have_gradients_of_their_own_and_cannot_be_sliced(tmp_path):
    tensors = llama_tensors(3) | {f"visual.blocks.{i}.mlp.weight": torch.ones(2) for i in range(5)}
    for name in "ac":
        save(tmp_path / name, tensors)
    found = jobs(slerp("[0, 1]"), tmp_path)
    assert found["visual.blocks.2.mlp.weight"].parameters["t"] == 0.5
    assert found["model.layers.2.mlp.up_proj.weight"].parameters["t"] == 1
    assert "slices need models with one stack of layers" in refused(passed(("a", 0, 2)), tmp_path)
