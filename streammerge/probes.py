"""What `streammerge verify` asks of a merge beyond its bytes: does the model of config.json take its tensors, does the
tokenizer spell the markers as it did, what does it write, and what is its L_think.

The model is built on the meta device: shapes without memory. L_think streams both models layer by layer, so it holds
one layer of one of them and the activations of the held-out samples. Only generation loads the whole model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from . import manifest
from .arch import family_of
from .batches import make_batches
from .calibration import CalibrationSet, load_calibration
from .errors import InputError, RecipeError, ResourceError
from .findings import Findings, Problem
from .forward import Stream, StreamedModel
from .io.checkpoint import Checkpoint, resolve_model
from .io.encoded import open_model
from .l_think import think_loss
from .linalg import full_precision
from .markers import answered, find_markers, load_tokenizer, render_prompt
from .memory import format_size, total
from .progress import Progress
from .recipe import Recipe, parse_recipe

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _FLOATS.items()}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_SMALL = 4 << 30  # bytes of weights that a user may be surprised to have loaded
_BATCH = 2048  # tokens; a merge on a CPU takes as many
_SAME = 0.05  # share by which two measurements of one L_think may differ: other batches, another device


def check_model(found: Findings, content: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Every tensor that config.json implies is there in its shape, or tied to one that is; dtypes are the recipe's."""
    config = checkpoint.config
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= len(checkpoint.tensors):  # a model of 10**9 layers is never built
        found.problems.append(Problem("config.json", f"num_hidden_layers is {str(layers)[:40]}",
                                      f"as many layers as {len(checkpoint.tensors)} tensors can make up"))
        return
    try:
        with answered("the model cannot be built", ""):
            settings = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(settings)
    except InputError as error:
        found.problems.append(Problem("config.json", str(error).rstrip("; "), "a model that transformers knows"))
        return
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    alike: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(parameter), set()).add(name)
    tied = {name: names for names in alike.values() for name in names}
    for name, shape in wanted.items():
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != shape:
            found.problems.append(Problem(info.file.name, f"has shape {list(info.shape)}",
                                          f"{list(shape)}, as config.json says", tensor=name))
        elif info is None and not tied.get(name, set()) & checkpoint.tensors.keys():
            found.problems.append(Problem("config.json", "the model wants a tensor that no shard holds", tensor=name))
    spare = sorted(checkpoint.tensors.keys() - wanted.keys())
    if spare:  # the LRM's own: a merge refuses to drop tensors, transformers leaves them out
        found.notes.append(f"{len(spare)} tensors that the model of config.json does not use: {', '.join(spare[:3])}")
    _check_dtypes(found, content, checkpoint)


