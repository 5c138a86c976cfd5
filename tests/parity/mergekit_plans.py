"""Runs under mergekit's own Python: its planner's answer for each configuration of a JSON list, as JSON on stdout.

For every tensor of the output: the models in order with the tensors that are read, the base, all resolved parameters.
With the argument `vocabulary`: embeddings and heads as it permutes them, in the file mergekit.safetensors; with
`names`: what its tables of architectures say of tensors' names.
"""

import json
import sys

import yaml
from mergekit.architecture import get_architecture_info
from mergekit.architecture.json_definitions import JSON_ARCHITECTURES
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import MergeOptions, _model_out_config
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary
from safetensors.torch import save_file


def plan(text):
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    arch = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    out = _model_out_config(config, arch)
    planned = {}
    planner = MergePlanner(config, arch, options=options, out_model_config=out)
    planner._plan()  # what it plans to memory cannot be made in 0.1.5
    for weight, task in planner._tensors:
        gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        loads = {load.model: load for load in gather.arguments().values()}
        planned[weight.name] = {
            "inputs": [[str(m), loads[m]._resolve_name(LoaderCache().get(m))] for m in task.model_order],
            "base": str(task.base_model) if task.base_model else None,
            "parameters": dict(task.parameters.items()),
            "input_parameters": {str(m): dict(p.items()) for m, p in task.input_parameters.items()},
            "dtype": gather.dtype,
            "out_dtype": weight.force_dtype or config.out_dtype,
        }
    return {"tensors": planned, "layers": out.num_hidden_layers}


def vocabulary(text):
    """The inputs of embedding and head, permuted, into one file of tensors 'MODEL/TENSOR'; the output's vocabulary."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions()
    arch = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    planner = MergePlanner(config, arch, options=options, out_model_config=_model_out_config(config, arch))
    planner._plan()
    info, tensors = planner._tokenizer_task.execute(), {}
    for weight, task in planner._tensors:
        if isinstance(task.gather_tensors, PermutedVocabulary):
            gather = task.gather_tensors.gather_tensors
            loaded = gather.execute(**{key: load.execute() for key, load in gather.arguments().items()})
            for model, tensor in task.gather_tensors.execute(tokenizer_info=info, tensors=loaded).items():
                tensors[f"{model}/{weight.name}"] = tensor
    save_file(tensors, "mergekit.safetensors")
    return info.tokenizer.get_vocab()


def names(_):
    """{architecture: tensors before the layers and whether their rows are tokens, those of layer 7, those after}, of
    the causal language models that are one stack."""
    found = {}
    for arch in JSON_ARCHITECTURES:
        causal = all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in arch.architectures)
        if causal and len(arch.modules) == 1:
            (module,) = arch.modules.values()
            told = module.architecture.definition
            if any("layer" in w.name.split(".")[0] for w in told.pre_weights):
                continue  # old phi code, which numbers the embedding and the head as layers too
            tokens = [{w.name: w.vocabulary_axis == 0 for w in ws} for ws in (told.pre_weights, told.post_weights)]
            layer = [w.name.replace("${layer_index}", "7") for w in told.layer_templates.weights]
            found[f"{arch.architectures[0]} {arch.expected_model_type}"] = [tokens[0], layer, tokens[1]]
    return found


def attempt(text):
    answer = {"vocabulary": vocabulary, "names": names}.get(sys.argv[-1], plan)
    try:
        return answer(text)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    answers = [attempt(text) for text in json.load(sys.stdin)]
    print("\n" + json.dumps(answers))
