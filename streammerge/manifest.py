"""What a finished merge consists of: streammerge_manifest.json and SHA256SUMS, written at its end, read to verify it.

The manifest holds nothing that differs between two runs of one merge on one machine: no time, no host name. The report
does (seconds, peaks), so it is named in the manifest without a hash. Each of the two files vouches for the other:
SHA256SUMS lists the manifest, and its other lines follow from the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, ResourceError
from .io.checkpoint import Checkpoint
from .io.disk import sync_folder
from .io.header import JSON_LIMIT, read_json, strict_json
from .markers import PROFILES
from .output import Output
from .release.facts import origin, published, stored_hash
from .report import FILE_NAME as REPORT
from .scan import dealt, file_pieces, opened, scan
from .threads import usable_cores

FILE_NAME = "streammerge_manifest.json"
SUMS = "SHA256SUMS"
SCHEMA = 1
# recipe keys that the model does not depend on
_FREE = ("budget", "allow_unchanged", "capture_cache", "manifest", "card", "sbom", "hash_inputs")
_ORIGINS = {"instruct_model", "reasoning_model", "base_model"}  # told under `inputs`, which know a cache from a path


def write(note: Callable[[str], Path], content: dict[str, Any]) -> None:
    """Write both files beside a checkpoint that was verified; ResourceError where the disk refuses.

    `note` gives the path of a name in OUT and sees to its removal on an error; `content`: `describe`, with all files.
    """
    raw = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    place(note, SUMS, sums(content["files"], raw))
    place(note, FILE_NAME, raw)


def describe(output: Output, result: dict[str, Any]) -> dict[str, Any]:
    """The manifest's content; `result` is the report. No path of this machine is in it."""
    recipe = {key: value for key, value in published(output).items() if key not in _FREE}
    ids = result["calibration"].get("marker_ids") or added_markers(output.donor.path)
    return {
        "schema": SCHEMA,
        "streammerge": result["streammerge"],
        "versions": result["versions"],
        "device": device_name(result["device"]),
        "compute_dtype": result["compute_dtype"],
        "files": result["verified"]["files"],
        "unhashed": [REPORT],
        "tensors": result["tensors"],
        "markers": ids,
        "calibration": calibration_files(output.calibration),
        "inputs": {role: describe_input(c, whole=output.hash_inputs) for role, c in output.inputs.items()},
        "recipe": recipe,
        "recipe_kind": "mergekit" if output.mergekit else "streammerge",
        "recipe_sha256": recipe_hash(recipe),
    }


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Of what the recipe asks for; where the models lie is the inputs' matter."""
    asked = {key: value for key, value in recipe.items() if key not in _ORIGINS}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def device_name(device: str) -> str:
    """'cpu', or a GPU by its model: results have the bits of a kind of device, not of its number."""
    if not device.startswith("cuda"):
        return device
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})"


