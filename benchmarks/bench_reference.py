"""A whole RAIN merge of a tiny Llama trio, as a user runs it, beside the authors' code on the same files.

    python benchmarks/bench_reference.py [--runs 5] [--samples 150 365] [--layers 4]
                                         [--authors CHECKOUT [--authors-python PYTHON]]

What: 4 layers (or --layers), hidden 128, 4 heads on 2 key/value heads, random weights, a byte-level BPE of 8k tokens
trained on the calibration texts; the authors' 150 reasoning and 365 instruction samples (../shared/calibration), or the
first so many of them. Timed is the command `streammerge merge` in a fresh process, imports included. With --authors, a
checkout of K1nght/RAIN-Merging runs its three stages with the parameters that its scripts set (all layers; the device
is the CPU), each under a time limit. Appends to results/cpu-reference.jsonl. Nothing of theirs is kept here; their
.jsonl is handed over as they expect it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rows import RESULTS, ROOT, Row, append, row
from timing import Timed, timed

SETS = ROOT.parent / "shared" / "calibration"
SAMPLES = {"reasoning": 150, "instruction": 365}
DEPTH = {"layers": 4}
HIDDEN, VOCAB = 128, 8192
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def take_samples(root: Path) -> dict[str, Path]:
    """The first samples of the authors' two files, in their own schemas."""
    reasoning = json.loads((SETS / "reasoning_calibration_set.json").read_text())[: SAMPLES["reasoning"]]
    lines = (SETS / "instruction_calibration_set.jsonl").read_text().splitlines()[: SAMPLES["instruction"]]
    paths = {"reasoning": root / "reasoning.json", "instruction": root / "instruction.jsonl"}
    paths["reasoning"].write_text(json.dumps(reasoning, ensure_ascii=False))
    paths["instruction"].write_text("\n".join(lines) + "\n")
    return paths


def train_tokenizer(sets: dict[str, Path]):
    """A byte-level BPE on the texts of the sets: token counts like a real model's. Markers are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    samples = json.loads(sets["reasoning"].read_text())
    samples += [json.loads(line) for line in sets["instruction"].read_text().splitlines()]
    texts = [s[key] for s in samples for key in ("prompt", "reasoning", "reason", "response") if key in s]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = TEMPLATE
    return fast


def make_trio(root: Path, tokenizer) -> dict[str, Path]:
    """Random fp32 checkpoints; ITM and LRM are the base with 2 % noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=DEPTH["layers"],
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    paths = {role: root / role for role in ("base", "itm", "lrm")}
    for seed, path in enumerate(paths.values()):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * p.std().nan_to_num(0.0) * 0.02 * (seed > 0))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def what() -> str:
    """The job, as rows call it."""
    return f"RAIN merge, Llama {DEPTH['layers']} x {HIDDEN}, {SAMPLES['reasoning']} + {SAMPLES['instruction']} samples"


def rows_of(what: str, runs: list[Timed], note: str) -> list[Row]:
    """The three rows of some runs."""
    return [row(what, "wall s", [r.wall for r in runs], note), row(what, "CPU s", [r.cpu for r in runs], note),
            row(what, "peak RSS MB", [r.peak for r in runs], note)]  # fmt: skip


def bench_streammerge(root: Path, trio: dict[str, Path], sets: dict[str, Path], runs: int) -> list:
    """The command, `runs` times into new directories."""
    recipe = root / "recipe.yml"
    recipe.write_text(json.dumps({
        "merge_method": "rain", "base_model": str(trio["base"]), "instruct_model": str(trio["itm"]),
        "reasoning_model": str(trio["lrm"]), "calibration": {k: str(v) for k, v in sets.items()},
    }))  # fmt: skip
    done, note = [], ""
    for n in range(runs):
        out = root / f"out-{n}"
        command = [str(Path(sys.executable).with_name("streammerge")), "merge", str(recipe), str(out), "--quiet"]
        ran = timed(command, 600)
        if ran.code:
            sys.exit(f"{' '.join(command)} ended with {ran.code}:\n{ran.told}")
        done.append(ran)
        report = json.loads((out / "streammerge_report.json").read_text())
        tokens = report["throughput"]["calibration_tokens"]
        note = f"streammerge merge in a fresh process, imports included; {tokens} calibration tokens; " \
               f"inside merge() {report['seconds']['total']} s, sweep {report['seconds']['sweep']} s (last run)"
        print(f"streammerge run {n + 1}: {ran.wall:.2f} s, CPU {ran.cpu:.2f} s, {ran.peak:.0f} MB", flush=True)
        shutil.rmtree(out)
    return rows_of(f"{what()}: streammerge", done, note)


