"""DELLA: drop by magnitude rank, elect sign, merge (Deep et al., arXiv:2406.11617)."""

from ..stream import Merge
from .sparsify import RankedDrop
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def della(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i m_i w_i δ_i / Σ_i m_i w_i, entries of δ_i = W_i − W_B kept at random by their rank in their row.

    The smallest entry of a row is kept with probability `density` − `epsilon`, the largest with `density` + `epsilon`,
    those between by rank. m_i = 1 where w_i δ_i has the sign of Σ_j w_j δ_j. `rescale`: each δ_i keeps its L1 norm.
    `int8_mask` is accepted and changes nothing.
    """
    dropped = RankedDrop(merge, density, epsilon, rescale)
    merge_task_vectors(merge, dropped, weight, consensus=True, normalize=normalize, lam=lambda_)
