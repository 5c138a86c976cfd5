"""The floors: a file imports lower floors only, so that the package can be read from the bottom up (design.md).

Imports inside functions and under TYPE_CHECKING count. Files of one floor may import each other where no cycle arises.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# module -> floor. A folder's entry ("demo") stands for all of its files. Every file must be covered.
FLOORS = {
    "errors": 0, "container": 0, "environment": 0, "memory": 0, "progress": 0, "threads": 0, "kernels": 0, "": 0,
    "linalg": 1, "findings": 1, "io": 1, "strict": 1, "workers": 1, "codec": 1, "gradient": 1, "outcome": 1,
    "sparsify": 1,
    "arithmetic": 2, "tokens": 2, "adapter": 2, "recipe": 2, "output": 2, "arch": 2, "jobs": 2, "markers": 2,
    "records": 2, "batches": 2,
    "layout": 3, "calibration": 3, "strengths": 3, "estimate": 3, "footprint": 3, "scan": 3, "quantized": 3,
    "device": 4,
    "stream": 3, "methods": 3, "sdpa": 3, "planned": 3,
    "mergekit": 4, "fingerprint": 4, "forward": 4, "capture_cache": 4,
    "capture": 5, "journal": 5,
    "bases": 6, "task_vector": 6,
    "compose": 7,
    "attention": 8,
    "artifacts": 9, "coefficients": 9, "run": 9,
    "l_think": 10, "plain": 10, "tensorwise": 10, "snapshot": 10, "sweep": 10, "verified": 10,
    "release": 11,
    "report": 12, "manifest": 12, "finish": 12,
    "also": 13, "checking": 13, "probes": 13, "pipeline": 13, "tensor_merging": 13,
    "merging": 14, "demo": 14, "bench": 14, "planning": 14, "flags": 14,
    "api": 15,
    "cli": 16,
}  # fmt: skip
KERNEL_IMPORTS = {"torch", "triton", "__future__", "importlib", "collections", "math", "os", "functools", "dataclasses"}
KERNEL_IMPORTS |= {"typing"}


def sources() -> dict[str, Path]:
    """Module name inside the package ('io.writer', '' for its __init__) -> file; kernels/ is streammerge.kernels."""
    found = {}
    for folder, prefix in ((ROOT / "streammerge", ""), (ROOT / "kernels", "kernels.")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[(prefix + ".".join(p for p in parts if p != "__init__")).strip(".")] = file
    return found


def imports(module: str, code: str, is_package: bool, known: set[str]) -> set[str]:
    """The package's own modules that a file imports, by any spelling, anywhere in the file."""
    found: set[str] = set()
    here = ["streammerge", *(p for p in module.split(".") if p)]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + (1 if is_package else 0)] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            targets = [(name, alias.name) for alias in node.names]
        else:
            continue
        for name, member in targets:
            top, _, inner = name.partition(".")
            if top == "kernels":
                found.add("kernels")  # the repository's folder under its own name: never the installed package
            if top != "streammerge":
                continue
            deeper = f"{inner}.{member}".strip(".")
            found.add(deeper if member and deeper in known else inner)
    return found


def floor(module: str) -> int:
    """The floor of a module, from its own entry or its folder's."""
    return FLOORS[module] if module in FLOORS else FLOORS[module.partition(".")[0]]


def graph() -> dict[str, set[str]]:
    files = sources()
    return {
        module: imports(module, file.read_text(encoding="utf-8"), file.name == "__init__.py", set(files))
        for module, file in files.items()
    }


def upward(edges: dict[str, set[str]]) -> list[str]:
    return [f"{m} (F{floor(m)}) imports {t} (F{floor(t)})" for m, ts in edges.items() for t in ts
            if floor(t) > floor(m)]  # fmt: skip


def cycles(edges: dict[str, set[str]]) -> set[str]:
    """Modules left when those that import none of the rest are taken away again and again."""
    left = {m: ts - {m, ""} for m, ts in edges.items()}  # "": __version__ lives in the package itself
    while free := {m for m, ts in left.items() if not ts & left.keys()}:
        left = {m: ts for m, ts in left.items() if m not in free}
    return set(left)


def test_every_file_has_a_floor():
    strangers = [m for m in sources() if m not in FLOORS and (m.partition(".")[0] not in FLOORS or "." not in m)]
    assert not strangers, "add these files to the table of floors"
    gone = [m for m in FLOORS if not any(f == m or f.startswith(m + ".") for f in sources())]
    assert not gone, "these floors have no file"


def test_no_upward_import():
    assert upward(graph()) == []


def test_no_import_cycle():
    assert cycles(graph()) == set()


def test_kernels_import_only_torch_triton_and_themselves():
    for file in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file}: reaches out of the folder"
                names = [node.module] if not node.level else []
            for name in names:
                assert name.partition(".")[0] in KERNEL_IMPORTS, f"{file.name} imports {name}"


@pytest.mark.parametrize("line, target", [
    ("from .cli import main", "cli"),
    ("from . import cli", "cli"),
    ("def f():\n    from streammerge.cli import main", "cli"),
    ("import streammerge.sweep", "sweep"),
    ("from streammerge import pipeline", "pipeline"),
    ("if TYPE_CHECKING:\n    from .io.writer import OutTensor", "io.writer"),
    ("from .io import writer", "io.writer"),
])  # fmt: skip
def test_the_walk_sees_every_spelling(line, target):
    edges = imports("errors", line, False, set(sources()))
    assert edges == {target} and len(upward({"errors": edges})) == 1
    inside = imports("io.stash", "from ..cli import main\nfrom .writer import x", False, set(sources()))
    assert inside == {"cli", "io.writer"}
    package = imports("io", "from . import writer\nfrom ..memory import x", True, set(sources()))
    assert package == {"io.writer", "memory"}


def test_a_cycle_is_seen():
    assert cycles({"verified": {"sweep"}, "sweep": {"verified"}, "errors": set()}) == {"verified", "sweep"}


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = code + "\nimport sys; print('|'.join(sorted({m.partition('.')[0] for m in sys.modules})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stderr.strip().split("\n")[-1].split("|"))


def test_importing_the_package_imports_no_torch():
    assert not {"torch", "transformers", "numpy", "yaml"} & loaded("import streammerge")


def test_help_imports_no_torch():
    code = "import streammerge.cli as c\ntry:\n    c.main(['merge', '--help'])\nexcept SystemExit:\n    pass"
    assert not {"torch", "transformers"} & loaded(code)


def test_a_recipe_is_read_without_torch():
    """A typo is answered at once, before torch's seconds of import."""
    assert not {"torch", "transformers"} & loaded("from streammerge import parse_recipe")


def test_public_names_resolve():
    import streammerge

    assert all(getattr(streammerge, name) for name in streammerge.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        streammerge.nothing  # noqa: B018


def test_no_kernel_file_is_called_as_a_function_is():
    """Importing streammerge.kernels.x sets x on the package: a function of that name would turn into a module."""
    from streammerge import kernels

    assert not {file.stem for file in (ROOT / "kernels").glob("*.py")} & set(kernels.__all__)
