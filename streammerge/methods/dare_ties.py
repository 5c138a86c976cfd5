"""DARE with TIES' sign election (Yu et al., arXiv:2311.03099)."""

from ..stream import Merge
from .sparsify import Bernoulli
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def dare_ties(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i m_i w_i δ_i, each entry of δ_i = W_i − W_B kept with probability `density`, else 0.

    m_i = 1 where w_i δ_i has the sign of Σ_j w_j δ_j. `rescale`: each δ_i keeps its L1 norm. `normalize`: the sum is
    divided by Σ_i m_i w_i. `int8_mask` is accepted and changes nothing.
    """
    dropped = Bernoulli(merge, density, rescale)
    merge_task_vectors(merge, dropped, weight, consensus=True, normalize=normalize, lam=lambda_)
