"""Where parameters, buffers and constants live, given who reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from graphpart.cost.touched import touched_bytes
from graphpart.ir.graph import Graph, Operator, Source
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.region import Region
from graphpart.strategies.cuts.inverse_rules import shares_of

IsWorth = Callable[[Sequence[int], float], bool]
"""Whether so many bytes are worth a message of their own between these devices."""


def never(devices: Sequence[int], size_bytes: float) -> bool:
    """No pieces: each part is whole on one device."""
    return False


def homes_for(
    graph: Graph,
    tiles: Mapping[str, tuple[Tile, ...]],
    *,
    is_worth: IsWorth = never,
    weights: Sequence[float] = (),
) -> Placement:
    """The placement of these tiles with a home for every parameter, buffer and constant.

    A parameter that devices read in disjoint parts that cover it is at home in these parts. A part (or all of it) that
    several read is spread over them evenly, so that none of them sends and sums it for all others, where pieces are
    worth their messages; else it is at home on the one of them that keeps least so far. A buffer is at home with the
    operator that updates it, else with its first reader; what nobody reads on the first device used.

    Args:
        graph: the traced model.
        tiles: per operator name, its tiles.
        is_worth: whether pieces of a part are worth it; by default no part is spread.
        weights: the share of each device of the cluster; equal by default.
    """
    writers = {source: graph.producer[value] for source, value in graph.mutations if value in graph.producer}
    homes: dict[str, int] = {}
    shards: dict[str, tuple[Shard, ...]] = {}
    kept: dict[int, float] = {}
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
        value = source.value
        element_bytes = value.size_bytes / max(value.num_elements, 1)
        found: list[Shard] = []
        for region, readers in _parts(graph, source, tiles, placement):
            readers = readers or [first]
            pieces = _pieces(region, readers, element_bytes, is_worth, weights)
            if pieces is None:
                pieces = [Shard(min(readers, key=lambda device: (kept.get(device, 0), device)), region)]
            for piece in pieces:
                kept[piece.device] = kept.get(piece.device, 0) + piece.region.num_elements * element_bytes
            found += pieces
        if len(found) == 1:
            homes[value.name] = found[0].device
        else:
            shards[value.name] = tuple(found)
    return Placement(tiles, homes, shards)


def _pieces(
    region: Region, readers: Sequence[int], element_bytes: float, is_worth: IsWorth, weights: Sequence[float]
) -> list[Shard] | None:
    """A part that several devices read, cut among them; None where pieces are not worth it, or it is too short."""
    num_readers, shape = len(readers), region.shape
    if num_readers == 1 or not is_worth(readers, region.num_elements * element_bytes / num_readers):
        return None
    dim = next((i for i, extent in enumerate(shape) if extent >= num_readers), None)
    parts = None if dim is None else shares_of(shape[dim], [weights[d] if weights else 1.0 for d in readers])
    if dim is None or parts is None:
        return None
    return [
        Shard(device, region.with_dim(dim, region.dims[dim].at(part)))
        for device, part in zip(readers, parts, strict=True)
    ]


def _read_bytes(graph: Graph, source: Source, placement: Placement) -> dict[int, int]:
    """Bytes of a parameter that each device reads."""
    most: dict[int, int] = {}
    for op in graph.consumers[source.value.name]:
        for device, size_bytes in touched_bytes(op, source.value.name, graph, placement, {}).items():
            most[device] = max(most.get(device, 0), size_bytes)
    return most


def _parts(
    graph: Graph, source: Source, tiles: Mapping[str, tuple[Tile, ...]], placement: Placement
) -> list[tuple[Region, list[int]]]:
    """The parts that devices read, if they are disjoint and cover the parameter, or else all of it; each with readers.

    Who reads most of a parameter that is in one part counts as its reader.
    """
    value = source.value
    regions: dict[int, Region] = {}
    for op in graph.consumers[value.name]:
        for tile in tiles[op.name]:
            for region in _read_by(op, value.name, value.shape, tile):
                united = regions[tile.device] | region if tile.device in regions else region
                regions[tile.device] = united
    readers: dict[Region, list[int]] = {}  # several groups of devices may read the same parts
    for device, region in sorted(regions.items()):
        if region:
            readers.setdefault(region, []).append(device)
    found = list(readers)
    disjoint = not any(one & other for i, one in enumerate(found) for other in found[:i])
    if len(found) > 1 and disjoint and sum(region.num_elements for region in found) == value.num_elements:
        return list(readers.items())
    read_bytes = _read_bytes(graph, source, placement)
    most = max(read_bytes.values(), default=0)
    return [(Region.full(value.shape), [device for device, read in sorted(read_bytes.items()) if read == most])]


def _read_by(op: Operator, name: str, shape: Sequence[int], tile: Tile) -> list[Region]:
    if op.rule is None:
        return [Region.full(shape)]
    return [
        op.rule.region(dims, tile.axes)
        for operand, dims in zip(op.operands, op.rule.operands, strict=True)
        if operand == name
    ]
