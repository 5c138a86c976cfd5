"""A LoRA adapter in place of an instruction-tuned model: Δ = s·B·A for each module that it adapts, and no base.

Read from adapter_config.json and the header of adapter_model.safetensors, as peft saves them. s is lora_alpha / r, or
lora_alpha / √r with use_rslora; rank_pattern and alpha_pattern replace r and lora_alpha for the modules they match.
A is [r, in], B is [out, r] (Hu et al., 2022, arXiv 2106.09685). fan_in_fan_out changes nothing: peft ignores it for
linear modules, and all of ours are. What this Δ would leave out or get wrong (DoRA, trained biases or embeddings, whole
modules, initialisations that changed the base…) is refused by its name: nothing of an adapter is ever ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .errors import InputError, listed
from .io.checkpoint import INDEX, Checkpoint, bad_file, resolve_model
from .io.header import TensorInfo, read_header, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INSTEAD = ("What is no plain LoRA: merge it into its base with peft (merge_and_unload, then save_pretrained), and "
            "give that model as instruct_model, with its base as base_model.")  # fmt: skip

# keys of adapter_config.json that say how it was trained, or where, and nothing about Δ
_TOLD = set(
    "peft_version base_model_name_or_path revision task_type auto_mapping inference_mode target_modules "
    "exclude_modules lora_dropout fan_in_fan_out layers_to_transform layers_pattern megatron_config megatron_core "
    "runtime_config loftq_config eva_config corda_config lora_ga_config qalora_group_size ensure_weight_tying".split()
)
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
_REFUSED = {
    "use_dora": "DoRA scales the rows of base + Δ, which an adapter alone does not have",
    "lora_bias": "the biases of lora_B would be left out: only weights are merged",
    "modules_to_save": "modules that were trained whole have no Δ without their base",
    "trainable_token_indices": "trained token embeddings would be left out: only linear modules are merged",
    "alora_invocation_tokens": "an aLoRA works from its invocation tokens on, a merged Δ everywhere",
    "layer_replication": "its layers are not the reasoning model's",
    "target_parameters": "parameters that are no module's weight have another layout",
    "use_qalora": "QA-LoRA pools its inputs: Δ is not B·A",
    "arrow_config": "a router chooses among several adapters for each token",
}
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


@dataclass(frozen=True)
class Factors:
    """Δ = scale · B·A of one module: the adapter's tensors of that name."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """An opened adapter; `tensors` are its own, `config` is its adapter_config.json. `factors`: {path of a module, such
    as model.layers.0.self_attn.q_proj: its Δ}."""

    factors: Mapping[str, Factors] = field(default_factory=dict, repr=False)
    config_name: ClassVar[str] = CONFIG

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module's Δ."""
        found = self.factors[module]
        return self.tensors[found.b].shape[0], self.tensors[found.a].shape[1]


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter_config.json."""
    return os.path.lexists(path / CONFIG)


def is_no_adapter(name: str) -> bool:
    """Whether a recipe's model, a directory or an id in the Hub cache, is there and is no adapter. Where it is not
    there (a recipe can be read without its models) that is for the plan to say."""
    try:
        return not is_adapter(resolve_model(name, "instruct_model"))
    except (InputError, OSError, ValueError):
        return False


def open_adapter(path: Path, role: str) -> Adapter:
    """Read the config and the header of an adapter's directory. InputError lists all that is wrong with it."""
    problems: list[str] = []
    config = _config(path, problems)
    problems += _unsupported(config)
    tensors = _header(path, problems)
    factors = {} if problems else _factors(tensors, config, problems)
    if problems:
        raise InputError(listed(f"{role}: the adapter {path} cannot be merged:", problems, _INSTEAD))
    return Adapter(path, role, tensors, config, factors=factors)


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    bad = bad_file(path, CONFIG)
    if bad:
        problems.append(bad)
        return {}
    try:
        return read_json(path / CONFIG)
    except (OSError, ValueError) as error:
        problems.append(f"{CONFIG}: is not valid JSON: {error}")
        return {}


