"""What a merge found out about the LRM, kept for the next one: bases by layer, and attention masses.

Neither knows λ, the rule of α or the models that are merged in (with scope `layer` masses do, and are not kept). A
second merge of the same LRM on the same calibration sets takes them from `--artifacts DIR` and need not move the
reasoning or the instruction set at all. Each kind lies under the hash of all that it follows from: another recipe finds
nothing, and no artifact is ever used for what it was not made of. Safetensors and JSON, complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .attention import LayerMass
from .bases import LayerBases, SiteBasis
from .errors import ResourceError
from .planned import Plan

# of a fingerprint: what neither follows from, then what only bases do (the markers lay out both sets), then only masses
_OF_THE_MERGE = ("recipe: lambda", "recipe: instruct_model", "recipe: base_model", "recipe: proxy_base",
                 "recipe: dtype", "recipe: coefficients", "recipe: shard_size", "recipe: merge_method",
                 "recipe: sparsify", "recipe: manifest", "recipe: card", "recipe: sbom", "recipe: hash_inputs",
                 "recipe: capture_cache", "instruct_model:", "base_model:")  # fmt: skip
_OF_THINKING = ("recipe: thinking.before", "recipe: thinking.inside", "recipe: thinking.after",
                "recipe: thinking.random", "recipe: thinking.attended_values", "recipe: thinking.min_share",
                "recipe: basis", "recipe: modules", "recipe: layers", "recipe: seed", "recipe: calibration.holdout",
                "recipe: calibration.limit_reasoning", "recipe: calibration.reasoning",
                "calibration.reasoning:")  # fmt: skip
_OF_ASKING = ("recipe: calibration.instruction", "recipe: calibration.limit_instruction", "calibration.instruction:")


class Artifacts:
    """Those of one merge in `root`. `reused`: kinds that an earlier merge had left complete. `tell` hears of kinds that
    the disk refuses to keep; so do `warnings`. ResourceError where `root` is no directory."""

    def __init__(
        self, root: Path, plan: Plan, fingerprint: dict[str, Any], tell: Callable[[str], None] = lambda text: None
    ):
        if os.path.lexists(root) and not root.is_dir():
            raise ResourceError(f"--artifacts {root}: is no directory; give one, or a path that is not there yet")
        self.warnings: list[str] = []
        self._tell, self._lost = tell, set[str]()
        rows = {"recipe: coefficients.rows": fingerprint.get("recipe: coefficients.rows")}
        of_lrm = {k: v for k, v in fingerprint.items() if not k.startswith(_OF_THE_MERGE)}
        bases = {k: v for k, v in of_lrm.items() if not k.startswith(_OF_ASKING)} | {"merged": sorted(plan.merged)}
        masses = rows | {k: v for k, v in of_lrm.items() if not k.startswith(_OF_THINKING)}
        self._bases, self._masses = (root / f"{kind}-{_hash(found)}" for kind, found in (
            ("bases", bases), ("masses", masses)))  # fmt: skip
        self._layers = plan.layers
        needed = {"bases": plan.recipe.needs_reasoning, "masses": plan.recipe.surveys}
        self.wanted = [kind for kind, wanted in needed.items() if wanted]
        self.reused = [kind for kind in self.wanted if (self._folder(kind) / "complete").exists()]

    def _folder(self, kind: str) -> Path:
        return self._bases if kind == "bases" else self._masses

    def masses(self) -> dict[int, LayerMass]:
        """Of every layer."""
        found = json.loads((self._masses / "masses.json").read_text("utf-8"))
        return {int(n): LayerMass(*(torch.tensor(v, dtype=torch.float64) for v in pair)) for n, pair in found.items()}

    def bases(self, layer: int) -> LayerBases:
        """Of one layer. ResourceError where the file cannot be read."""
        file = self._file(layer)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"{file}: cannot be read ({error}); remove {file.parent}, it will be made again") \
                from error  # fmt: skip
        named = {}
        for key in (k[:-2] for k in tensors if k.endswith("/u")):
            energy, count = tensors[key + "/facts"].tolist()
            named[key] = SiteBasis(tensors[key + "/u"], energy, int(count))
        sites = {name.removeprefix("site/"): b for name, b in named.items() if name.startswith("site/")}
        return LayerBases(sites, tuple(named[f"value/{i}"] for i in range(len(named) - len(sites))))

    def keep_bases(self, layer: int, bases: LayerBases) -> None:
        """One layer's, as they are found. Where the disk refuses, the merge has them all the same."""
        if "bases" in self._lost:
            return
        named = {f"site/{s}": b for s, b in bases.sites.items()} | {f"value/{i}": b for i, b in enumerate(bases.values)}
        facts = {f"{n}/facts": torch.tensor([b.energy, b.count], dtype=torch.float64) for n, b in named.items()}
        file = self._file(layer)
        partial = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(facts | {f"{name}/u": b.u for name, b in named.items()}, partial)
            os.replace(partial, file)
        except (OSError, SafetensorError) as error:
            self._lose("bases", file, error)

    def finish(self, masses: dict[int, LayerMass]) -> None:
        """Both kinds are complete from now on, as far as this merge has found and kept them."""
        for kind in (k for k in self.wanted if k not in self.reused and k not in self._lost):
            folder = self._folder(kind)
            try:
                if kind == "masses":
                    folder.mkdir(parents=True, exist_ok=True)
                    found = {str(n): [m.alignment.tolist(), m.leakage.tolist()] for n, m in masses.items()}
                    (folder / "masses.json").write_text(json.dumps(found))
                if kind == "masses" or all(self._file(n).exists() for n in range(self._layers)):
                    os.close(os.open(folder / "complete", os.O_WRONLY | os.O_CREAT, 0o666))
            except OSError as error:
                self._lose(kind, folder, error)

    def forget_partial(self) -> None:
        """What an earlier merge began and did not finish."""
        for kind in self.wanted:
            if kind not in self.reused:
                shutil.rmtree(self._folder(kind), ignore_errors=True)

    def _lose(self, kind: str, file: Path, error: Exception) -> None:
        """What cannot be kept whole leaves its room to others; told once for each kind."""
        self._lost.add(kind)
        shutil.rmtree(self._folder(kind), ignore_errors=True)
        self.warnings.append(f"--artifacts: {file}: cannot be written ({error}); the merge goes on, its {kind} are not "
                             "kept for a later one")
        self._tell(self.warnings[-1])

    def _file(self, layer: int) -> Path:
        return self._bases / f"bases-{layer:05d}.safetensors"


def _hash(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
