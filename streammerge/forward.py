"""The layer-major forward: one decoder layer on the device at a time, the whole calibration set passes through it.

The layers are transformers' own modules, built on the meta device and never materialised: `functional_call` lends a
layer its weights for the length of one call. What a layer is handed besides the hidden states (masks, rotary
embeddings) is found by running the model's own forward over recorders in the layers' place, so that no family needs
code here. Same dtype and same batch: bit-equal to the resident model.

Attention runs through transformers' SDPA, wrapped so that an observer can see its inputs (sdpa.py). A stream that is
observed in the last layer ends there: nothing is computed that its observer does not see.

On a CPU several batches pass at once (workers.py), each through a copy of the module tree of its own, which holds no
weights.

Memory: one layer's weights (the caller's), the activations of one batch a worker, and the streams' stashes.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from .arch import SITES, Family
from .batches import Batch
from .errors import InputError, listed
from .io.checkpoint import Checkpoint
from .io.stash import Stash
from .sdpa import ATTENTION, AttentionInputs
from .workers import Gates, Workers


class Observer(Protocol):
    """Looks on while a batch passes through a layer.

    Batches may pass side by side: a method computes what it wants from its own batch, and returns the rest of its
    work, whatever touches what batches share (None: nothing). That runs one batch at a time, in batch order.
    """

    def on_input(self, batch: int, site: str, x: Tensor) -> Callable[[], None] | None:
        """The input [B, T, in] of the linear modules of a site."""

    def on_attention(self, batch: int, call: AttentionInputs) -> Callable[[], None] | None:
        """Queries and keys of the layer's attention."""


class _Enough(Exception):
    """Nobody looks at the rest of the layer."""


class _Recorder(nn.Module):
    """Stands where a decoder layer was and keeps what the model's forward hands to it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.seen: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.seen = kwargs
        return hidden


class Stream:
    """One calibration set on its way up through the layers: its batches and where their hidden states are kept."""

    def __init__(
        self, batches: list[Batch], device: torch.device, *, offload: bool = False, spill: Path | None = None
    ):
        self.batches = batches
        self.stash = Stash(device, offload=offload, spill=spill)
        self.tokens = sum(sum(b.lengths) for b in batches)


class _Carrier:
    """The module tree without weights: the layers, and the model's forward over recorders. One thread at a time."""

    def __init__(self, model: nn.Module, device: torch.device):
        skeleton = getattr(model, model.base_model_prefix).eval()
        self.norm, skeleton.norm = skeleton.norm, nn.Identity()
        self.layers = [layer.eval() for layer in skeleton.layers]
        skeleton.layers = nn.ModuleList(_Recorder(layer) for layer in self.layers)
        rotary = skeleton.rotary_emb
        skeleton.rotary_emb = type(rotary)(config=model.config).to(device)  # its buffers are computed, not loaded
        self._skeleton = skeleton

    def handed_to(self, layer: int, hidden: Tensor) -> dict[str, Any]:
        """What the model's forward hands to a layer besides the hidden states."""
        self._skeleton(inputs_embeds=hidden, use_cache=False)
        return self._skeleton.layers[layer].seen