def author_stages(trio: dict[str, Path], sets: dict[str, Path], out: Path) -> dict[str, list[str]]:
    """The three commands of the authors' scripts, with the scripts' defaults but for paths, devices and layers.

    Their scripts look for α under another name than their code writes (…_two_pass.pt); the file written is handed on.
    """
    vectors, qp = out / "projected_task_vectors.pkl", out / "qp"
    lrm = str(trio["lrm"])
    return {
        "stage 1": ["nullspace_projection_compute.py", "--base", str(trio["base"]), "--instruct", str(trio["itm"]),
                    "--target", lrm, "--texts_r", str(sets["reasoning"]), "--output_file", str(vectors),
                    "--max_samples_r", "1000", "--layers_tail", str(DEPTH["layers"]), "--heads", "all",
                    "--merge_types", "qkvof", "--max_seq_len", "7168", "--use_hooks"],
        "stage 2": ["qp_true_forward_fast.py", "--projected_file", str(vectors), "--base_model", lrm,
                    "--json_data", str(sets["instruction"]), "--layers", "all", "--heads", "all", "--device", "cpu",
                    "--out", str(qp), "--qp_variant", "two_pass", "--verbose"],
        "stage 3": ["unified_model_merge.py", "--projected_file", str(vectors), "--base_model", lrm,
                    "--output_dir", str(out / "merged"), "--alpha_file", str(qp / "alpha_true_forward_align_leak.pt")],
    }  # fmt: skip


def bench_authors(checkout: Path, python: str, root: Path, trio: dict, sets: dict, limit: float) -> list:
    """The authors' three stages, once each; a stage that fails or runs out of time ends it, and its row says so."""
    out = root / "authors"
    out.mkdir()
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = "commit " + subprocess.run(git, capture_output=True, text=True).stdout.strip()
    theirs, rows, total = f"{what()}: K1nght/RAIN-Merging", [], []
    env = os.environ | {"MPLBACKEND": "Agg"}
    for stage, arguments in author_stages(trio, sets, out).items():
        ran = timed([python, *arguments], limit, cwd=checkout, env=env)
        total.append(ran)
        ended = "finished" if ran.code == 0 else f"failed with exit code {ran.code}"
        ended = f"stopped at the limit of {limit:.0f} s" if ran.code == 124 else ended
        note = f"{commit}; {ended}; python {' '.join(arguments)}".replace(str(root), "TMP")
        rows += rows_of(f"{theirs}, {stage}", [ran], note)
        print(f"authors {stage}: {ran.wall:.1f} s, CPU {ran.cpu:.1f} s, {ran.peak:.0f} MB, {ended}", flush=True)
        if ran.code:
            print(ran.told, flush=True)
            return rows
    everything = Timed(sum(r.wall for r in total), sum(r.cpu for r in total), max(r.peak for r in total), 0, "")
    return rows + rows_of(f"{theirs}, all stages", [everything], f"{commit}; one run of each stage")


def ratios(ours: list[Row], theirs: list[Row]) -> list[Row]:
    """Theirs over ours, of all their stages; none where a stage of theirs did not finish."""
    found = []
    for whole in (r for r in theirs if r.what.endswith("all stages")):
        mine = next(r for r in ours if r.metric == whole.metric)
        found.append(row(f"{what()}: K1nght/RAIN-Merging / streammerge", f"ratio of {whole.metric.rpartition(' ')[0]}",
                         [whole.median / mine.median], "one run of theirs, the median of ours"))  # fmt: skip
        print(f"{found[-1].what}, {found[-1].metric}: {found[-1].median:.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs=2, default=list(SAMPLES.values()), metavar="N",
                        help="reasoning and instruction samples")  # fmt: skip
    parser.add_argument("--layers", type=int, default=DEPTH["layers"], help="of the models")
    parser.add_argument("--authors", type=Path, help="a checkout of K1nght/RAIN-Merging to run on the same files")
    parser.add_argument("--authors-python", default=sys.executable, help="the python that has their requirements")
    parser.add_argument("--limit", type=float, default=600, help="seconds a stage of theirs may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-reference.jsonl")
    args = parser.parse_args()
    SAMPLES.update(zip(SAMPLES, args.samples, strict=True))
    DEPTH["layers"] = args.layers
    if not SETS.is_dir():
        sys.exit(f"{SETS} is not there: this benchmark runs on the authors' calibration sets")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sets = take_samples(root)
        trio = make_trio(root, train_tokenizer(sets))
        ours = bench_streammerge(root, trio, sets, args.runs)
        append(args.out, ours)
        if args.authors:
            checkout = args.authors.resolve()
            theirs = bench_authors(checkout, args.authors_python, root, trio, sets, args.limit)
            append(args.out, [*theirs, *ratios(ours, theirs)])


if __name__ == "__main__":
    main()
