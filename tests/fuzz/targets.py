"""What is fuzzed: for each target a good input, how it is damaged, and the real entry point that reads it.

A case either works or ends in a StreamMergeError that names its file. What "works" means beyond "no exception" is
checked here too: tensors lie inside their files, a recipe survives being written and read again, nothing of a refused
merge is left.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from builders import FAMILIES, recipe_text, save_trio, write_sets
from safetensors.torch import save_file

from . import mutators as m

RICH = {  # a recipe in which many keys are given
    "layers": "0-1", "modules": ["q", "k", "v", "o"], "lambda": 0.8, "seed": 3, "dtype": "float32", "shard_size": "1MB",
    "basis": {"rank": "energy", "energy": 0.9, "method": "randomized", "oversample": 8, "power_iterations": 1},
    "thinking": {"before": 1, "inside": 1, "after": 0, "random": 2, "min_share": 0.5, "open": "auto"},
    "coefficients": {"rule": "standardized", "scope": "model", "kappa": 0.5, "rho": 1.0, "bounds": [0.0, 2.0]},
    "calibration": {"holdout": 0.2, "limit_reasoning": 6, "limit_instruction": 4, "max_tokens": 400, "on_long": "drop"},
    "budget": {"host_memory": "4GiB", "tokens_per_batch": 256}, "allow_unchanged": True,
}  # fmt: skip


class Target:
    """`case(dice)` damages one copy, runs the entry point, restores, and returns how it went; it raises on a defect."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True)
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        """Which files, and what they hold now."""
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def case(self, dice: random.Random, check: Callable[[Callable[[], None], Path], str]) -> str:
        bad = self.damage(dice)
        good = {file: file.read_bytes() for file in bad}
        try:
            for file, data in bad.items():
                file.write_bytes(data)
            return check(self.run, self.root)
        finally:
            for file, data in good.items():
                file.write_bytes(data)


class Header(Target):
    """One safetensors file, opened and every tensor of it read."""

    def build(self) -> None:
        (self.root / "config.json").write_text("{}")
        self.file = self.root / "model.safetensors"
        tensors = {"a.weight": torch.ones(3, 2), "b": torch.ones(2).bfloat16(), "empty": torch.zeros(0, 4)}
        save_file(tensors | {"scalar": torch.tensor(1)}, self.file, {"format": "pt"})

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        return {self.file: m.mutate_header(self.file.read_bytes(), dice)}

    def run(self) -> None:
        _read_all(self.root)


def _read_all(path: Path) -> None:
    from streammerge.io.checkpoint import open_checkpoint

    with open_checkpoint(path, "base_model") as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert info.file.resolve().is_relative_to(path.resolve()), f"{info.file} is outside"
            assert info.start >= 8 and info.start + info.nbytes <= info.file.stat().st_size
            tensor = checkpoint.read(name)
            assert tensor.nbytes == info.nbytes and tuple(tensor.shape) == info.shape


class Index(Header):
    """The index of a sharded checkpoint; beside the directory lies a file that is none of its business."""

    def build(self) -> None:
        secret = {"a": torch.ones(2), "b": torch.ones(3)}
        save_file(secret, self.root / "secret.safetensors")
        self.model = self.root / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        weight_map = {}
        for n, tensors in enumerate(({"a": torch.ones(2), "c": torch.ones(1)}, {"b": torch.ones(3)}), 1):
            name = f"model-0000{n}-of-00002.safetensors"
            save_file(tensors, self.model / name)
            weight_map |= dict.fromkeys(tensors, name)
        self.file = self.model / "model.safetensors.index.json"
        self.file.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        return {self.file: m.mutate_json(self.file.read_bytes(), dice)}

    def run(self) -> None:
        _read_all(self.model)


class Recipe(Target):
    """A recipe file; what is read must survive being written and read again."""

    def build(self) -> None:
        for name in ("base", "itm", "lrm", "reasoning.json", "instruction.jsonl"):
            (self.root / name).mkdir()
        paths = {name: self.root / name for name in ("base", "itm", "lrm")}
        sets = {"reasoning": self.root / "reasoning.json", "instruction": self.root / "instruction.jsonl"}
        self.file = self.root / "recipe.yml"
        self.file.write_text(recipe_text(paths, sets, **json.loads(json.dumps(RICH))))

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        return {self.file: m.mutate_yaml(self.file.read_bytes(), dice)}

    def run(self) -> None:
        from streammerge.recipe import load_recipe, parse_recipe, to_yaml

        recipe = load_recipe(self.file)
        again = parse_recipe(to_yaml(recipe), str(self.file))
        assert to_yaml(again) == to_yaml(recipe), "it does not survive being written"