class StreamedModel:
    """The LRM's architecture without its weights.

    `config` is the checkpoint's directory content as transformers reads it; compute runs in `dtype` on `device`, on a
    CPU in `workers` threads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        workers: Workers | None = None,
    ):
        try:
            config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)
        except Exception as error:  # transformers raises whatever its parsers and modules raise
            raise InputError(f"{checkpoint.path}/config.json: transformers cannot build the model "
                             f"({type(error).__name__}: {str(error)[:500]})") from None
        self.checkpoint, self.family, self.device, self.dtype = checkpoint, family, device, dtype
        self.ends_early = True  # False: the last layer is computed whole, so that it takes what every other layer takes
        self._names = _fitting_names(model, checkpoint, family)
        self._free: queue.SimpleQueue[_Carrier] = queue.SimpleQueue()
        self._workers = workers or Workers(1)
        for tree in [copy.deepcopy(model) for _ in range(self._workers.count - 1)] + [model]:
            carrier = _Carrier(tree, device)
            self._free.put(carrier)
        self._norm = carrier.norm

    def embed(self, stream: Stream) -> None:
        """Fill the stream's stash with token embeddings; reads only the rows that occur."""
        used = torch.unique(torch.cat([b.ids.flatten() for b in stream.batches]))
        table = self.checkpoint.read_rows(self.family.embedding, used).to(self.device, self.dtype)
        for n, batch in enumerate(stream.batches):
            stream.stash.put(n, table[torch.searchsorted(used, batch.ids).to(self.device)])

    def advance(
        self,
        layer: int,
        weights: dict[str, Tensor],
        stream: Stream,
        observer: Observer | None = None,
        sites: tuple[str, ...] = (),
        tick: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Move every batch of the stream through one layer, in place, and show the observer what passes.

        weights: names relative to the layer -> tensors on the device, in the compute dtype. `sites`: the feature
        sites that the observer wants to see, in the order of SITES (it always sees the attention). With an observer the
        last layer leaves the stash empty. `tick` hears of each batch's tokens.
        """
        ends = self.ends_early and observer is not None and layer + 1 == len(self._names)
        until = ([s for s in sites if s != "attn_in"] or ["attention"])[-1] if ends else None
        weights = {name: weights[name] for name in self._names[layer]}

        @torch.no_grad()  # here, since it holds for one thread
        def carry(n: int, gates: Gates) -> int:
            carrier = self._free.get()
            try:
                hidden, module = stream.stash.fetch(n), carrier.layers[layer]
                kwargs = carrier.handed_to(layer, hidden)
                with suppress(_Enough), _watching(module, self.family, n, observer, sites, until, gates):
                    out = functional_call(module, weights, (hidden,), kwargs, strict=True)
                    stream.stash.put(n, out[0] if isinstance(out, tuple) else out)
            finally:
                self._free.put(carrier)
            return sum(stream.batches[n].lengths)

        self._workers.run(carry, len(stream.batches), tick)
        if ends:
            stream.stash.drop()

    @torch.no_grad()
    def final_hidden(self, stream: Stream, positions: list[tuple[int, ...]]) -> Tensor:
        """Hidden states after the last norm at chosen positions of each sample, in sample order: [Σ positions, hidden].

        `positions[s]` belongs to sample s of the list that the stream's batches were made from.
        """
        weight = self.checkpoint.read(self.family.norm).to(self.device, self.dtype)
        rows: dict[int, Tensor] = {}
        for n, batch in enumerate(stream.batches):
            normed = functional_call(self._norm, {"weight": weight}, (stream.stash.fetch(n),))
            for row, sample in enumerate(batch.samples):
                rows[sample] = normed[row, list(positions[sample])]
        return torch.cat([rows[s] for s in sorted(rows)])


def _fitting_names(model: nn.Module, checkpoint: Checkpoint, family: Family) -> list[list[str]]:
    """Names inside each layer that its module takes; InputError unless the checkpoint has what the model wants, in
    its shapes, and nothing more inside the layers.

    Old Llama checkpoints also store rotary frequencies, which the modules compute; a tied head need not be stored.
    """
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop(family.head, None)
    inside = family.layers + "."
    found = {k: list(t.shape) for k, t in checkpoint.tensors.items() if k in wanted or k.startswith(inside)}
    problems = []
    for name in sorted(wanted.keys() | found.keys()):
        has, wants = found.get(name, "no such tensor"), wanted.get(name, "no such tensor")
        if has != wants and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name}: the checkpoint has {has}; wanted {wants}")
    if problems:
        raise InputError(listed(f"{checkpoint.role}: the weights in {checkpoint.path} do not fit its config.json:",
                                problems, "Download the checkpoint again: config.json and weights belong together."))
    prefixes = [family.layer_prefix(n) for n in range(model.config.num_hidden_layers)]
    return [[name.removeprefix(p) for name in wanted if name.startswith(p)] for p in prefixes]


@contextmanager
def _watching(
    module: nn.Module,
    family: Family,
    batch: int,
    observer: Observer | None,
    sites: tuple[str, ...],
    until: str | None,
    gates: Gates,
):
    """Show the observer the inputs of the sites and the attention while one batch passes through `module`; raise
    _Enough once it has seen `until`."""
    if observer is None:
        yield
        return

    def see(gate: str, shown: Any) -> None:
        rest = observer.on_attention(batch, shown) if gate == "attention" else observer.on_input(batch, gate, shown)
        if rest is not None:
            gates.pass_in_order(gate, batch, rest)
        if gate == until:
            raise _Enough

    with ExitStack() as stack:
        for site in sites:
            linear = module.get_submodule(family.modules[SITES[site][0]])
            hook = linear.register_forward_pre_hook(lambda _, args, s=site: see(s, args[0]))
            stack.callback(hook.remove)
        attention = module.get_submodule(family.modules["q"].rpartition(".")[0])
        attention._streammerge_watcher = lambda call: see("attention", call)
        attention._streammerge_first = until == "attention"
        stack.callback(delattr, attention, "_streammerge_watcher")
        yield
