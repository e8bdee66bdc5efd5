"""Placements by hand, for tests: cut operators along one axis, and keep parameters where they are read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import graphpart as gp
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.region import Intervals, Region


def spans(sizes: Sequence[int]) -> list[Intervals]:
    """Neighbouring runs of these lengths, from 0 up."""
    ends = list(itertools.accumulate(sizes))
    return [Intervals.span(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def equal(extent: int, count: int) -> list[int]:
    """Sizes of ``count`` parts of an extent, as even as they can be."""
    size, larger = divmod(extent, count)
    return [size + (i < larger) for i in range(count)]


def result_axis(op: Operator, dim: int) -> str:
    """The axis that is a dimension of the first result."""
    assert op.rule is not None
    (axis,) = op.rule.results[0][dim]
    return axis


def along(axis: str, sets: Sequence[Intervals], devices: Sequence[int]) -> tuple[Tile, ...]:
    """One tile a device, each with its own part of an axis."""
    return tuple(Tile(device, {axis: part}) for device, part in zip(devices, sets, strict=True))


def copies(devices: Sequence[int]) -> tuple[Tile, ...]:
    """The whole operator on every one of these devices."""
    return tuple(Tile(device) for device in devices)


def place(graph: Graph, tiles: Mapping[str, tuple[Tile, ...]]) -> Placement:
    """A placement whose parameters are at home where they are read.

    A parameter of which every tile reads a part of its own is cut into those; any other is whole with its first reader.
    """
    homes: dict[str, int] = {}
    shards: dict[str, tuple[Shard, ...]] = {}
    for source in graph.sources:
        if source.kind == "input":
            continue
        name = source.value.name
        read: dict[Region, int] = {}
        for op in graph.consumers[name]:
            dims = op.rule.operands[op.operands.index(name)] if op.rule else ()
            for tile in tiles[op.name]:
                region = op.rule.region(dims, tile.axes) if op.rule else Region.full(source.value.shape)
                read.setdefault(region, tile.device)
        if len(read) > 1 and sum(region.num_elements for region in read) == source.value.num_elements:
            shards[name] = tuple(Shard(device, region) for region, device in read.items())
        else:
            homes[name] = next(iter(read.values()), 0)
    return Placement(tiles, homes, shards)


def sent(parted: gp.PartitionedModule) -> tuple[int, int]:
    """Messages and bytes that all workers have sent since the last forward began."""
    assert parted.last_step is not None
    return parted.last_step.num_messages, parted.last_step.message_bytes