def _header(path: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """The adapter's tensors, by name."""
    for name in ("model.safetensors", INDEX):
        if os.path.lexists(path / name):
            problems.append(f"{name}: is there beside {CONFIG}: the model or the adapter? Give a directory with one")
            return {}
    if not os.path.lexists(path / WEIGHTS) and os.path.lexists(path / "adapter_model.bin"):
        problems.append("adapter_model.bin: is a pickle, which can run code when loaded: load the adapter in peft and "
                        "save it with save_pretrained(DIR, safe_serialization=True)")
        return {}
    bad = bad_file(path, WEIGHTS)
    if bad:
        problems.append(bad)
        return {}
    return dict(sorted(read_header(path / WEIGHTS, problems).items()))


def _unsupported(config: dict[str, Any]) -> list[str]:
    """What the configuration says that Δ = s·B·A does not, and numbers that are none."""
    if not config:
        return []
    out = []
    if config.get("peft_type") != "LORA":
        return [f"{CONFIG}: peft_type is {_short(config.get('peft_type'))}; wanted LORA"]
    if config.get("bias", "none") != "none":
        out.append(f"{CONFIG}: bias is {_short(config['bias'])}: trained biases would be left out: only weights are "
                   "merged")
    initial = config.get("init_lora_weights")
    if not any(initial is known or (isinstance(known, str) and initial == known) for known in _INITIAL):
        out.append(f"{CONFIG}: init_lora_weights is {_short(initial)}: it may have changed the base, so that B·A is "
                   "not the whole difference (peft converts such adapters: save_pretrained with "
                   "path_initial_model_for_weight_conversion)")
    for key, value in config.items():
        if not value or key in _TOLD or key in _READ:
            continue
        why = _REFUSED.get(key, "this version does not know whether it changes Δ")
        out.append(f"{CONFIG}: {key[:60]} is {_short(value)}: {why}")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            out.append(f"{CONFIG}: {key} is {_short(value)}; wanted a number above 0")
    return out + [p for key in ("rank_pattern", "alpha_pattern") for p in _bad_patterns(key, config.get(key))]


def _bad_patterns(key: str, patterns: Any) -> list[str]:
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        return [f"{CONFIG}: {key} is {_short(patterns)}; wanted a mapping of module names to numbers"]
    out = []
    for pattern, value in patterns.items():
        if type(value) not in (int, float) or not 0 < value < 1e9:
            out.append(f"{CONFIG}: {key}: {_short(pattern)} is {_short(value)}; wanted a number above 0")
        try:
            re.compile(pattern)
            # repeated groups can take for ever, and nobody needs one in the name of a module
            slow = len(pattern) > 200 or bool(re.search(r"\)[*+?{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 4
        except re.error:
            slow = True
        if slow:
            out.append(f"{CONFIG}: {key}: {_short(pattern)} is no simple pattern of module names")
    return out


def _factors(tensors: dict[str, TensorInfo], config: dict[str, Any], problems: list[str]) -> dict[str, Factors]:
    """Every tensor as one half of a pair; what is none is a problem."""
    halves: dict[str, dict[str, str]] = {}
    for key, info in tensors.items():
        found = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not found:
            problems.append(f"{WEIGHTS}: {key[:200]}: {_what(key)}")
        elif len(info.shape) != 2 or info.dtype not in _FLOATS:
            problems.append(f"{WEIGHTS}: {key[:200]} is {info.dtype} {list(info.shape)}; wanted a float matrix")
        else:
            halves.setdefault(found[1], {})[found[2]] = key
    factors = {}
    for module, pair in halves.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            problems.append(f"{WEIGHTS}: {_PREFIX}{module}.lora_{missing}.weight is missing")
            continue
        rank = _matched(config.get("rank_pattern"), module, config["r"])
        alpha = _matched(config.get("alpha_pattern"), module, config["lora_alpha"])
        shapes = tensors[pair["A"]].shape, tensors[pair["B"]].shape
        if shapes[0][0] != rank or shapes[1][1] != rank:
            problems.append(f"{WEIGHTS}: {module}: lora_A is {list(shapes[0])} and lora_B {list(shapes[1])}; by "
                            f"{CONFIG} the rank is {rank}")
        factors[module] = Factors(pair["A"], pair["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))
    if not tensors and not problems:
        problems.append(f"{WEIGHTS}: holds no tensor at all")
    return factors


def _matched(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """The value of the first pattern that fits the end of a module's path, from a dot on."""
    fitting = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fitting, otherwise)


def _what(key: str) -> str:
    """What a tensor that is no half of a pair is."""
    if "lora_magnitude_vector" in key:
        return _REFUSED["use_dora"]
    if "lora_embedding_" in key:
        return "an adapted embedding: only linear modules are merged"
    if "trainable_tokens" in key:
        return _REFUSED["trainable_token_indices"]
    if key.endswith(".bias"):
        return "a trained bias: only weights are merged"
    if ".lora_" in key:
        return f"not a name that peft saves ({_PREFIX}MODULE.lora_A.weight and .lora_B.weight)"
    return "a whole tensor (modules_to_save, or an adapted or resized embedding): without its base it has no Δ"


def unfit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], known: Iterable[str]) -> list[str]:
    """What does not fit a model. `shapes`: of its linear modules' weights, by path; `known`: the paths of those that a
    merge may change."""
    known, out = set(known), []
    for module in adapter.factors:
        if module not in known:
            out.append(f"{adapter.role}: {module[:200]} is adapted, and is no linear module of a decoder layer of the "
                       "reasoning model: only these are merged")
        elif module in shapes and adapter.shape(module) != tuple(shapes[module]):
            out.append(f"{adapter.role}: {module}: Δ = B·A is {list(adapter.shape(module))}; the LRM's weight is "
                       f"{list(shapes[module])}")
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
