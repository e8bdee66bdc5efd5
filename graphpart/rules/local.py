"""What one tile of an operator calls: literals of the whole call (shapes, offsets, paddings, groups) made local."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Operator
from graphpart.ir.region import Intervals, Region

Local = tuple[str, tuple[Any, ...], Mapping[str, Any]]
"""Target, positional and keyword arguments of the local call; tensors are still the whole call's references."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One tile of one operator.

    Attributes:
        op: the operator, as called on whole tensors.
        rule: its axis rule.
        tile: index set per cut axis.
        operands: the region of every operand that the tile reads, in order.
        results: the region of every result that it makes.
    """

    op: Operator
    rule: AxisRule
    tile: Mapping[str, Intervals]
    operands: tuple[Region, ...]
    results: tuple[Region, ...]


def local_call(op: Operator, tile: Mapping[str, Intervals], operands: tuple[Region, ...]) -> Local:
    """The call that computes one tile from the regions that it reads.

    Args:
        op: the operator.
        tile: index set per cut axis; empty for the whole operator.
        operands: the region of every operand that the tile reads, in order.
    """
    if not tile or op.rule is None:
        return op.target, op.args, op.kwargs
    results = tuple(op.rule.region(dims, tile) for dims in op.rule.results)
    cut = Cut(op, op.rule, tile, operands, results)
    special = LOCAL.get(op.target.split(".")[1] if op.target.startswith("aten.") else op.target)
    if special is not None:
        return special(cut)
    return op.target, with_shape(cut), op.kwargs


def with_shape(cut: Cut) -> tuple[Any, ...]:
    """Positional arguments with the result's shape, where there is one, made the tile's."""
    at = cut.rule.shape_argument
    if at is None:
        return cut.op.args
    return (*cut.op.args[:at], cut.results[0].shape, *cut.op.args[at + 1 :])


LOCAL: Mapping[str, Callable[[Cut], Local]] = {}
"""By operator name: how literals other than the result's shape follow a tile."""
