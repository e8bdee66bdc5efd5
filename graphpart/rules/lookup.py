"""The axis rule of an operator call, found in the tables of all families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphpart.errors import GraphError
from graphpart.ir.axes import AxisRule
from graphpart.rules.call import Call
from graphpart.rules.families import (
    contraction,
    convolution,
    creation,
    elementwise,
    indexing,
    losses,
    matrices,
    normalization,
    pooling,
    reduction,
    resampling,
    views,
)
from graphpart.rules.register import RULES
from graphpart.rules.table import Families, Family

FAMILIES: Families = {
    **contraction.FAMILIES,
    **convolution.FAMILIES,
    **pooling.FAMILIES,
    **resampling.FAMILIES,
    **normalization.FAMILIES,
    **elementwise.FAMILIES,
    **reduction.FAMILIES,
    **views.FAMILIES,
    **indexing.FAMILIES,
    **creation.FAMILIES,
    **losses.FAMILIES,
    **matrices.FAMILIES,
}


def rule_for(
    target: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shape_of: Callable[[str], tuple[int, ...]],
    result_shapes: Sequence[tuple[int, ...]],
    pointwise: bool,
    dtype_of: Callable[[str], str] = lambda name: "",
) -> AxisRule | None:
    """The axis rule of one operator call.

    Args:
        target: such as ``aten.linear.default``.
        args: positional arguments; tensors are ``Ref``, possibly in nested lists.
        kwargs: keyword arguments, likewise.
        shape_of: shape of a value by its name.
        result_shapes: shapes of the results.
        pointwise: whether torch tags the operator ``torch.Tag.pointwise``.
        dtype_of: dtype of a value by its name, which tells masks from indices; empty where it isn't known.

    Returns:
        The rule, operands in the order of ``refs((args, kwargs))``; None where the operator, or this use of
        it, can only be computed whole.
    """
    row = _row(target)
    if row is None and not pointwise:
        return None
    rule = row.rule if row else elementwise.pointwise
    call = Call(target, row.names if row else (), args, kwargs, shape_of, tuple(map(tuple, result_shapes)), dtype_of)
    try:
        return rule(call)
    except GraphError:
        if row is not None and row in RULES.values():
            raise  # the user's own notation does not fit the user's own call
        # A use of the operator that its family does not describe: whole is always right.
        return None


def names_of(target: str) -> tuple[str, ...]:
    """The schema's names of an operator's positional arguments, as far as its rule knows them."""
    row = _row(target)
    return row.names if row else ()


def _row(target: str) -> Family | None:
    """The table row: of this overload if it has its own, else of the operator."""
    namespace, _, rest = target.partition(".")
    name, _, _overload = rest.partition(".")
    keys = (rest, name) if namespace == "aten" else (target, f"{namespace}.{name}")
    if f"{namespace}.{name}" in RULES:
        return RULES[f"{namespace}.{name}"]
    return next((FAMILIES[key] for key in keys if key in FAMILIES), None)
