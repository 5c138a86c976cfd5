"""Every example in mergekit's repository runs or is refused by name.

STREAMMERGE_MERGEKIT_EXAMPLES is a folder of YAML files: mergekit's `examples/`, and blocks of its documents. Each model
that they name gets a small random stand-in of enough layers. Run with -s to see the table.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mergekit_oracle import MERGEKIT, compare, oracle, ours
from stand_ins import stand_in

from streammerge.errors import StreamMergeError
from streammerge.mergekit import make_tensor_plan, parse_config
from streammerge.tensor_merging import merge_config, request

FOLDER = os.environ.get("STREAMMERGE_MERGEKIT_EXAMPLES", "")
FILES = sorted(p for p in Path(FOLDER).glob("*.y*ml")) if FOLDER else []
pytestmark = pytest.mark.skipif(not FILES, reason="STREAMMERGE_MERGEKIT_EXAMPLES (a folder of YAML files) is not set")
RUNS = {"bio-merge.yml", "gradient-slerp.yml", "linear.yml", "orcamini-platy-44layer.yml", "ties.yml"}
# what the message of a file that is refused must name
REFUSED = {
    "arcee_fusion.yml": "merge_method arcee_fusion is not supported",
    "doc-docs-evolve-0.yml": "mergekit-evolve",
    "doc-docs-evolve-1.yml": "unknown key 'filters'",
    "doc-docs-moe-0.yml": "mergekit-moe",
    "doc-docs-moe-1.yml": "mergekit-moe",
    "doc-docs-moe-2.yml": "unknown key 'architecture'",
    "doc-docs-moe-3.yml": "mergekit-moe",
    "doc-docs-moe-4.yml": "mergekit-moe",
    "doc-docs-multimerge-0.yml": "mergekit-multi",
    "doc-docs-multimerge-1.yml": "mergekit-multi",
    "doc-readme-0.yml": "tokenizer.tokens is not supported",
    "doc-readme-1.yml": "tokenizer.tokens is not supported",
    "doc-readme-2.yml": "tokenizer.tokens is not supported",
    "doc-readme-3.yml": "tokenizer_source: union is not supported",
    "doc-readme-4.yml": "'merge_method' is missing",
}


def attempt(file: Path, root: Path) -> tuple[str, str]:
    """('runs', what) or ('refused', why)."""
    try:
        config = parse_config(file.read_text(), file.name, root)
        ends = [item.layer_range[1] for part in config.slices for item in part.sources]
        for seed, model in enumerate(config.references):
            if not (root / model.name).exists():
                stand_in(root / model.name, max(ends, default=40), head=seed % 2 == 0, seed=seed)
        plan = make_tensor_plan(config)
        (root / file.name).write_text(file.read_text())
        merge_config(request(root / file.name), root / "merged")
    except StreamMergeError as error:
        return "refused", " ".join(line.strip(" -") for line in str(error).splitlines()).replace(str(file.parent), "")
    return "runs", f"{plan.method}, {len(plan.inputs)} models, {len(plan.jobs)} tensors"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_an_example_runs_or_is_refused_by_name(file, tmp_path):
    outcome, why = attempt(file, tmp_path)
    print(f"\n| {file.name} | {outcome} | {why} |")
    if file.name in RUNS | REFUSED.keys():
        assert outcome == ("runs" if file.name in RUNS else "refused")
    assert REFUSED.get(file.name, "") in why
    if outcome == "runs" and MERGEKIT:
        (theirs,) = oracle([file.read_text()], tmp_path)
        assert "error" not in theirs, theirs
        compare(file.read_text(), ours(file.read_text(), tmp_path), theirs)


def test_the_folder_holds_the_repository_s_examples():
    assert {f.name for f in FILES} >= RUNS | {"arcee_fusion.yml"}