def _check_dtypes(found: Findings, content: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Merged tensors have the recipe's dtype, all are floats; others than config.json's are told."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    try:
        recipe = _recipe(found, content)
    except RecipeError as error:
        found.problems.append(Problem(manifest.FILE_NAME, f"its recipe cannot be read: {error}"))
        return
    merged, asked = (_merged(recipe, checkpoint), _CODES.get(recipe.dtype)) if recipe else (set(), None)
    for name, info in checkpoint.tensors.items():
        if info.dtype not in _FLOATS:
            found.problems.append(Problem(info.file.name, f"is {info.dtype}", "a float tensor", tensor=name))
        elif name in merged and asked and info.dtype != asked:
            found.problems.append(Problem(info.file.name, f"is {info.dtype}", f"{asked}, the recipe's", tensor=name))
    others = sum(_FLOATS.get(t.dtype) != stated for t in checkpoint.tensors.values())
    if stated in _CODES and others:
        found.notes.append(f"{others} tensors are not {stated}, as config.json says; transformers will convert them")


def _recipe(found: Findings, content: dict[str, Any]) -> Recipe | None:
    """The manifest's recipe, read as strictly as a user's; None for one of mergekit's."""
    if content.get("recipe_kind") == "mergekit":
        return None
    return parse_recipe(yaml.safe_dump(content["recipe"]), str(found.out / manifest.FILE_NAME))


def _merged(recipe: Recipe, checkpoint: Checkpoint) -> set[str]:
    """Names of the tensors that the recipe merges."""
    family = family_of(checkpoint.config, f"{checkpoint.path}/config.json")
    layers = range(checkpoint.config["num_hidden_layers"]) if recipe.layers is None else recipe.layers
    return {family.weight(n, m) for n in layers for m in recipe.modules}


def check_tokenizer(found: Findings, content: dict[str, Any]) -> None:
    """The tokenizer loads, and spells the markers with the ids that the merge noted."""
    if not any((found.out / name).is_file() for name in _TOKENIZERS):
        if content["markers"]:
            found.problems.append(Problem("tokenizer.json", "no tokenizer is here", "the reasoning model's"))
        else:
            found.notes.append("there is no tokenizer here, and the reasoning model had none")
        return
    try:
        tokenizer = _load(found.out)
        for text, ids in content["markers"].items():
            with answered(f"it cannot read {text!r}", ""):
                now = tokenizer.encode(text, add_special_tokens=False)
            if now != ids:
                found.problems.append(Problem("tokenizer.json", f"the marker {text!r} has the ids {now}", str(ids)))
    except InputError as error:
        found.problems.append(Problem("tokenizer.json", str(error).rstrip("; ")))
        return
    if not content["markers"]:
        found.notes.append("the merge noted no thinking markers, so their ids were not compared")


def _load(out: Path):
    with answered("the tokenizer cannot be loaded", ""):
        return AutoTokenizer.from_pretrained(str(out), local_files_only=True, trust_remote_code=False)


def generate(found: Findings, checkpoint: Checkpoint, prompt: str, tokens: int, insist: bool) -> None:
    """Load the model with transformers on the CPU and write `tokens` tokens greedily. ResourceError for a large model,
    unless the user insists."""
    size = sum(t.nbytes for t in checkpoint.tensors.values())
    room = min(_SMALL, total("host") // 2)
    if size > room and not insist:
        raise ResourceError(f"--generate would load {format_size(size)} of weights into memory, more than "
                            f"{format_size(room)}: add --insist if you want that")
    tokenizer = _load(found.out)
    disable_progress_bar()
    with answered(f"{found.out}: transformers cannot load the model", "see the notes above"):
        model = AutoModelForCausalLM.from_pretrained(
            str(found.out), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
        ).eval()
    text = render_prompt(tokenizer, prompt) if tokenizer.chat_template else prompt
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
    with torch.no_grad():
        if not torch.isfinite(model(ids).logits).all():
            found.problems.append(Problem("config.json", "the logits of the prompt are not finite", "finite ones",
                                          "its dtype overflows, or the weights are damaged"))
            return
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=False)
    found.probes["generated"] = {"prompt": text, "text": answer, "tokens": written.shape[1] - ids.shape[1]}


def measure_l_think(found: Findings, content: dict[str, Any], checkpoint: Checkpoint, progress: Progress) -> None:
    """L_think of the merge against the reasoning model that it was made from, on the recipe's held-out samples.

    Compared with the report's where that is there. InputError where the model or the samples are gone or not the same.
    """
    lrm, data = _inputs_of_l_think(found, content)
    family = family_of(lrm.config, f"{lrm.path}/config.json")
    device, dtype = torch.device("cpu"), torch.float32
    model = StreamedModel(lrm, family, device, dtype)
    layers = lrm.config["num_hidden_layers"]
    pair = {c.role: (c, Stream(make_batches(data.heldout, _BATCH), device)) for c in (lrm, checkpoint)}
    with full_precision(device):
        for _, stream in pair.values():
            model.embed(stream)
        progress.start("L_think", 2 * layers * sum(len(s.ids) for s in data.heldout))
        for layer in range(layers):
            prefix = family.layer_prefix(layer)
            for source, stream in pair.values():
                names = [n for n in source.tensors if n.startswith(prefix)]
                weights = {n.removeprefix(prefix): source.read(n).to(dtype) for n in names}
                model.advance(layer, weights, stream, tick=lambda n: progress.advance(n, tokens=n))
        progress.stop()
    tied = lrm.config.get("tie_word_embeddings") or family.head not in lrm.tensors
    head = family.embedding if tied else family.head
    loss = think_loss(model, head, data.heldout, pair[lrm.role][1], pair[checkpoint.role][1])
    lrm.close()
    told = _reported(found.out)
    found.probes["l_think"] = {"now": loss, "report": told, "heldout": len(data.heldout)}
    for name, value in loss.items():
        if name in told and abs(value - told[name]) > _SAME * abs(told[name]) + 1e-6:
            found.problems.append(Problem(manifest.REPORT, f"L_think ({name}) is {told[name]:.3e} there",
                                          f"{value:.3e}, as measured now"))


def _inputs_of_l_think(found: Findings, content: dict[str, Any]) -> tuple[Checkpoint, CalibrationSet]:
    """The reasoning model and the held-out samples, where they are still what they were."""
    recipe = _recipe(found, content)
    where = found.out / manifest.FILE_NAME
    if not recipe or not recipe.calibration.reasoning or not recipe.calibration.holdout:
        raise InputError(f"{where}: the merge kept no samples for L_think (calibration.reasoning, calibration.holdout)")
    told = content["inputs"].get("reasoning_model", {})
    models, paths = _places(found.out)
    recipe = dataclasses.replace(recipe, calibration=dataclasses.replace(recipe.calibration, **paths))
    name = f"{told['repo']}@{told.get('revision')}" if "repo" in told else models["reasoning_model"]
    lrm = open_model(resolve_model(name, "reasoning_model"), "reasoning_model")
    if not manifest.same_headers(manifest.describe_input(lrm), told):
        raise InputError(f"reasoning_model: {lrm.path}: its shards have other sizes or headers than those that were "
                         "merged; L_think compares with that very model: put it back")
    sets = {kind: getattr(recipe.calibration, kind) for kind in ("reasoning", "instruction")}
    if content.get("calibration") != manifest.calibration_files({kind: path for kind, path in sets.items() if path}):
        raise InputError(f"{where}: the calibration files are not those of the merge: L_think would be another; put "
                         f"{recipe.calibration.reasoning} back as it was")
    tokenizer = load_tokenizer(lrm.path)
    markers = find_markers(tokenizer, recipe.thinking, lrm.path)
    limit = lrm.config.get("max_position_embeddings") or 1 << 30
    data = load_calibration(recipe, tokenizer, markers, limit, lrm.path)
    if not data.heldout:
        raise InputError(f"{where}: calibration.holdout leaves no sample for L_think")
    return lrm, data


def _places(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Where the inputs of a merge lay on the machine that made it -> models by role, calibration sets by kind.

    Only the report says so. InputError where it is gone, or says something else.
    """
    file = out / manifest.REPORT
    try:
        told = json.loads(file.read_bytes())
        sets = told["recipe"]["calibration"]
        found = told["models"] | {}, {kind: sets[kind] for kind in ("reasoning", "instruction")}
        if all(isinstance(path, str) for paths in found for path in paths.values()) and "reasoning_model" in found[0]:
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # the error below says what is wanted
    raise InputError(f"{file}: cannot be read, or is none of ours: it alone says where the reasoning model and the "
                     "calibration files lie, which L_think needs: put it back")


def _reported(out: Path) -> dict[str, float]:
    """L_think as the merge measured it, {} where the report is gone or has none."""
    try:
        told = json.loads((out / manifest.REPORT).read_text())["l_think"]
        return {name: float(value) for name, value in told.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
