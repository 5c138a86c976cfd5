"""Packaging: the traps that a layout with `kernels/` at the top level has, and what a wheel must hold."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel's file, from a copy of the sources."""
    work = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", cwd=ROOT).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (work / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "src" / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(work), "./src")
    built = run(*pip, cwd=work)
    assert built.returncode == 0, built.stderr
    return next(work.glob("*.whl"))


def test_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"streammerge/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    package = ROOT / "streammerge"
    patterns = ("*.py", "families/*.json", "py.typed", "io/*.py", "demo/*.py", "mergekit/*.py")
    data = [p for pattern in patterns for p in package.glob(pattern)]
    data += [p for p in (package / "demo/data").rglob("*") if p.is_file()]
    wanted |= {str(p.relative_to(ROOT)) for p in data}
    assert wanted - names == set()
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/"))]


def test_installed_wheel_imports_without_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, 'site'); "
        "import streammerge, streammerge.kernels as k; k.project; "
        "from streammerge.arch import families; assert 'qwen3' in families(); "
        "print(streammerge.__file__, k.__file__)"
    )
    done = run(sys.executable, "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("site/streammerge") == 2


def test_editable_install_finds_the_kernels(tmp_path):
    done = run(sys.executable, "-c", "import streammerge.kernels as k; print(k.__file__, k.span_mass)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") in done.stdout


def test_bare_import_of_kernels_from_the_root_is_harmless():
    """transformers and bitsandbytes probe for Hugging Face's `kernels`; from the root they find ours."""
    code = (
        "import sys; sys.path.insert(0, '.'); import kernels; assert 'torch' not in sys.modules; "
        "assert not hasattr(kernels, 'get_kernel'); from transformers import AutoModelForCausalLM"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_console_script_teaches(tmp_path):
    script = Path(sys.executable).with_name("streammerge")
    for arguments in (["--help"], ["merge", "--help"], ["demo", "--help"]):
        done = run(str(script), *arguments, cwd=tmp_path)
        assert done.returncode == 0 and len(done.stdout) > 300
    assert "merge_method: rain" in run(str(script), "merge", "--help", cwd=tmp_path).stdout
    assert run(str(script), "mrege", cwd=tmp_path).returncode == 2


def test_no_registry_host_in_the_project():
    hosts = ("files.python" + "hosted", "pypi" + ".org", "download.py" + "torch", "registry.npm" + "js")
    files = [ROOT / n for n in run("git", "ls-files", cwd=ROOT).stdout.split("\n") if n]
    for file in files:
        if file.is_file() and file.stat().st_size < 1 << 20 and file.suffix != ".safetensors":
            text = file.read_text(errors="ignore")
            assert not [h for h in hosts if h in text], file


def test_makefile_and_ci(tmp_path):
    assert "make test" in (ROOT / ".ci/run").read_text()
    for target in ("demo", "test", "lint"):
        assert run("make", "-n", target, cwd=ROOT).returncode == 0
