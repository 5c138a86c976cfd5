"""`streammerge verify OUT`: a finished merge against its manifest, without writing a byte.

Every file is read once (scan.py), for its hash and for values that are not finite. Then what no hash can tell: headers
and index by the reader that merges use, tensors against the model that config.json describes, the tokenizer's ids of
the markers (probes.py). All that is wrong is collected. Memory: two pieces of a file a thread, and the model's shapes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import manifest
from .findings import Findings, Problem
from .io.checkpoint import TensorInfo, bad_file, examine
from .io.hub import CODE, OTHER_WEIGHTS
from .progress import Progress
from .scan import dealt, file_pieces, opened, scan
from .threads import usable_cores

_READ_BY_LOADERS = (".safetensors", *CODE, *OTHER_WEIGHTS, ".json", ".jinja", ".model", ".tiktoken")
_REMOVE = "remove it: loaders may read it in place of what was merged"


def check(
    out: Path,
    *,
    quick: bool = False,
    generate: str | None = None,
    tokens: int = 64,
    insist: bool = False,
    l_think: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Verify OUT. `quick` reads no weights: sizes, headers and all other files.

    `generate` is a prompt to answer with `tokens` tokens (`insist`: even with a large model), `l_think` measures it
    anew; both only where all else is in order. InputError where OUT has no manifest, or what L_think needs is gone;
    ResourceError for a model too large to generate with.
    """
    found, progress, threads = Findings(Path(out), quick), progress or Progress("quiet"), threads or usable_cores()
    content, wanted = _read_manifest(found)
    _check_names(found, content, wanted)
    lines: list[str] = []
    checkpoint = examine(found.out, "output", lines)
    for line in lines:
        file, _, what = line.partition(": ")
        found.problems.append(Problem(file, what, advice=""))
    found.tensors = len(checkpoint.tensors)
    with progress, checkpoint:
        _read_files(found, wanted, {} if lines else checkpoint.tensors, threads, progress)
        if content is None or lines:
            return found
        from . import probes  # torch and transformers, not before the plain errors are told

        probes.check_model(found, content, checkpoint)
        probes.check_tokenizer(found, content)
        if found.problems:
            return found
        if generate is not None:
            probes.generate(found, checkpoint, generate, tokens, insist)
        if l_think:
            probes.measure_l_think(found, content, checkpoint, progress)
    return found


def _read_manifest(found: Findings) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """-> the manifest (None where it is damaged) and {file: its size and sha256}, from SHA256SUMS in its absence."""
    file = found.out / manifest.SUMS
    bad = bad_file(found.out, manifest.SUMS)
    listed_sums = {} if bad else _parse_sums(file.read_bytes())
    if bad:
        found.problems.append(Problem(manifest.SUMS, bad.removeprefix(f"{manifest.SUMS}: ")))
    try:
        content, raw = manifest.read(found.out)
    except ValueError as error:
        found.problems.append(Problem(manifest.FILE_NAME, f"is damaged: {error}"))
        hashes = {name: {"sha256": digest} for name, digest in listed_sums.items() if name != manifest.FILE_NAME}
        return None, hashes
    if bad:
        return content, content["files"]
    text = manifest.sums(content["files"], raw)
    mine = _parse_sums(text)
    for name in sorted(mine.keys() | listed_sums.keys()):
        if mine.get(name) == listed_sums.get(name):
            continue
        says = listed_sums.get(name, "nothing")
        if name == manifest.FILE_NAME:
            found.problems.append(Problem(name, f"SHA256 {mine[name]}", f"{says}, as {manifest.SUMS} says"))
        else:
            found.problems.append(Problem(manifest.SUMS, f"for {name} it says {says}",
                                          f"{mine.get(name, 'no such line')}, as the manifest says"))
    if mine == listed_sums and text != file.read_bytes():
        found.problems.append(Problem(manifest.SUMS, "has other bytes than the merge wrote"))
    return content, content["files"]


def _parse_sums(raw: bytes) -> dict[str, str]:
    """Lines of coreutils' format; what is no such line is left out, and is missed by the comparison."""
    lines = (re.fullmatch(r"(\\?)([0-9a-f]{64})  (.+)", line) for line in raw.decode("utf-8", "replace").split("\n"))
    return {m[3].replace("\\\\", "\\") if m[1] else m[3]: m[2] for m in lines if m and "/" not in m[3]}


def _check_names(found: Findings, content: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """What lies in OUT beside the files of the manifest, and what is missing of the rest."""
    unhashed = content["unhashed"] if content else [manifest.REPORT]
    known = {*wanted, *unhashed, manifest.FILE_NAME, manifest.SUMS}
    found.notes += [f"{name} is gone; nothing needs it" for name in unhashed if not (found.out / name).is_file()]
    for path in sorted(found.out.iterdir()):
        name = path.name
        if name in known or name.startswith("."):
            continue
        if path.is_file() and name.lower().endswith(_READ_BY_LOADERS):
            found.problems.append(Problem(name, "is not part of the merge", "no such file", _REMOVE))
        else:
            found.notes.append(f"{name} is not part of the merge")


def _read_files(
    found: Findings, wanted: dict[str, Any], tensors: dict[str, TensorInfo], threads: int, progress: Progress
) -> None:
    """Hash what the manifest lists, and look at every value of `tensors` on the way."""
    shards: dict[str, list[TensorInfo]] = {}
    for info in tensors.values():
        shards.setdefault(info.file.name, []).append(info)
    there = []
    for name in sorted(wanted):
        bad = bad_file(found.out, name)
        if not bad:
            there.append(name)
        elif not any(p.file == name for p in found.problems):  # the reader of headers names some of them, too
            found.problems.append(Problem(name, bad.removeprefix(f"{name}: ").partition(":")[0]))
    with opened(found.out / name for name in there) as digests:
        for name, digest in digests.items():
            size = wanted[name].get("size", digest.size)
            if not digest.error and digest.size != size:
                found.problems.append(Problem(name, f"holds {digest.size} bytes", f"{size}"))
        read = {n: d for n, d in digests.items() if not (found.quick and n.endswith(".safetensors"))}
        found.files, found.nbytes = len(read), sum(d.size for d in read.values())
        progress.start(f"verify {found.out.name}", found.nbytes)
        largest_first = sorted(read.values(), key=lambda d: -d.size)  # the small ones fill the end
        lanes = (file_pieces(d, shards.get(d.file.name, ())) for d in largest_first)
        seen = scan(dealt(lanes, threads), threads, lambda n: progress.advance(n, nbytes=n), forgive=True)
        progress.stop()
        for name, digest in read.items():
            hashed = digest.hexdigest()
            if digest.error:
                found.problems.append(Problem(name, digest.error))
            elif hashed != wanted[name]["sha256"]:
                found.problems.append(Problem(name, f"SHA256 {hashed}", wanted[name]["sha256"]))
    for name in sorted(seen.infinite & tensors.keys()):
        file = tensors[name].file.name
        found.problems.append(Problem(file, "has NaN or infinite values", "finite ones", tensor=name))
