"""Reuse of a plan for another trace of the same model: other batch size, eval mode, other operator names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from graphpart.cost.memory.fused_attention import with_fused_attention
from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Shard, Tile, default_homes
from graphpart.ir.region import Intervals, Region
from graphpart.planning.plan import Plan
from graphpart.strategies import groups_of

_Key = tuple[str, str, int]


def reused(plan: Plan, graph: Graph) -> Plan:
    """The same decision for another trace of the same model: other shapes, or eval mode.

    Parameters stay where they are. Where the batch has fewer samples than the plan has microbatches, each sample is
    its own microbatch.
    """
    graph = with_fused_attention(graph, plan.cluster)
    placement = reused_placement(plan.placement, plan.graph, graph)
    if plan.choices.recompute == "auto":
        placement = replace(placement, recompute={**placement.recompute, **groups_of(graph, "auto")})
    sizes = [graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()]
    choices = replace(plan.choices, num_microbatches=max(1, min([plan.num_microbatches, *sizes])))
    return replace(plan, graph=graph, placement=placement, choices=choices, candidates=())


def reused_placement(placement: Placement, old_graph: Graph, new_graph: Graph) -> Placement:
    """Carry a placement over to a new trace of the same model.

    Parameters, buffers and constants keep their homes, by the model's names for them. An operator takes the tiles
    of the one with the same module path, target and position among those; failing that, the device of the first
    operator of its module path; else where its first operand is made or at home; else the preceding operator's.
    Tiles of an axis whose extent changed keep their shares. What runs again for its backward does so in the new trace,
    unless it was the model's own wish (``checkpoint``), which each trace states anew.

    Args:
        placement: a placement of the old graph.
        old_graph: the graph it was made for.
        new_graph: the new trace.

    Raises:
        PlacementError: if the placement does not place an operator of the old graph.
    """
    for op in old_graph.operators:
        if not placement.tiles.get(op.name):
            raise PlacementError(f"the placement to reuse over has no device for operator {op}")
    kept = _kept_homes(placement, old_graph, new_graph)
    twins = dict(_keys(old_graph))
    device_of_module: dict[str, int] = {}
    for op in old_graph.operators:
        device_of_module.setdefault(op.module_path, placement.device(op.name))
    tiles: dict[str, tuple[Tile, ...]] = {}
    preceding = 0
    for key, op in _keys(new_graph):
        twin = twins.get(key)
        if twin is not None:
            tiles[op.name] = _refit(placement.tiles[twin.name], twin, op)
        elif op.module_path in device_of_module:
            tiles[op.name] = (Tile(device_of_module[op.module_path]),)
        else:
            tiles[op.name] = (Tile(_operand_device(op, new_graph, tiles, kept, preceding)),)
        preceding = tiles[op.name][0].device
    homes = default_homes(new_graph, {name: cut[0].device for name, cut in tiles.items()})
    shards = {name: parts for name, parts in kept.items() if len(parts) > 1}
    homes.update((name, parts[0].device) for name, parts in kept.items())
    again = _recomputed(placement, old_graph, new_graph)
    return Placement(tiles, {name: home for name, home in homes.items() if name not in shards}, shards, again)


def _recomputed(placement: Placement, old_graph: Graph, new_graph: Graph) -> dict[str, str]:
    """Groups that run again: those of an operator's twin, or else of its module."""
    chosen = {n: group for n, group in placement.recompute.items() if group != old_graph.operator[n].recompute}
    twins = dict(_keys(old_graph))
    of_module = {op.module_path: chosen.get(op.name, "") for op in reversed(old_graph.operators)}
    found = {}
    for key, op in _keys(new_graph):
        group = chosen.get(twins[key].name, "") if key in twins else of_module.get(op.module_path, "")
        if group:
            found[op.name] = group
    return found


def _keys(graph: Graph) -> Iterator[tuple[_Key, Operator]]:
    """Each operator with what identifies it across traces."""
    seen: Counter[tuple[str, str]] = Counter()
    for op in graph.operators:
        kind = (op.module_path, op.target)
        yield (*kind, seen[kind]), op
        seen[kind] += 1


def _kept_homes(placement: Placement, old_graph: Graph, new_graph: Graph) -> dict[str, tuple[Shard, ...]]:
    """Homes of the new graph's parameters, buffers and constants that the old graph had under one of their names."""
    home_of = {
        (source.kind == "constant", name): (source.value.shape, placement.home(source.value))
        for source in old_graph.sources
        if source.kind != "input"
        for name in source.names
    }
    kept: dict[str, tuple[Shard, ...]] = {}
    for source in new_graph.sources:
        # A constant's name is made up while tracing; it must not pass for a parameter's.
        found = [home_of[key] for name in source.names if (key := (source.kind == "constant", name)) in home_of]
        if found and source.kind != "input":
            old_shape, shards = found[0]
            kept[source.value.name] = _refit_home(shards, old_shape, source.value.shape)
    return kept


def _refit_home(shards: tuple[Shard, ...], old_shape: tuple[int, ...], new_shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """The same shares of a parameter whose sizes may have changed; whole on the first device where they can't be."""
    whole = (Shard(shards[0].device, Region.full(new_shape)),)
    if len(shards) == 1 or len(old_shape) != len(new_shape):
        return whole
    found = []
    for shard in shards:
        sides = zip(shard.region.dims, old_shape, new_shape, strict=True)
        region = Region(tuple(_scale(part, old, new) for part, old, new in sides))
        if not region:
            return whole
        found.append(Shard(shard.device, region))
    return tuple(found)


def _refit(tiles: tuple[Tile, ...], old: Operator, new: Operator) -> tuple[Tile, ...]:
    """The same tiles for an operator whose extents may have changed; whole where they can't be."""
    if not any(tile.axes for tile in tiles):
        return tiles
    if old.rule is None or new.rule is None:
        return (Tile(tiles[0].device),)
    found = []
    for tile in tiles:
        axes = {}
        for axis, part in tile.axes.items():
            if axis not in new.rule.cuttable:
                return (Tile(tiles[0].device),)
            axes[axis] = _scale(part, old.rule.extents[axis], new.rule.extents[axis])
        if all(axes.values()):  # with fewer indices than devices, some have nothing to do
            found.append(Tile(tile.device, axes, tile.reads))
    return tuple(found)


def _scale(part: Intervals, old_extent: int, new_extent: int) -> Intervals:
    """The same share of another extent; parts that covered the old one cover the new one."""
    if old_extent == new_extent:
        return part
    return Intervals.of((a * new_extent // old_extent, b * new_extent // old_extent) for a, b in part.runs)


def _operand_device(
    op: Operator,
    graph: Graph,
    tiles: Mapping[str, tuple[Tile, ...]],
    homes: Mapping[str, tuple[Shard, ...]],
    preceding: int,
) -> int:
    """Where the first operand with a place is made or at home."""
    for name in op.operands:
        maker = graph.producer.get(name)
        if maker is not None:
            return tiles[maker.name][0].device
        if name in homes:
            return homes[name][0].device
    return preceding
