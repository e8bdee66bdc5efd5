"""Operators that stand in for another one after a rewrite, with tiles made from its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Graph, Operator, Value
from graphpart.ir.placement import Tile
from graphpart.rules.flops import flops


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
    saved: tuple[str, ...] = (),
    saved_extra_bytes: int = 0,
) -> Operator:
    """An operator named after its first result, with the module path and source line of the one it stands in for.

    It has no work yet; see :func:`with_work`.

    Args:
        op: the operator that is rewritten.
        target: what the new one computes.
        args: its positional arguments.
        results: its results.
        rule: its axis rule.
        kwargs: its keyword arguments.
        saved: names of operands and results that its backward keeps.
        saved_extra_bytes: bytes its backward keeps besides those.
    """
    return replace(
        op,
        name=results[0].name,
        target=target,
        args=args,
        kwargs=kwargs or {},
        results=results,
        rule=rule,
        flops_forward=0.0,
        flops_backward=0.0,
        saved=saved,
        saved_extra_bytes=saved_extra_bytes,
        stands_for=op.origin,
    )


def with_work(graph: Graph) -> Graph:
    """The graph with the floating-point operations of operators that stand in for others, from their own shapes."""
    if not any(op.stands_for for op in graph.operators):
        return graph
    wants = {s.value.name: s.trainable for s in graph.sources}
    wants.update((value.name, value.requires_grad) for op in graph.operators for value in op.results)

    def work(op: Operator) -> Operator:
        shapes = [graph.values[name].shape for name in op.operands]
        forward, backward = flops(
            op.target, op.rule, shapes, [v.shape for v in op.results], [wants[name] for name in op.operands]
        )
        has_backward = any(value.requires_grad for value in op.results)
        return replace(op, flops_forward=forward, flops_backward=backward if has_backward else 0.0)

    return replace(graph, operators=tuple(work(op) if op.stands_for else op for op in graph.operators))


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
