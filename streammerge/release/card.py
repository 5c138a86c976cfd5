"""The model card: README.md with the metadata that the Hub reads, then what was merged, how, and how to do it again.

Text that comes from elsewhere (names of folders and files, licences) is data: it is quoted in YAML and in Markdown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import yaml

from .facts import Facts

FILE_NAME = "README.md"
CONFIG = "streammerge_config.yml"
_METHODS = {
    "rain": ("RAIN-Merging", ("rain-merging", "arxiv:2602.22538")),
    "task_arithmetic": ("task arithmetic", ("task-arithmetic",)),
}
_ROLES = {"reasoning_model": "reasoning model", "instruct_model": "instruction-tuned model", "base_model": "base"}


def card(facts: Facts) -> bytes:
    """The whole file."""
    metadata = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=1 << 16)
    parts = [f"# {_title(facts)}", *_body(facts)]
    return f"---\n{metadata}---\n\n{chr(10).join(parts)}\n".encode()


def front_matter(facts: Facts) -> dict[str, Any]:
    """The card's metadata, in the keys of the Hub."""
    output = facts.output
    config = output.donor.config
    made_of = [_as_id(facts.shown(role)) for role in output.inputs]
    data: dict[str, Any] = {"base_model": list(dict.fromkeys(made_of)), "base_model_relation": "merge"}
    data |= facts.licence.metadata
    data["library_name"] = "transformers"
    if any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        data["pipeline_tag"] = "text-generation"
    more = _METHODS.get(output.method, ("", (output.method.replace("_", "-"),)))[1]
    data["tags"] = ["merge", "streammerge", *more]
    sets = [told["name"] for told in facts.manifest["calibration"].values()]
    return data | ({"datasets": sets} if sets else {})


def _body(facts: Facts) -> Iterator[str]:
    """Paragraphs and tables, a line each."""
    yield ""
    yield _what(facts)
    yield from ("", "## Models", "", "| role | model | revision | licence |", "|---|---|---|---|")
    for role in facts.output.inputs:
        told, says = facts.manifest["inputs"][role], facts.stated[role]
        revision = f"`{told['revision']}`" if "revision" in told else "a local directory"
        licence = f"{_code(says.told)}, {_code(says.source)}" if says.licence else "not stated"
        yield f"| {_ROLES.get(role, _code(role))} | {_code(facts.shown(role))} | {revision} | {licence} |"
    yield from ("", f"Licence: {_text(facts.licence.why)}")
    yield from _calibration(facts)
    yield from _measured(facts)
    recipe = yaml.safe_dump(facts.manifest["recipe"], sort_keys=False, allow_unicode=True)
    yield from ("", "## Recipe", "", *_fenced("yaml", recipe))
    yield from _again(facts)


def _title(facts: Facts) -> str:
    names = [_text(facts.shown(role).rpartition("/")[2]) for role in facts.output.inputs]
    method = _METHODS.get(facts.output.method, (_text(facts.output.method),))[0]
    return f"A merge of {', '.join(names[:-1])} and {names[-1]} ({method})" if len(names) > 1 else (
        f"A merge of layers of {names[0]} ({method})")


def _what(facts: Facts) -> str:
    tensors = facts.result["tensors"]
    donor = _code(facts.shown(facts.output.donor.role))
    others = ", ".join(_code(name) for name, side in facts.output.sides.items() if not isinstance(side, bytes))
    if facts.output.method == "rain":
        how = ("Made by [RAIN-Merging](https://arxiv.org/abs/2602.22538): the task vector of the instruction-tuned "
               "model is added to the reasoning model, projected onto the null space of the features at the thinking "
               f"tokens and scaled per attention head, with λ = {_lambda(facts)}.")  # fmt: skip
    elif facts.output.mergekit:
        how = f"Made by the method {_code(facts.output.method)}, without data."
    else:
        how = f"Made by task arithmetic: θ_R + λ (θ_I − θ_B), λ = {_lambda(facts)}, without projection."
    return (f"{how} {tensors['merged']} tensors are merged, {tensors['copied']} are byte copies. Byte copies of "
            f"files of {donor}: {others}.")  # fmt: skip


