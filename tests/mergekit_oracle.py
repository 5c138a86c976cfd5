"""mergekit's own plan of a configuration, and the comparison with ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from streammerge.mergekit import make_tensor_plan, parse_config
from streammerge.mergekit.config import DTYPES, base_of, parts

MERGEKIT = os.environ.get("STREAMMERGE_MERGEKIT", "")  # the Python of an environment of its own


def oracle(texts: list[str], directory: Path, *what: str) -> list[dict]:
    """What mergekit plans for each configuration, or what the script's argument says."""
    script = Path(__file__).parent / "parity/mergekit_plans.py"
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet.pop("PYTHONPATH", None)
    done = subprocess.run([MERGEKIT, str(script), *what], input=json.dumps(texts), cwd=directory, env=quiet, text=True,
                          capture_output=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(text: str, folder: Path) -> dict:
    """Our plan in the oracle's form."""
    config = parse_config(text, "config.yml", folder)
    plan = make_tensor_plan(config)
    roles = {c.path: str(r) for r, c in zip(config.references, plan.inputs, strict=True)}
    found = {}
    for job in plan.jobs:
        inputs = [(roles[s.checkpoint.path], s.key, dict(s.parameters)) for s in job.sources]
        base = (roles[job.base.checkpoint.path], job.base.key) if job.base else None
        found[job.out.name] = {"inputs": inputs, "base": base, "parameters": dict(job.parameters), "dtype": job.dtype,
                               "out": job.out.dtype}  # fmt: skip
    return {"tensors": found, "layers": plan.config["num_hidden_layers"], "config": config}


def compare(text: str, mine: dict, theirs: dict) -> None:
    """Every tensor, every input, every value."""
    assert mine["layers"] == theirs["layers"], text
    assert list(mine["tensors"]) != [] and sorted(mine["tensors"]) == sorted(theirs["tensors"]), text
    config = mine["config"]
    bases = {base_of(config, part) for _, part in parts(config)}
    for name, job in mine["tensors"].items():
        wanted = theirs["tensors"][name]
        base = wanted["base"] if config.spec.needs_base is not False else None
        assert (base is None) == (job["base"] is None) and (base is None or base in map(str, bases)), (text, name)
        expected = [tuple(i) for i in wanted["inputs"]]
        assert [i[:2] for i in job["inputs"]] == [i for i in expected if i[0] != base], (text, name)
        assert job["base"] is None or job["base"] in expected, (text, name)
        assert job["parameters"] == wanted["parameters"], (text, name)
        for model, _, values in job["inputs"]:
            assert values == wanted["input_parameters"][model], (text, name, model)
        assert job["dtype"] == DTYPES.get(wanted["dtype"], ""), (text, name)
        assert job["out"] == DTYPES[wanted["out_dtype"] or wanted["dtype"] or "float32"], (text, name)
