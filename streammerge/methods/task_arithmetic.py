"""Task arithmetic (Ilharco et al., arXiv:2212.04089)."""

from ..stream import Merge
from .spec import PerModel, method
from .task_vectors import merge_task_vectors


@method(base=True, count=(0, None))
def task_arithmetic(
    merge: Merge,
    *,
    weight: PerModel,
    density: PerModel = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> None:
    """W* = W_B + λ Σ_i w_i (W_i − W_B), the sum divided by Σ_i w_i where `normalize`.

    Nothing is dropped: `density`, `rescale` and `int8_mask` are accepted and change nothing.
    """
    merge_task_vectors(merge, None, weight, consensus=False, normalize=normalize, lam=lambda_)
