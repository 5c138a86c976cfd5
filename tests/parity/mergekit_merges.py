"""Runs under mergekit's own Python: `mergekit-yaml CONFIG OUT` for each [config, out, stable] of a JSON list on stdin.

One process for all of them, on one thread, so that its sums have one order. `stable`: equal magnitudes are sorted by
their positions. torch's sort leaves their order open, and with it which of them mergekit keeps.
"""

import json
import sys

import torch
from mergekit.scripts.run_yaml import main

SORTS = torch.argsort, torch.sort, torch.topk


def stable_argsort(x, dim=-1, descending=False):
    return SORTS[0](x, dim=dim, descending=descending, stable=True)


def stable_sort(x, dim=-1, descending=False):
    return SORTS[1](x, dim=dim, descending=descending, stable=True)


def stable_topk(x, k, largest=True):
    return torch.return_types.topk([y[:k] for y in stable_sort(x, descending=largest)])


torch.set_num_threads(1)
for config, out, stable in json.load(sys.stdin):
    torch.argsort, torch.sort, torch.topk = (stable_argsort, stable_sort, stable_topk) if stable else SORTS
    main([config, out, "--no-write-model-card", "--quiet"], standalone_mode=False)
