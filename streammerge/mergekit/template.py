"""`chat_template`: the text itself, the name of a format, or `auto`, the one that most of the models have."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..errors import RecipeError
from ..io.checkpoint import side_files

# the formats as the models that they are named after publish them
_NAMED = {
    "chatml": (
        "{%- for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}"
        "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{%- for turn in messages %}{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' }}"
        "{{ turn.content | trim }}<|eot_id|>{%- endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
_SEVERAL = ("alpaca", "exaone", "mistral")  # names that stand for several formats
_CONFIG, _FILE = "tokenizer_config.json", "chat_template.jinja"


def chosen_template(wanted: str, models: Iterable[Path], where: str) -> str | None:
    """The text of the template; None where `auto` finds none at all. Raises RecipeError."""
    if wanted == "auto":
        found = [text.strip() for path in models if (text := template_of(path))]
        return Counter(found).most_common(1)[0][0] if found else None  # of equals the first in the recipe's order
    if wanted in _NAMED:
        return _NAMED[wanted]
    if wanted in _SEVERAL:
        raise RecipeError(f"{where}: chat_template: {wanted} is not supported: several formats go by that name; write "
                          f"the template itself, or auto, or one of {', '.join(_NAMED)}")
    if len(wanted) < 20 or "{" not in wanted:
        raise RecipeError(f"{where}: chat_template is {wanted[:60]!r}; wanted auto, {', '.join(_NAMED)}, or the text "
                          "of a template")
    return wanted


def template_of(path: Path) -> str | None:
    """The chat template of a model's directory, as transformers finds it: the file, else the tokenizer's config, the
    one called default where it has several. None where there is none, or it cannot be read."""
    files = {file.name: file for file in side_files(path)}
    try:
        if _FILE in files:
            return files[_FILE].read_text(encoding="utf-8")
        told = json.loads(files[_CONFIG].read_text(encoding="utf-8")).get("chat_template") if _CONFIG in files else None
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(told, list):
        told = {str(t.get("name")): t.get("template") for t in told if isinstance(t, dict)}
    told = told.get("default") if isinstance(told, dict) else told
    return told if isinstance(told, str) else None


def with_template(sides: dict[str, Path | bytes], text: str) -> dict[str, Path | bytes]:
    """Side files that hold this template and no other: in its own file, which transformers prefers, and in the
    tokenizer's config where that had one, which older programs read."""
    out = {**sides, _FILE: text.encode()}
    out.pop("chat_template.json", None)  # the same for processors of images
    told = sides.get(_CONFIG)
    if isinstance(told, (str, os.PathLike)):
        config = json.loads(Path(told).read_text(encoding="utf-8"))
        if config.get("chat_template"):
            raw = json.dumps({**config, "chat_template": text}, indent=2, ensure_ascii=False)
            out[_CONFIG] = (raw + "\n").encode()
    return dict(sorted(out.items()))
