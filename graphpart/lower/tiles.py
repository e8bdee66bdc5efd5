"""Cut operators into tiles: in space as the placement says, and in time by microbatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphpart.ir.axes import AxisRule, Window
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals
from graphpart.lower.parts import Term
from graphpart.lower.samples import Samples


@dataclass(frozen=True)
class TileInTime(Tile):
    """One tile of an operator, for one microbatch.

    Attributes:
        microbatch: which microbatch, or None if the step computes it once.
        term: which partial result of the operator's it makes; empty where it makes a part of the results.
    """

    microbatch: int | None = None
    term: Term = ()


def tiles_of(
    op: Operator, tiles: Sequence[Tile], samples: Samples, microbatches: Sequence[Intervals], first_device: int
) -> list[TileInTime]:
    """All tiles of an operator, by microbatch and then in the placement's order; devices count from a first.

    A tile that is cut along the samples is cut once more by each microbatch; where they have no sample in common there
    is nothing to do.
    """
    axis = samples.axes.get(op.name) if len(microbatches) > 1 else None
    if axis is None:
        return [_tile(op, tile, None, tile.axes, first_device) for tile in tiles]
    found = []
    for m, part in enumerate(microbatches):
        own = axis.position.expand(part, samples.batch)
        for tile in tiles:
            indices = tile.axes[axis.axis] & own if axis.axis in tile.axes else own
            if indices:
                found.append(_tile(op, tile, m, {**tile.axes, axis.axis: indices}, first_device))
    return found


def _tile(
    op: Operator, tile: Tile, microbatch: int | None, axes: Mapping[str, Intervals], first_device: int
) -> TileInTime:
    sums = op.rule.sums if op.rule else frozenset[str]()
    term = tuple((axis, part) for axis, part in axes.items() if axis in sums)
    return TileInTime(tile.device - first_device, axes, tile.reads, microbatch, term)


def windows_seen(op: Operator) -> list[str]:
    """The operands that an operator sees only a part of, by windows: for these, :func:`narrowed` asks who has them."""
    if op.rule is None:
        return []
    return [
        name
        for name, dims in zip(op.operands, op.rule.operands, strict=True)
        if any(isinstance(dim, Window) and _sees(op.rule, dim) < dim.extent for dim in dims)
    ]


def _sees(rule: AxisRule, window: Window) -> int:
    """How many indices a window reads for all of its axis."""
    return len(window.reads(Intervals.full(rule.extents[window.axis])))


def narrowed(op: Operator, tile: TileInTime, is_at_hand: Callable[[str], bool]) -> TileInTime:
    """A tile that reads only what its windows see of operands that are elsewhere.

    A slice that is not cut is called as it stands, on all of its operand. Where that has to be brought from another
    device, the part that is sliced is enough.

    Args:
        op: the operator.
        tile: one of its tiles.
        is_at_hand: whether the tile's device has a value, by name.
    """
    if op.rule is None:
        return tile
    axes = dict(tile.axes)
    for name, dims in zip(op.operands, op.rule.operands, strict=True):
        for dim in dims:
            if not isinstance(dim, Window) or dim.axis in axes:
                continue
            if _sees(op.rule, dim) < dim.extent and not is_at_hand(name):
                axes[dim.axis] = Intervals.full(op.rule.extents[dim.axis])
    return replace(tile, axes=axes) if len(axes) > len(tile.axes) else tile


def sample_sets(graph: Graph, placement: Placement, samples: Samples) -> list[Intervals]:
    """Every set of samples that some tile is cut to in space; microbatches take a part of each."""
    found: dict[Intervals, None] = {}
    for name, axis in samples.axes.items():
        for tile in placement.tiles[name]:
            if axis.axis in tile.axes:
                found[axis.position.project(tile.axes[axis.axis], samples.batch)] = None
    return list(found)


def replicate_constants(graph: Graph, placement: Placement) -> dict[str, tuple[Tile, ...]]:
    """Tiles with every operator that is made from no source put on each device that reads it."""
    tiles = dict(placement.tiles)
    for op in reversed(graph.operators):
        if op.name not in graph.unsourced:
            continue
        readers = {t.device for v in op.results for user in graph.consumers[v.name] for t in tiles[user.name]}
        if readers:
            tiles[op.name] = tuple(Tile(device) for device in sorted(readers))
    return tiles
