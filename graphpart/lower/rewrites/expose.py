"""Rewrite operators that a placement, or microbatches, cut where they cannot be cut as they stand.

A mean becomes a sum and a quotient, a cross-entropy over cut classes per-tile logsumexps and picked scores, a
BatchNorm over cut samples sums and a local normalisation. The parts can be cut where the whole could not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.lower.rewrites.batch_norm import TARGET as BATCH_NORM
from graphpart.lower.rewrites.batch_norm import WITHOUT_STATISTICS, share_batch_norm
from graphpart.lower.rewrites.cross_entropy import split_classes
from graphpart.lower.rewrites.means import LOSSES, MEANS, split_loss, split_mean
from graphpart.lower.rewrites.standin import StandIn
from graphpart.lower.samples import Samples

Rewriter = Callable[[Graph, Operator, tuple[Tile, ...]], list[StandIn]]


def expose(graph: Graph, placement: Placement, samples: Samples) -> tuple[Graph, Placement]:
    """Rewrite what has to be rewritten, and place the new operators where the old ones were.

    Args:
        graph: the traced graph.
        placement: its placement; tiles may cut ``rewritten`` axes.
        samples: its sample axis; empty where there is one microbatch.

    Raises:
        PlacementError: if an operator is cut where only a rewrite could help and none is known.
    """
    operators: list[Operator] = []
    tiles, again = dict(placement.tiles), dict(placement.recompute)
    for op in graph.operators:
        stand_ins = _rewrite(graph, op, tiles[op.name], samples)
        if stand_ins is None:
            operators.append(op)
            continue
        del tiles[op.name]
        group = again.pop(op.name, "")
        for stand_in in stand_ins:
            operators.append(stand_in.operator)
            tiles[stand_in.operator.name] = stand_in.tiles
            if group:
                again[stand_in.operator.name] = group
    if len(operators) == len(graph.operators):
        return graph, placement
    return replace(graph, operators=tuple(operators)), replace(placement, tiles=tiles, recompute=again)


def _rewrite(graph: Graph, op: Operator, tiles: tuple[Tile, ...], samples: Samples) -> list[StandIn] | None:
    if op.rule is None:
        return None
    in_space = {axis for tile in tiles for axis in tile.axes} & op.rule.rewritten
    in_time = {samples.rewritten[op.name]} if op.name in samples.rewritten else set()
    if op.target in (
        BATCH_NORM,
        WITHOUT_STATISTICS,
    ):  # in time, waiting for all of its samples is cheaper than cutting it up
        in_time = set()
    if not in_space and not in_time:
        return None
    rewriter = _rewriter(op, in_space)
    if rewriter is None:
        axes = ", ".join(sorted(in_space | in_time))
        raise PlacementError(f"operator {op} is cut along {axes}, and no rewrite is known that would make that exact")
    return rewriter(graph, op, tiles)


def _rewriter(op: Operator, in_space: set[str]) -> Rewriter | None:
    if op.target == "aten.cross_entropy_loss.default" and "c" in in_space:
        return split_classes
    if op.target in LOSSES:
        return split_loss
    return REWRITERS.get(op.target)


REWRITERS: Mapping[str, Rewriter] = {
    **dict.fromkeys(MEANS, split_mean),
    BATCH_NORM: share_batch_norm,
    WITHOUT_STATISTICS: share_batch_norm,
}
