"""One vocabulary for models that number their tokens differently: which row of each goes where (tokenizer_source).

The output's tokenizer is one model's, byte for byte. A token that a model lacks takes its row from the only model that
has it, else from the base, else the mean of those that have it, else zero: the rules of mergekit 0.1.5, which also
cuts an embedding to as many rows as the tokenizer has tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StreamMergeError
from ..io.checkpoint import Checkpoint, resolve_model, side_files
from ..jobs import Fill
from ..markers import TOKENIZER_FILES, answered
from .config import Config, Reference, beside


@dataclass(frozen=True)
class Vocabulary:
    """`path`: the directory whose tokenizer the output gets; `rows`: for each model, the row of every token of the
    output (int64 [size], -1: it lacks the token)."""

    path: Path
    size: int
    rows: dict[Reference, np.ndarray]

    def maps(
        self, inputs: Sequence[tuple[Reference, Checkpoint, str]], base: Reference | None
    ) -> list[tuple[np.ndarray | None, tuple[Fill, ...]]]:
        """(rows, fills) of each input (model, its checkpoint, the tensor's key) of one tensor; rows None where the
        tensor is taken as it is stored."""
        rows = np.stack([self.rows[model] for model, _, _ in inputs])
        patterns: dict[tuple[int, ...], list[int]] = {}
        for column in np.flatnonzero((rows < 0).any(axis=0)).tolist():
            patterns.setdefault(self._donors(rows[:, column], inputs, base), []).append(column)
        out = []
        for own, (_, checkpoint, key) in zip(rows, inputs, strict=True):
            fills = []
            for donors, columns in patterns.items():
                lacking = np.array([c for c in columns if own[c] < 0], dtype=np.int64)
                if len(lacking) and donors:
                    fills.append(Fill(lacking, tuple((*inputs[d][1:], rows[d][lacking]) for d in donors)))
            stored = checkpoint.tensors[key].shape[0]
            plain = stored == self.size and np.array_equal(own, np.arange(self.size))
            out.append((None if plain else own, tuple(fills)))
        return out

    @staticmethod
    def _donors(
        rows: np.ndarray, inputs: Sequence[tuple[Reference, Checkpoint, str]], base: Reference | None
    ) -> tuple[int, ...]:
        """Who gives a token's row to those that lack it."""
        having = [i for i, row in enumerate(rows) if row >= 0]
        with_base = [i for i in having if inputs[i][0] == base]
        return tuple(with_base if len(having) > 1 and with_base else having)


def read_vocabulary(config: Config, models: dict[Reference, Checkpoint], problems: list[str]) -> Vocabulary | None:
    """The output's vocabulary where the configuration asks for one. Adds a line to `problems` for all that is wrong."""
    wanted = config.vocabulary
    if wanted is None:
        return None
    wanted = config.references[0] if wanted.name == "base" else wanted
    before = len(problems)
    tokens: dict[Reference, dict[str, int]] = {}
    paths = {model: checkpoint.path for model, checkpoint in models.items()}
    for model in dict.fromkeys((wanted, *models)):
        try:
            paths[model] = paths.get(model) or find_model(model, config)
            tokens[model] = _tokens(paths[model])
        except StreamMergeError as error:
            problems.append(str(error))
    if len(problems) > before:
        return None
    target = tokens[wanted]
    size = len(target)
    if sorted(target.values()) != list(range(size)):
        problems.append(f"{paths[wanted]}: its tokenizer has {size} tokens, with ids up to {max(target.values())}; ids "
                        "with gaps or repeats cannot number the rows of an embedding: use another tokenizer_source")
    multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
    if multiple and size % multiple:
        problems.append(f"{config.source}: tokenizer.pad_to_multiple_of: {multiple}: the {size} tokens would need rows "
                        "that are no token's, and this is not supported; drop the key")
    for model, checkpoint in models.items():
        told = checkpoint.config.get("vocab_size")
        limit = told if type(told) is int else max(tokens[model].values()) + 1
        beyond = [t for t in (target if model != wanted else tokens[model]) if tokens[model].get(t, 0) >= limit]
        if beyond:
            problems.append(f"{checkpoint.path}: {len(beyond)} tokens of its tokenizer, such as {beyond[0][:40]!r}, "
                            f"have ids beyond its vocab_size ({limit}): there are no rows for them")
    if len(problems) > before:
        return None
    names = sorted(target, key=target.__getitem__)
    rows = {m: np.array([tokens[m].get(name, -1) for name in names], dtype=np.int64) for m in models}
    return Vocabulary(paths[wanted], size, rows)


def find_model(model: Reference, config: Config) -> Path:
    """The directory of a model: beside the configuration, in the working directory, or in the Hub cache."""
    found = beside(model.name, config.directory)
    return found or resolve_model(model.name, model.at)


def _tokens(path: Path) -> dict[str, int]:
    """{token: id} as AutoTokenizer loads the directory's tokenizer: local, never remote code. Raises InputError."""
    advice = "tokenizer_source compares the tokenizers of all models: complete its files, or drop tokenizer_source"
    with answered(f"{path}: the tokenizer cannot be loaded", advice):
        from transformers import AutoTokenizer

        if not any(os.path.isfile(path / name) for name in TOKENIZER_FILES):
            raise FileNotFoundError("there is none: looked for " + ", ".join(TOKENIZER_FILES))
        side_files(path)  # a link to somebody's private file is refused before it is read
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return dict(tokenizer.get_vocab())