def added_markers(path: Path) -> dict[str, list[int]]:
    """{marker: its token id} of the first known family whose markers tokenizer.json adds as tokens, else {}.

    For merges without calibration, which neither look for markers nor import transformers.
    """
    try:
        added = {t["content"]: t["id"] for t in read_json(path / "tokenizer.json").get("added_tokens", ())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # no tokenizer, or one that only a loader can judge: there are no ids to compare later
    for profile in PROFILES:
        if profile.open in added and profile.close in added:
            return {text: [added[text]] for text in (profile.open, profile.close)}
    return {}


def describe_input(checkpoint: Checkpoint, whole: bool = False) -> dict[str, Any]:
    """Where an input came from, and every shard's size and header hash. A shard's own SHA256 is told where the Hub's
    cache keeps it by that, and of all with `whole`, for which all of them are read again."""
    shards: dict[str, dict[str, Any]] = {}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        try:
            with file.open("rb") as stream:
                prefix = stream.read(8)
                header = stream.read(int.from_bytes(prefix, "little"))
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise InputError(f"{checkpoint.role}: {file}: was read and can no longer be: {error.strerror}: is "
                             "something else changing the checkpoint?") from error
        hashed = hashlib.sha256(prefix + header).hexdigest()
        known = "" if whole else stored_hash(file)
        shards[file.name] = {"size": size, "header_sha256": hashed} | ({"sha256": known} if known else {})
    if whole:
        with opened(sorted({info.file for info in checkpoint.tensors.values()})) as digests:
            scan(dealt(map(file_pieces, digests.values()), usable_cores()))
            for name, digest in digests.items():
                shards[name]["sha256"] = digest.hexdigest()
    return origin(checkpoint.path) | {"files": shards}


def same_headers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two `describe_input` have the same shards, by their sizes and headers."""

    def known(told: dict[str, Any]) -> dict[str, Any]:
        return {name: (entry.get("size"), entry.get("header_sha256")) for name, entry in told.get("files", {}).items()}

    return known(one) == known(other)


def calibration_files(sets: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{kind: file name and SHA256} of calibration sets by their paths, "" for one that cannot be read."""
    found = {}
    for kind, path in sets.items():
        try:
            hashed = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            hashed = ""
        found[kind] = {"name": Path(path).name, "sha256": hashed}
    return found


def sums(files: dict[str, dict[str, Any]], manifest: bytes) -> bytes:
    """SHA256SUMS: every hashed file, and the manifest."""
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    hashes[FILE_NAME] = hashlib.sha256(manifest).hexdigest()
    return checksums(hashes)


def checksums(hashes: Mapping[str, str]) -> bytes:
    """{file name: SHA256} as `sha256sum -c` reads it."""
    return "".join(_sum_line(name, hashes[name]) for name in sorted(hashes)).encode()


def _sum_line(name: str, digest: str) -> str:
    """coreutils escapes a name that holds a backslash, and says so by a backslash in front."""
    return f"\\{digest}  {name.replace(chr(92), chr(92) * 2)}\n" if "\\" in name else f"{digest}  {name}\n"


def place(note: Callable[[str], Path], name: str, content: bytes) -> None:
    """A small file beside a finished checkpoint; ResourceError where the disk refuses."""
    partial, final = note(name + ".partial"), note(name)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, final)
        sync_folder(final.parent)
    except OSError as error:
        raise ResourceError(f"{partial}: cannot be written: {error.strerror}; free some space, merge again") from None


def read(out: Path) -> tuple[dict[str, Any], bytes]:
    """OUT's manifest -> (content, raw bytes), its form checked. InputError where there is none, ValueError where it is
    damaged."""
    file = Path(out) / FILE_NAME
    try:
        with file.open("rb") as stream:
            raw = stream.read(JSON_LIMIT)
    except OSError as error:
        why = "no such file" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else error.strerror
        raise InputError(f"{file}: {why}: wanted the output of a finished `streammerge merge`, which has a "
                         "manifest; there is nothing to compare this directory with") from None
    content = strict_json(raw)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {str(content.get('schema'))[:20]}, this version reads {SCHEMA}")
    files, markers = content.get("files"), content.get("markers")
    if not isinstance(files, dict) or not files or not all(_is_entry(*item) for item in files.items()):
        raise ValueError("files must map plain file names to a size and a sha256")
    if not isinstance(markers, dict) or not all(_is_ids(ids) for ids in markers.values()):
        raise ValueError("markers must map texts to lists of token ids")
    if not isinstance(content.get("unhashed"), list) or not all(_is_name(n) for n in content["unhashed"]):
        raise ValueError("unhashed must be a list of file names")
    inputs = content.get("inputs")
    if not isinstance(inputs, dict) or not all(map(_is_input, inputs.values())):
        raise ValueError("inputs must map roles to objects, and their files names to objects")
    if not isinstance(content.get("recipe"), dict):
        raise ValueError("recipe must be an object")
    return content, raw


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def _is_entry(name: str, entry: Any) -> bool:
    if not _is_name(name) or not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
        return False
    size, digest = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest))


def _is_input(told: Any) -> bool:
    files = told.get("files", {}) if isinstance(told, dict) else None
    return isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())


def _is_ids(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