class Trio(Target):
    """A small trio with its sets and recipe, for the targets that need a model."""

    family = "llama"

    def build(self) -> None:
        self.models = save_trio(self.root / "trio", self.family, layers=2, hidden=16)
        self.sets = write_sets(self.root, reasoning=6, instruction=4)
        self.file = self.root / "recipe.yml"
        self.file.write_text(recipe_text(self.models, self.sets, **json.loads(json.dumps(RICH))))
        self.tokenizer = None

    def damaged_config(self, dice: random.Random) -> dict[Path, bytes]:
        """config.json of one model, or the same damage in all three: differences among them are found early."""
        files = {role: path / "config.json" for role, path in self.models.items()}
        bad = m.mutate_json(files["lrm"].read_bytes(), dice)
        roles = dice.choice([list(files), list(files), ["lrm"], ["itm"], ["base"]])
        return {files[role]: bad for role in roles}


class Calibration(Trio):
    """Both calibration files, placed on tokens."""

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        kind = dice.choice(list(self.sets))
        mutate = m.mutate_json if kind == "reasoning" else m.mutate_lines
        return {self.sets[kind]: mutate(self.sets[kind].read_bytes(), dice)}

    def run(self) -> None:
        from streammerge.calibration import load_calibration
        from streammerge.markers import find_markers, load_tokenizer
        from streammerge.recipe import load_recipe

        recipe, path = load_recipe(self.file), self.models["lrm"]
        self.tokenizer = self.tokenizer or load_tokenizer(path)
        markers = find_markers(self.tokenizer, recipe.thinking, path)
        data = load_calibration(recipe, self.tokenizer, markers, 4096, path)
        for sample in (*data.reasoning, *data.heldout):
            assert 0 <= min(sample.omega) and max(sample.omega) < len(sample.ids)
        for sample in data.instruction:
            for one in sample.instructions:
                assert max((*one.columns, *one.aligned, *one.unrelated)) < len(sample.ids)
        json.dumps(data.notes)


class Config(Target):
    """config.json of one or all of a trio, of any family: the plan, then the model that transformers builds from it."""

    def build(self) -> None:
        kinds = [type(family, (Trio,), {"family": family}) for family in FAMILIES]
        self.trios = [kind(self.root / kind.family) for kind in kinds]

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        self.trio = dice.choice(self.trios)
        return self.trio.damaged_config(dice)

    def run(self) -> None:
        from streammerge.forward import StreamedModel
        from streammerge.planned import make_plan
        from streammerge.recipe import load_recipe

        plan = make_plan(load_recipe(self.trio.file))
        StreamedModel(plan.lrm, plan.family, torch.device("cpu"), torch.float32)


class Tokenizer(Trio):
    """tokenizer.json, tokenizer_config.json and the chat template."""

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        file = self.models["lrm"] / dice.choice(names)
        mutate = m.mutate_json if file.suffix == ".json" else m.mutate_bytes
        return {file: mutate(file.read_bytes(), dice)}

    def run(self) -> None:
        from streammerge.pipeline import calibrate
        from streammerge.planned import make_plan
        from streammerge.progress import Progress
        from streammerge.recipe import load_recipe

        calibrate(make_plan(load_recipe(self.file)), Progress("quiet"))


class Merge(Trio):
    """The whole merge, any of its input files damaged. A refusal leaves nothing under the output's name."""

    family = "qwen3"

    def damage(self, dice: random.Random) -> dict[Path, bytes]:
        pool = [self.file, *self.sets.values()]
        pool += [p for model in self.models.values() for p in sorted(model.iterdir())]
        file = dice.choice(pool)
        if file.name == "config.json":
            return self.damaged_config(dice)
        data = file.read_bytes()
        by_suffix = {".yml": m.mutate_yaml, ".jsonl": m.mutate_lines, ".json": m.mutate_json, ".jinja": m.mutate_bytes}
        return {file: by_suffix.get(file.suffix, m.mutate_header)(data, dice)}

    def run(self) -> None:
        from streammerge.errors import StreamMergeError
        from streammerge.pipeline import merge
        from streammerge.recipe import load_recipe

        out = self.root / "out"
        try:
            merge(load_recipe(self.file), out)
            assert (out / "streammerge_report.json").is_file()
            assert not [p for p in out.rglob("*") if p.name.endswith(".partial")], "a partial file is left"
        except StreamMergeError:
            left = [p for p in out.rglob("*") if p.is_file() and ".streammerge" not in p.parts] if out.exists() else []
            left = [p for p in left if not p.name.endswith(".partial")]
            assert not left, f"left under final names: {left}"
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)


TARGETS: dict[str, type[Target]] = {
    "header": Header, "index": Index, "recipe": Recipe, "calibration": Calibration, "config": Config,
    "tokenizer": Tokenizer, "merge": Merge,
}  # fmt: skip
