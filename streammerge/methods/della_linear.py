"""DELLA's drop with linear merging (Deep et al., arXiv:2406.11617)."""

from ..stream import Merge
from .sparsify import RankedDrop
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def della_linear(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i w_i δ_i, entries of δ_i = W_i − W_B kept at random by their rank in their row (della.py).

    `rescale`: each δ_i keeps its L1 norm. `normalize`: the sum is divided by Σ_i w_i. `int8_mask` is accepted and
    changes nothing.
    """
    dropped = RankedDrop(merge, density, epsilon, rescale)
    merge_task_vectors(merge, dropped, weight, consensus=False, normalize=normalize, lam=lambda_)