def _lambda(facts: Facts) -> str:
    """A number, or a word for the recipe's gradients and filters."""
    value = facts.output.recipe["lambda"]
    return str(value) if isinstance(value, (int, float)) else "as the recipe has it, by layer or module"


def _calibration(facts: Facts) -> Iterator[str]:
    sets, notes = facts.manifest["calibration"], facts.result["calibration"]
    if not sets:
        return
    yield from ("", "## Calibration", "", "| set | file | SHA256 | samples |", "|---|---|---|---|")
    for kind, told in sets.items():
        samples = notes[kind]["samples"] if kind in notes else "–"
        yield f"| {kind} | {_code(told['name'])} | `{told['sha256']}` | {samples} |"
    if notes["heldout"]:
        yield from ("", f"{notes['heldout']} of the reasoning samples were held out, for L_think alone.")


def _measured(facts: Facts) -> Iterator[str]:
    """α, norms and L_think; what was not measured is left out."""
    told, lines = facts.result, []
    if facts.output.method == "rain":
        alpha, norms = told["alpha"], told["totals"]
        lines += [
            f"- α over all query heads: {alpha['min']:.4f} to {alpha['max']:.4f}, mean {alpha['mean']:.4f}; "
            f"{alpha['share_at_bounds']:.1%} at a bound",
            f"- of the task vector's norm {norms['kept_over_delta']:.4f} is left by the projection, "
            f"{norms['applied_over_delta']:.4f} is applied",
        ]
    if told.get("l_think"):
        values = ", ".join(f"{_text(where)} {value:.4e}" for where, value in told["l_think"].items())
        lines.append("- L_think, the KL divergence from the reasoning model in nats at the thinking positions of "
                     f"held-out samples: {values}")  # fmt: skip
    if lines:
        yield from ("", "## What was measured", "", *lines)


def _again(facts: Facts) -> Iterator[str]:
    """How to make the same bytes."""
    told, tokens = facts.result, facts.result.get("plan", {}).get("tokens_per_batch")
    command = f"streammerge merge {CONFIG} OUT"
    if tokens or told["device"] != "cpu":  # layers ran: their last bits follow the device, its threads
        command += f" --device {told['device'].partition(':')[0]}"
        command += f" --threads {told['threads']}" if told.get("threads") and told["device"] == "cpu" else ""
    if told.get("seed"):
        command += f" --seed {told['seed']}"
    versions = {"streammerge": told["streammerge"], **told["versions"]}
    yield from ("", "## How to make it again", "", *_fenced("bash", command), "")
    yield (f"with {', '.join(f'{name} {version}' for name, version in versions.items())}, on "
           f"{_text(facts.manifest['device'])}. Paths in `{CONFIG}` are as its user wrote them.")  # fmt: skip
    if facts.output.hashed:
        yield ("`streammerge_manifest.json` has the revisions, sizes and header hashes of the inputs, and size and "
               "SHA256 of every file here: `sha256sum -c SHA256SUMS` or `streammerge verify` compares them.")
    if facts.output.date is not None:
        yield f"\nDate: {time.strftime('%Y-%m-%d', time.gmtime(facts.output.date))}."


def _as_id(name: str) -> str:
    """A name in the characters of a Hub id, which is what `base_model` may hold."""
    return re.sub(r"[^\w./-]", "-", name, flags=re.ASCII)[:96].strip("-./") or "model"


def _text(text: str) -> str:
    """Words of others inside our own: nothing in them is markup."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A name in a table, as it is."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "¦") + "`"


def _fenced(language: str, text: str) -> Iterator[str]:
    """A block of code that its content cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    yield from (fence + language, text.rstrip("\n"), fence)
