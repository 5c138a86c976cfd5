"""A trio and its sets to be damaged, and the command line over them. `bench` is a fixture: import it by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from builders import recipe_text
from safetensors.torch import load_file, save_file

from streammerge.cli import main


@pytest.fixture()
def bench(tmp_path, trio, sets, capfd):
    """A private copy of a trio and its sets, to be damaged, and the command over them."""
    return Bench(tmp_path, trio, sets, capfd)


class Bench:
    def __init__(self, root, trio, sets, capfd):
        self.root, self.capfd, self.out = root, capfd, root / "deep" / "out"
        self.models = {role: root / role for role in trio}
        for role, path in trio.items():
            shutil.copytree(path, self.models[role])
        self.sets = {kind: root / path.name for kind, path in sets.items()}
        for kind, path in sets.items():
            shutil.copy(path, self.sets[kind])

    def recipe(self, text: str | None = None, **keys) -> Path:
        path = self.root / "recipe.yml"
        path.write_text(recipe_text(self.models, self.sets, **keys) if text is None else text)
        return path

    def refused(self, code: int, *named: object, flags=(), **keys) -> str:
        """Run the merge; it must fail with `code`, name everything in `named`, and leave nothing."""
        before = snapshot(self.root)
        recipe = self.root / "recipe.yml" if (self.root / "recipe.yml").exists() and not keys else self.recipe(**keys)
        before |= snapshot(self.root)
        self.capfd.readouterr()
        try:
            found = main(["merge", str(recipe), str(self.out), *flags])
        except SystemExit as exit_:  # argparse
            found = exit_.code
        told = self.capfd.readouterr()
        screen(told.err)
        assert found == code, told.err
        assert told.out == ""
        for name in named:
            assert str(name) in told.err, f"{name} is not named in:\n{told.err}"
        assert snapshot(self.root) == before, "something was left behind"
        return told.err

    def edit_config(self, role: str, **changes):
        path = self.models[role] / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    def edit_tensor(self, role: str, tensor: str, value: float) -> Path:
        index = json.loads((self.models[role] / "model.safetensors.index.json").read_text())["weight_map"]
        file = self.models[role] / index[tensor]
        tensors = load_file(file)
        tensors[tensor].view(-1)[5] = value
        save_file(tensors, file, {"format": "pt"})
        return file

    def edit_samples(self, kind: str, change):
        path = self.sets[kind]
        text = path.read_text()
        if kind == "reasoning":
            path.write_text(json.dumps(change(json.loads(text))))
        else:
            path.write_text("".join(json.dumps(s) + "\n" for s in change([json.loads(x) for x in text.splitlines()])))


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every path below root, with the content of files."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def screen(text: str) -> None:
    """One screen, and no traceback."""
    assert "Traceback" not in text
    assert len(text.splitlines()) < 40, text
