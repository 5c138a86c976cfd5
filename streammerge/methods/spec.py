"""What a merge method is to those who read recipes and those who run them: its function, and what it can be told.

A method's keywords are its recipe keys: `@method` reads name, type and default from the signature, so that there is no
second list to keep. A keyword annotated `PerModel` is a key of each model's own `parameters` and arrives as a list in
the order of the models; any other is a key of the merge. `lambda_` is the recipe's `lambda`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

PerModel = Sequence[float | None]  # one value for each source of a tensor


@dataclass(frozen=True)
class Parameter:
    """A recipe key: float, int or bool, its default, and whether a recipe must give it."""

    type: type
    default: Any
    required: bool


@dataclass(frozen=True)
class MethodSpec:
    """A merge method.

    `run(merge, **parameters)` reads and writes one tensor (stream.Merge). `needs_base`: True if there must be a base,
    None if there may be one, False if a base is no more than another input. Where a base has a meaning it is not one of
    the sources. `count`: the least and the most sources (None: any number).
    """

    name: str
    run: Callable[..., None]
    parameters: dict[str, Parameter]
    model_parameters: dict[str, Parameter]
    needs_base: bool | None
    count: tuple[int, int | None]


def method(
    *, base: bool | None, count: tuple[int, int | None]
) -> Callable[[Callable[..., None]], MethodSpec]:
    """Make the MethodSpec of a function `name(merge, *, key: type = default, …)`."""

    def describe(run: Callable[..., None]) -> MethodSpec:
        own, models = {}, {}
        for key, told in list(signature(run, eval_str=True).parameters.items())[1:]:
            required = told.default is told.empty
            per_model = told.annotation is PerModel
            kind = float if per_model else told.annotation
            parameter = Parameter(kind, None if required else told.default, required)
            (models if per_model else own)[key.rstrip("_")] = parameter
        return MethodSpec(run.__name__.rstrip("_"), run, own, models, base, count)

    return describe
