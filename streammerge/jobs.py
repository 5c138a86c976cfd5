"""A merge without data as a list of jobs: one for every tensor of the output, each complete in itself.

Who reads a recipe makes them (mergekit/), who runs them knows nothing of recipes (tensorwise.py). Every parameter is
resolved: gradients, filters and defaults have become one value for one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from .io.checkpoint import Checkpoint
from .io.shards import OutTensor
from .output import Output

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Fill:
    """Rows of an output vocabulary that a model lacks, from the models that have them.

    `at`: sorted rows of the output, int64 [n]; `donors`: (checkpoint, key, rows int64 [n]) of each, whose mean is taken
    in their order. A row of no donor is zero.
    """

    at: np.ndarray
    donors: tuple[tuple[Checkpoint, str, np.ndarray], ...]


@dataclass(frozen=True)
class Source:
    """One input of a job: the tensor `key` of a checkpoint, with the method's per-model parameters (weight, …).

    Where `rows` is given the input is not the tensor as it is stored: row i is its row rows[i] (int64; -1: what `fills`
    say for row i, else zero). `mapped_rows` reads it.
    """

    checkpoint: Checkpoint
    key: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = field(default=None, compare=False)
    fills: tuple[Fill, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output.

    `sources` are in recipe order and include the base where the method counts it as an input; `base` is the one that
    task vectors are taken from, or None. `dtype`: the code that inputs are cast to as they are read ('': as stored,
    promoted to a common one). `parameters` are the method's own, under its keywords.
    """

    out: OutTensor
    method: str
    sources: tuple[Source, ...]
    base: Source | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""


@dataclass(frozen=True)
class TensorPlan:
    """A checked merge without data. `donor` lends its side files (tokenizer, template, licence, generation config);
    `config` is what the output's config.json says; `text` the recipe as its user wrote it, `source` its path."""

    text: str
    source: str
    method: str
    inputs: tuple[Checkpoint, ...]
    donor: Checkpoint
    config: Mapping[str, Any]
    sides: Mapping[str, Any]  # name in OUT -> path of the file that is copied, or the bytes that are written
    jobs: tuple[TensorJob, ...]
    warnings: tuple[str, ...] = ()

    @property
    def output(self) -> Output:
        """What the end of the merge needs of it. Bytes are copied where passthrough neither casts nor scales."""
        roles = [c.role for c in self.inputs]
        if len(set(roles)) < len(roles):
            raise ValueError(f"inputs need roles of their own, found {roles}: a bug")
        copied = {job.out.name: job.sources[0] for job in self.jobs if _is_copy(job)}
        return Output(
            method=self.method,
            recipe=yaml.safe_load(self.text),
            source=self.source,
            inputs=dict(zip(roles, self.inputs, strict=True)),
            donor=self.donor,
            tensors=self.tensors,
            copies={name: (source.checkpoint, source.key) for name, source in copied.items()},
            sides=self.sides,
            mergekit=self.text,
        )

    @property
    def tensors(self) -> tuple[OutTensor, ...]:
        """The whole output, in the order of its jobs."""
        return tuple(job.out for job in self.jobs)


def _is_copy(job: TensorJob) -> bool:
    """Nothing is computed: the tensor's bytes are its one source's."""
    if job.method != "passthrough":
        return False
    (source,) = job.sources
    if source.rows is not None:
        return False
    stored = source.checkpoint.tensors[source.key]
    settings = {**job.parameters, **source.parameters}
    return (stored.dtype, stored.shape) == (job.out.dtype, job.out.shape) and job.dtype in ("", stored.dtype) and (
        settings.get("scale", 1) in (1, None)
    )


def mapped_rows(source: Source, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows [begin, end) of an input with a row map -> [end - begin, …] in `dtype`; holds them twice at most.

    Raises InputError where the file has changed.
    """
    import numpy as np
    import torch

    shape = source.checkpoint.tensors[source.key].shape
    out = torch.zeros((end - begin, *shape[1:]), dtype=dtype)
    rows = source.rows[begin:end]
    own = np.flatnonzero(rows >= 0)
    out[torch.from_numpy(own)] = _read_rows(source.checkpoint, source.key, rows[own]).to(dtype)
    for fill in source.fills:
        first, last = np.searchsorted(fill.at, (begin, end))
        if first == last or not fill.donors:
            continue
        total = torch.zeros((last - first, *shape[1:]), dtype=dtype)
        for checkpoint, key, donated in fill.donors:
            total += _read_rows(checkpoint, key, donated[first:last]).to(dtype)
        out[torch.from_numpy(fill.at[first:last] - begin)] = total / len(fill.donors)
    return out


def _read_rows(checkpoint: Checkpoint, key: str, rows: np.ndarray) -> torch.Tensor:
    """Rows of a matrix, or elements of a vector."""
    import torch

    wanted = torch.from_numpy(rows)
    matrix = len(checkpoint.tensors[key].shape) == 2
    return checkpoint.read_rows(key, wanted) if matrix else checkpoint.read(key)[wanted]
