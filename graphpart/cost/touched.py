"""What a tile of an operator does, reads and makes: its share of the work, and regions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from graphpart.ir.graph import Graph, Operator, Value
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Region


def operator_share(op: Operator, tile: Tile) -> float:
    """Part of the operator's iteration space in a tile."""
    if op.rule is None:
        return 1.0
    return prod(len(index_set) / op.rule.extents[axis] for axis, index_set in tile.axes.items())


def touched_bytes(
    op: Operator, name: str, graph: Graph, placement: Placement, roots: Mapping[str, str]
) -> dict[int, int]:
    """Per device, the bytes of a value that the operator's tiles read or make there.

    Where they see a view of it, they hold the same share of it as of the view.

    Args:
        op: the operator.
        name: the value; it may be the storage of an operand or a result.
        graph: the traced model.
        placement: tiles of the operator.
        roots: per value, whose storage it shares, see :func:`graphpart.cost.storage.storage_roots`.
    """
    seen = graph.values[_as_seen(op, name, roots)]
    regions: dict[int, Region] = {}
    for tile in placement.tiles[op.name]:
        region = touched_region(op, seen, tile)
        regions[tile.device] = regions[tile.device] | region if tile.device in regions else region
    size_bytes, whole = graph.values[name].size_bytes, max(seen.num_elements, 1)
    return {d: ceil(size_bytes * min(region.num_elements / whole, 1.0)) for d, region in regions.items()}


def _as_seen(op: Operator, name: str, roots: Mapping[str, str]) -> str:
    """The operand or result by which an operator has a value: itself, or a view of it."""
    seen = (*op.operands, *(value.name for value in op.results))
    if name in seen:
        return name
    return next((other for other in seen if roots[other] == roots[name]), name)


def touched_region(op: Operator, value: Value, tile: Tile) -> Region:
    """The region of a value that a tile of an operator reads or makes; empty where a window lies outside of it."""
    whole = Region.full(value.shape)
    if op.rule is None or not tile.axes:
        return whole
    for result, dims in zip(op.results, op.rule.results, strict=False):
        if result.name == value.name:
            return op.rule.region(dims, tile.axes)
    found: Region | None = None
    for operand, needed in zip(op.operands, op.rule.operands, strict=False):
        if operand == value.name:
            region = op.rule.region(needed, tile.axes)
            found = found | region if found is not None else region
    return whole if found is None else found
