"""What the tiles of an operator read and make on each device."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement
from graphpart.ir.region import Region


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
        region = tile.region(op, seen)
        regions[tile.device] = regions[tile.device] | region if tile.device in regions else region
    size_bytes, whole = graph.values[name].size_bytes, max(seen.num_elements, 1)
    return {d: ceil(size_bytes * min(region.num_elements / whole, 1.0)) for d, region in regions.items()}


def _as_seen(op: Operator, name: str, roots: Mapping[str, str]) -> str:
    """The operand or result by which an operator has a value: itself, or a view of it."""
    seen = (*op.operands, *(value.name for value in op.results))
    if name in seen:
        return name
    return next((other for other in seen if roots[other] == roots[name]), name)
