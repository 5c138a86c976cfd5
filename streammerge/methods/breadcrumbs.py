"""Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795)."""

from ..stream import Merge
from .sparsify import Breadcrumbs
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def breadcrumbs(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i w_i δ_i; of δ_i = W_i − W_B the largest `gamma` n entries go, then the smallest, to `density` n.

    `rescale`: each δ_i keeps its L1 norm. `normalize`: the sum is divided by Σ_i w_i. `int8_mask` is accepted and
    changes nothing.
    """
    dropped = Breadcrumbs(merge, density, gamma, rescale)
    merge_task_vectors(merge, dropped, weight, consensus=False, normalize=normalize, lam=lambda_)
