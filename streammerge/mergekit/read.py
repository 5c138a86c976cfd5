"""From a mergekit YAML to a Config. mergekit ignores a key that it does not know; here every key is either one that the
merge follows or an error with file and line, so that what comes out is what was asked for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

from ..errors import RecipeError, listed
from ..strict import TEXT_LIMIT, build, compose, read_limited
from .checks import contradictions
from .config import Config
from .refused import other_kind


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file. Raises RecipeError that lists every mistake with file and line."""
    path = Path(path)
    try:
        text = read_limited(path, TEXT_LIMIT)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe ({error}); give the path of a YAML file") from None
    return parse_config(text, str(path), path.parent)


def parse_config(text: str, source: str, directory: Path | None = None) -> Config:
    """`load_config` for a text. `directory` resolves relative paths (none: the working directory)."""
    other_kind(text, source)
    node = compose(text, source)
    problems: list[str] = []
    config = build(Config, node, source, "", problems)
    if config is not None:
        directory = (directory or Path.cwd()).absolute()
        config = dataclasses.replace(config, source=source, text=text, directory=directory)
        problems = list(contradictions(config))
    if problems:
        raise RecipeError(listed("The mergekit configuration cannot be followed:", problems))
    return config


def is_mergekit(recipe: str | Path | yaml.MappingNode) -> bool:
    """Whether a recipe is mergekit's (a file, or its top mapping): it has models, slices or modules, or another key
    that only mergekit's commands know, and neither reasoning_model nor instruct_model. False where a file cannot be
    read: the other reader says why."""
    if isinstance(recipe, yaml.MappingNode):
        keys = {key.value for key, _ in recipe.value if isinstance(key, yaml.ScalarNode)}
    else:
        try:
            text = read_limited(Path(recipe), TEXT_LIMIT)
            return is_mergekit(compose(text, str(recipe)))
        except (OSError, UnicodeDecodeError):
            return False
        except RecipeError:  # several documents, or a fragment: their lines tell
            keys = set(re.findall(r"^([a-z_]+)\s*:", text, re.MULTILINE))
    known = {"models", "slices", "modules", "experts", "genome", "tokenizer_source", "tokenizer", "chat_template"}
    return bool(keys & known) and not keys & {"reasoning_model", "instruct_model"}
