"""A CycloneDX 1.6 bill of materials of a merge: its weight files, the models it descends from, what made it.

Only what can be checked is filled in: revisions, sizes, hashes, versions. The serial number follows from the content,
so that the same merge has the same one.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from .facts import Facts

FILE_NAME = "streammerge_sbom.cdx.json"
_SPDX = {
    "apache-2.0": "Apache-2.0", "mit": "MIT", "isc": "ISC", "bsd-2-clause": "BSD-2-Clause", "cc0-1.0": "CC0-1.0",
    "bsd-3-clause": "BSD-3-Clause", "unlicense": "Unlicense", "0bsd": "0BSD", "zlib": "Zlib", "ncsa": "NCSA",
    "postgresql": "PostgreSQL", "cc-by-4.0": "CC-BY-4.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "gpl-3.0": "GPL-3.0-only",
    "cc-by-sa-4.0": "CC-BY-SA-4.0", "agpl-3.0": "AGPL-3.0-only",
}  # fmt: skip
_WEIGHTS = ".safetensors"


def sbom(facts: Facts) -> bytes:
    """The whole file."""
    ancestors = [_ancestor(facts, role) for role in facts.output.inputs]
    sets = [_data_set(kind, told) for kind, told in facts.manifest["calibration"].items()]
    files = [_file(name, told) for name, told in facts.manifest["files"].items() if name.endswith(_WEIGHTS)]
    model = _model(facts, ancestors, sets)
    bom: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": _tools(facts)}, "component": model},
        "components": [*files, *sets],
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": [part["bom-ref"] for part in (*files, *sets)]}],
    }
    if facts.output.date is not None:
        bom["metadata"]["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.output.date))
    bom["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(bom, sort_keys=True)).urn
    return json.dumps(bom, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _model(facts: Facts, ancestors: list[dict[str, Any]], sets: list[dict[str, Any]]) -> dict[str, Any]:
    """The merge itself, with its ancestors and its model card."""
    config, metadata = facts.output.donor.config, facts.licence.metadata
    parameters: dict[str, Any] = {"inputs": [{"format": "text"}], "outputs": [{"format": "text"}]}
    if any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        parameters |= {"task": "text-generation", "modelArchitecture": str(config["architectures"][0])}
    if isinstance(config.get("model_type"), str):
        parameters["architectureFamily"] = config["model_type"]
    if sets:
        parameters["datasets"] = [{"ref": part["bom-ref"]} for part in sets]
    measured = [{"type": f"L_think ({where}), nats", "value": f"{value:.6e}"}
                for where, value in facts.result.get("l_think", {}).items()]  # fmt: skip
    return {
        "type": "machine-learning-model",
        "bom-ref": "merge",
        "name": " + ".join(facts.shown(role).rpartition("/")[2] for role in facts.output.inputs),
        "description": f"A merge of {len(ancestors)} models by {facts.output.method}, made by streammerge",
        **_licences(metadata["license"], metadata.get("license_name", "")),
        "pedigree": {"ancestors": ancestors},
        "modelCard": {"modelParameters": parameters}
        | ({"quantitativeAnalysis": {"performanceMetrics": measured}} if measured else {}),
        "properties": _properties(
            merge_method=facts.output.method,
            recipe_sha256=facts.manifest["recipe_sha256"],
            device=facts.manifest["device"],
            licence=facts.licence.why,
        ),
    }


def _ancestor(facts: Facts, role: str) -> dict[str, Any]:
    """An input: revision, and of its files the hashes that are known without reading all of it again."""
    told, says = facts.manifest["inputs"][role], facts.stated[role]
    found: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": f"input:{role}", "name": facts.shown(role)}
    if "revision" in told:
        found["version"] = told["revision"]
        found["purl"] = f"pkg:huggingface/{told['repo']}@{told['revision'].lower()}"
    files = []
    for name, entry in told["files"].items():
        hashes = {"hashes": [{"alg": "SHA-256", "content": entry["sha256"]}]} if "sha256" in entry else {}
        more = _properties(size=entry["size"], header_sha256=entry["header_sha256"])
        files.append({"type": "file", "bom-ref": f"input:{role}/{name}", "name": name, **hashes, "properties": more})
    return found | _licences(says.licence, says.name) | {"components": files, "properties": _properties(role=role)}


def _data_set(kind: str, told: dict[str, str]) -> dict[str, Any]:
    hashes = {"hashes": [{"alg": "SHA-256", "content": told["sha256"]}]} if told["sha256"] else {}
    return {"type": "data", "bom-ref": f"calibration:{kind}", "name": told["name"], **hashes,
            "properties": _properties(kind=kind)}  # fmt: skip


def _file(name: str, told: dict[str, Any]) -> dict[str, Any]:
    return {"type": "file", "bom-ref": f"file:{name}", "name": name,
            "hashes": [{"alg": "SHA-256", "content": told["sha256"]}],
            "properties": _properties(size=told["size"])}  # fmt: skip


def _tools(facts: Facts) -> list[dict[str, Any]]:
    own = {"type": "application", "name": "streammerge", "version": facts.result["streammerge"]}
    rest = sorted(facts.result["versions"].items())
    return [own, *({"type": "platform" if name == "python" else "library", "name": name, "version": version}
                   for name, version in rest)]  # fmt: skip


def _licences(licence: str, name: str) -> dict[str, Any]:
    """A component's licences, left out where none is known."""
    if licence in _SPDX:
        return {"licenses": [{"license": {"id": _SPDX[licence]}}]}
    shown = name if licence == "other" else licence
    return {"licenses": [{"license": {"name": shown}}]} if shown and shown not in ("unknown", "undetermined") else {}


def _properties(**values: Any) -> list[dict[str, str]]:
    return [{"name": f"streammerge:{key}", "value": str(value)} for key, value in values.items()]
