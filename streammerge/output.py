"""What a merge writes and what it is made of, whatever kind of plan it follows: the end of a merge needs no more.

A plan gives its `output`; fingerprint, verification, report, manifest and release files (release/) take that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .io.checkpoint import Checkpoint
from .io.shards import OutTensor

EPOCH = "SOURCE_DATE_EPOCH"


def source_date() -> int | None:
    """SOURCE_DATE_EPOCH, None where it is not set: no other date gets into a file. Raises RecipeError where it is no
    count of seconds."""
    raw = os.environ.get(EPOCH, "")
    if not raw:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", raw):
        raise RecipeError(f"{EPOCH} is {raw[:40]!r}: wanted whole seconds since 1970, or the variable unset")
    return int(raw)


@dataclass(frozen=True)
class Output:
    """A whole output. `recipe` is JSON-able and resolved, its local paths as this machine has them; `names` gives for
    such a path what the user wrote, where that was something else.

    `inputs`: {role: checkpoint} in the recipe's order, each checkpoint once. `donor`: the input whose tokenizer,
    template and licence are copied. `copies`: {tensor of the output: the input and the name of the tensor whose bytes
    it has}; all others are computed. `sides`: {file name: the file that is copied, or the bytes that are written}.
    `calibration`: {kind: path}. `mergekit`: a mergekit recipe as its user wrote it, '' for our own. `date`: what its
    files may give as theirs, in seconds since 1970.
    """

    method: str
    recipe: Mapping[str, Any]
    source: str
    inputs: Mapping[str, Checkpoint]
    donor: Checkpoint
    tensors: tuple[OutTensor, ...]
    copies: Mapping[str, tuple[Checkpoint, str]]
    sides: Mapping[str, Path | bytes]
    names: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, str] = field(default_factory=dict)
    mergekit: str = ""
    hashed: bool = True  # manifest, SHA256SUMS and what is made of hashes
    card: bool = True
    sbom: bool = True
    hash_inputs: bool = False  # every byte of them, which is one more reading
    date: int | None = field(default_factory=source_date)

    @property
    def decoded(self) -> list[str]:
        """Those of `copies` that are quantised in their input: values, not bytes, are the input's."""
        return [name for name, (checkpoint, key) in self.copies.items() if key in checkpoint.encoded]
