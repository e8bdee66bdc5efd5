"""Where parameters, buffers and constants live, given who reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphpart.cost.touched import touched_bytes
from graphpart.ir.graph import Graph, Operator, Source
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.region import Region
from graphpart.strategies.cuts.inverse_rules import shares_of


def homes_for(
    graph: Graph,
    tiles: Mapping[str, tuple[Tile, ...]],
    *,
    shard_over: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Placement:
    """The placement of these tiles with a home for every parameter, buffer and constant.

    A parameter that devices read in disjoint parts that cover it is at home in these parts. One that is read whole by
    several is at home on the one of them that keeps least so far; a buffer with the operator that updates it, else
    with its first reader; what nobody reads on the first device used.

    Args:
        graph: the traced model.
        tiles: per operator name, its tiles.
        shard_over: devices over which to cut parameters that several read whole, evenly along dimension 0 (ZeRO-3,
            Rajbhandari et al., SC 2020); none by default.
        weights: the shares of these devices; equal by default.
    """
    writers = {source: graph.producer[value] for source, value in graph.mutations if value in graph.producer}
    homes: dict[str, int] = {}
    shards: dict[str, tuple[Shard, ...]] = {}
    kept: dict[int, int] = {}
    first = next((cut[0].device for cut in tiles.values()), 0)
    placement = Placement(tiles)
    parameters = []
    for source in graph.sources:
        name = source.value.name
        if source.kind == "parameter":
            parameters.append(source)
        elif source.kind != "input":
            user = writers.get(name) or next(iter(graph.consumers[name]), None)
            homes[name] = tiles[user.name][0].device if user is not None else first
    for source in sorted(parameters, key=lambda s: -s.value.size_bytes):
        name, size_bytes = source.value.name, source.value.size_bytes
        read_bytes = _read_bytes(graph, source, placement)
        parts = _parts(graph, source, tiles) if len(read_bytes) > 1 else None
        if parts is None and len(read_bytes) > 1 and shard_over:
            parts = _even_parts(source, shard_over, weights or [1.0] * len(shard_over))
        if parts is not None:
            shards[name] = parts
            for shard in parts:
                kept[shard.device] = kept.get(shard.device, 0) + size_bytes * shard.region.num_elements // max(
                    source.value.num_elements, 1
                )
            continue
        most = max(read_bytes.values(), default=0)
        readers = [device for device, read in read_bytes.items() if read == most] or [first]
        homes[name] = min(readers, key=lambda device: (kept.get(device, 0), device))
        kept[homes[name]] = kept.get(homes[name], 0) + size_bytes
    return Placement(tiles, homes, shards)


def _read_bytes(graph: Graph, source: Source, placement: Placement) -> dict[int, int]:
    """Bytes of a parameter that each device reads."""
    most: dict[int, int] = {}
    for op in graph.consumers[source.value.name]:
        for device, size_bytes in touched_bytes(op, source.value.name, graph, placement, {}).items():
            most[device] = max(most.get(device, 0), size_bytes)
    return most


def _parts(graph: Graph, source: Source, tiles: Mapping[str, tuple[Tile, ...]]) -> tuple[Shard, ...] | None:
    """The parts that devices read, if they are disjoint and cover the parameter."""
    value = source.value
    regions: dict[int, Region] = {}
    for op in graph.consumers[value.name]:
        for tile in tiles[op.name]:
            for region in _read_by(op, value.name, value.shape, tile):
                united = regions[tile.device] | region if tile.device in regions else region
                regions[tile.device] = united
    first: dict[Region, int] = {}  # several groups of devices may read the same parts
    for device, region in sorted(regions.items()):
        if region:
            first.setdefault(region, device)
    found = [(device, region) for region, device in first.items()]
    if sum(region.num_elements for _, region in found) != value.num_elements:
        return None
    if any(one & other for i, (_, one) in enumerate(found) for _, other in found[:i]):
        return None
    return tuple(Shard(device, region) for device, region in found) if len(found) > 1 else None


def _read_by(op: Operator, name: str, shape: Sequence[int], tile: Tile) -> list[Region]:
    if op.rule is None:
        return [Region.full(shape)]
    return [
        op.rule.region(dims, tile.axes)
        for operand, dims in zip(op.operands, op.rule.operands, strict=True)
        if operand == name
    ]


def _even_parts(source: Source, devices: Sequence[int], weights: Sequence[float]) -> tuple[Shard, ...] | None:
    """A parameter cut along its first dimension; None where that is shorter than the number of devices."""
    shape = source.value.shape
    parts = shares_of(shape[0], weights) if shape else None
    if parts is None:
        return None
    rest = Region.full(shape[1:]).dims
    return tuple(Shard(device, Region((part, *rest))) for device, part in zip(devices, parts, strict=True))
