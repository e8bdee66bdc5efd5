"""Operators that stand in for another one after a rewrite, with tiles made from its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Operator, Value
from graphpart.ir.placement import Tile


@dataclass(frozen=True)
class StandIn:
    """A new operator and its tiles."""

    operator: Operator
    tiles: tuple[Tile, ...]


def stand_in(
    op: Operator,
    target: str,
    args: tuple[Any, ...],
    results: tuple[Value, ...],
    rule: AxisRule | None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    works: bool = False,
) -> Operator:
    """An operator named after its first result, with the module path and source line of the one it stands in for.

    Args:
        op: the operator that is rewritten.
        target: what the new one computes.
        args: its positional arguments.
        results: its results.
        rule: its axis rule.
        kwargs: its keyword arguments.
        works: whether it takes over the old one's floating-point operations and what its backward keeps.
    """
    made = replace(op, name=results[0].name, target=target, args=args, kwargs=kwargs or {}, results=results, rule=rule)
    if works:
        return made
    return replace(made, flops_forward=0.0, flops_backward=0.0, saved=(), saved_extra_bytes=0)


def fit(tiles: tuple[Tile, ...], rule: AxisRule, *, replicas: bool) -> tuple[Tile, ...]:
    """Tiles of the old operator as tiles of a new one that has only some of its axes, under the same names.

    Args:
        tiles: the old operator's.
        rule: the new operator's rule.
        replicas: whether tiles that have become equal stay, one a device; else only the first of them does.
    """
    found: dict[object, Tile] = {}
    for tile in tiles:
        axes = {axis: part for axis, part in tile.axes.items() if axis in rule.extents and rule.can_cut(axis)}
        space = tuple(sorted(axes.items()))
        found.setdefault((tile.device, space) if replicas else space, Tile(tile.device, axes))
    return tuple(found.values())
