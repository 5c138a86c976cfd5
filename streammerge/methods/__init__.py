"""The merge methods that need no data, one a file. Importing this imports no torch."""

from .breadcrumbs import breadcrumbs
from .breadcrumbs_ties import breadcrumbs_ties
from .dare_linear import dare_linear
from .dare_ties import dare_ties
from .della import della
from .della_linear import della_linear
from .karcher import karcher
from .linear import linear
from .model_stock import model_stock
from .nuslerp import nuslerp
from .passthrough import passthrough
from .sce import sce
from .slerp import slerp
from .spec import MethodSpec, Parameter
from .task_arithmetic import task_arithmetic
from .ties import ties

__all__ = ["METHODS", "MethodSpec", "Parameter"]

METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        linear, task_arithmetic, ties, dare_linear, dare_ties, slerp, nuslerp, karcher, model_stock, sce, della,
        della_linear, breadcrumbs, breadcrumbs_ties, passthrough,
    )
}  # fmt: skip
