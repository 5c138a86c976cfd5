"""Passthrough: one model's tensor; with `slices` it stacks layers of several models (franken-merges)."""

from ..stream import Merge
from .spec import PerModel, method


@method(base=False, count=(1, 1))
def passthrough(merge: Merge, *, scale: PerModel = None) -> None:
    """W* = scale W, or W where `scale` is not given.

    A tensor that is neither scaled nor cast does not come here: its bytes are copied.
    """
    (factor,) = scale
    merge.map(lambda chunk: chunk.sources[0] if factor is None else chunk.sources[0] * factor)
