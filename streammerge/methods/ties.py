"""TIES: trim, elect sign, merge (Yadav et al., arXiv:2306.01708)."""

from ..stream import Merge
from .sparsify import Magnitude
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def ties(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i m_i w_i δ_i / Σ_i m_i w_i, δ_i = the `density` n entries of W_i − W_B of largest magnitude.

    m_i = 1 where w_i δ_i has the sign of Σ_j w_j δ_j. Without `normalize` the sum is not divided. `rescale`: each δ_i
    keeps the L1 norm that it had before it was trimmed. `int8_mask` is accepted and changes nothing.
    """
    dropped = Magnitude(merge, density, rescale)
    merge_task_vectors(merge, dropped, weight, consensus=True, normalize=normalize, lam=lambda_)
