"""The files that go out with a merge, once its weights are verified: card, recipe and SBOM, as bytes."""

from __future__ import annotations

from typing import Any

import yaml

from ..output import Output
from .card import CONFIG, card
from .card import FILE_NAME as CARD
from .facts import as_written, gather
from .sbom import FILE_NAME as SBOM
from .sbom import sbom

MERGEKIT = "mergekit_config.yml"
_OF_THE_MACHINE = ("budget", "capture_cache", "manifest")  # recipe keys that say nothing of what is made


def release_files(output: Output, manifest: dict[str, Any], result: dict[str, Any]) -> dict[str, bytes]:
    """{name: content}; `manifest` is its content so far, `result` the report. An SBOM wants hashes."""
    files = {CONFIG: _config(output, manifest, result)}
    if output.mergekit:
        files[MERGEKIT] = output.mergekit.encode()
    facts = gather(output, manifest, result)
    if output.card:
        files[CARD] = card(facts)
    if output.sbom and output.hashed:
        files[SBOM] = sbom(facts)
    return files


def _config(output: Output, manifest: dict[str, Any], result: dict[str, Any]) -> bytes:
    """The recipe that makes the same again: every default written out, the batch that was chosen, and what was read."""
    recipe = {key: value for key, value in as_written(output).items() if key not in _OF_THE_MACHINE}
    tokens = result.get("plan", {}).get("tokens_per_batch")
    if tokens and not output.mergekit:
        recipe["budget"] = {"tokens_per_batch": tokens}
    lines = [f"# Made by streammerge {result['streammerge']}. Relative paths are the original recipe's."]
    for role, told in manifest["inputs"].items():
        if "repo" in told:
            lines.append(f"# {role}: {told['repo']}@{told['revision']}")
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return ("\n".join(lines) + "\n" + text).encode()
