"""Strategies that run modules again for their backward where nothing fits without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from graphpart.cost.memory.forecast import forecast_memory, trains, usable_bytes
from graphpart.cost.memory.recompute import members, recomputed
from graphpart.cost.memory.saved import Savings
from graphpart.errors import OutOfMemoryError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.memory.check import check_memory
from graphpart.strategies.memory.in_flight import Held, Holding
from graphpart.strategies.memory.recompute_blocks import blocks_of, largest_bytes
from graphpart.strategies.memory.recompute_milp import least_recomputation

Place = Callable[..., Placement]
"""A strategy."""


def recomputing(strategy: Place, groups: Mapping[str, str], automatic: bool) -> Place:
    """A strategy that knows of groups that run again, and may choose more of them.

    Args:
        strategy: what places operators.
        groups: group by operator name.
        automatic: whether more may run again where nothing fits otherwise: as little as makes it fit.

    Returns:
        A strategy whose placements say what runs again. Where all of a model's blocks together would not be enough, its
        ``OutOfMemoryError`` says so.
    """

    def placed(graph: Graph, cluster: Cluster, **options: Any) -> Placement:
        try:
            placement = strategy(recomputed(graph, groups), cluster, **_running(groups, strategy, options))
            if groups:
                placement = replace(placement, recompute=groups)
                check_memory(graph, placement, cluster, **options)  # with what a group saves while it runs again
        except OutOfMemoryError as error:
            if not automatic or not trains(graph):
                raise
            return _forced(strategy, graph, cluster, groups, error, options)
        return placement

    return placed


def _running(groups: Mapping[str, str], strategy: Place, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for a strategy that is told of groups as a property of the graph: looks have to run them again."""
    found = dict(options)
    holding: Holding | None = found.pop("holding", None)
    taken = signature(strategy).parameters.values()
    if holding is not None and any(p.name == "holding" or p.kind is p.VAR_KEYWORD for p in taken):
        found["holding"] = replace(holding, groups={**holding.groups, **groups})
    return found


def fitted(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    *,
    num_microbatches: int,
    memory_reserve: float,
    optimizer_bytes_per_element: float,
    holding: Holding | None = None,
    seen: Held | None = None,
    excess_bytes: Sequence[float] = (),
    **_: Any,
) -> Placement | None:
    """The placement, with as little more run again as makes it fit; None where nothing does.

    Args:
        graph: the traced model.
        placement: where everything runs.
        cluster: the devices.
        num_microbatches: parts of the batch.
        memory_reserve: part of each device's memory to leave free.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
        holding: what the step's schedule lets devices hold; all microbatches if None.
        seen: what devices hold if something else runs again, where it is known that something has to.
        excess_bytes: per device, bytes to leave free besides, where all microbatches are in flight.
    """
    counted = {"num_microbatches": num_microbatches, "optimizer_bytes_per_element": optimizer_bytes_per_element}
    limits: list[float] = [usable_bytes(device, memory_reserve) for device in cluster.devices]
    if holding is not None:
        held = seen or holding.of(placement)
        if seen is None and not any(held.over_bytes(limits)):
            return placement
        return _refitted(graph, placement, cluster, limits, holding, held, counted)
    limits = [limit - more for limit, more in zip(limits, excess_bytes or [0.0] * len(cluster), strict=True)]
    forecast = forecast_memory(graph, placement, len(cluster), **counted)  # type: ignore[arg-type]
    if all(device.total_bytes <= limit for device, limit in zip(forecast.devices, limits, strict=True)):
        return placement
    if not trains(graph):
        return None
    return least_recomputation(graph, placement, cluster, limits, **counted)  # type: ignore[arg-type]


def _refitted(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    limits: Sequence[float],
    holding: Holding,
    held: Held,
    counted: Mapping[str, Any],
) -> Placement | None:
    """The placement, with as little run again as makes every moment of a step fit, as far as looks at it show.

    Args:
        graph: the traced model.
        placement: where everything runs.
        cluster: the devices.
        limits: bytes that each device may hold.
        holding: what the step's schedule lets devices hold.
        held: what devices hold under such a placement, whatever runs again.
        counted: options of forecasts.
    """
    if not trains(graph):
        return None
    in_flight = held.in_flight
    spared = [0.0] * len(limits)
    for _ in range(_MOST_ROUNDS):
        left = [limit - more for limit, more in zip(limits, spared, strict=True)]
        found = least_recomputation(graph, placement, cluster, left, in_flight=in_flight, **counted)
        if found is None:
            return None
        held = holding.of(found)
        over = held.over_bytes(limits)
        if not any(over):
            return found
        in_flight = tuple(map(max, in_flight, held.in_flight))
        spared = [before + more for before, more in zip(spared, over, strict=True)]
    return None


def settled(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    groups: Mapping[str, str],
    peak_bytes: Callable[[Placement], Sequence[float]],
    **options: Any,
) -> Placement:
    """The placement, with so much run again by choice that every moment of a forecast step fits, if it can.

    Args:
        graph: the traced model.
        placement: where everything runs; what it runs again besides ``groups`` is by choice.
        cluster: the devices.
        groups: group by name of an operator that runs again anyway.
        peak_bytes: the most that each device holds at any moment under a placement.
        options: as strategies have them.
    """
    limits = [usable_bytes(device, options["memory_reserve"]) for device in cluster.devices]
    excess = [0.0] * len(limits)
    for _ in range(_MOST_ROUNDS if placement.recompute != groups else 0):
        over = [max(peak - limit, 0.0) for peak, limit in zip(peak_bytes(placement), limits, strict=True)]
        if not any(over):
            break
        excess = [before + more for before, more in zip(excess, over, strict=True)]
        bare = replace(placement, recompute=groups)
        found = fitted(graph, bare, cluster, excess_bytes=excess, **options)
        if found is None:
            break
        placement = found
    return placement


_MOST_ROUNDS = 3
"""Times that a choice is looked at along the step, and made anew with what it missed left free."""


def _forced(
    strategy: Place,
    graph: Graph,
    cluster: Cluster,
    groups: Mapping[str, str],
    error: OutOfMemoryError,
    options: Mapping[str, Any],
) -> Placement:
    """Place the model as if every block ran again, then keep as much as fits."""
    blocks = blocks_of(graph, groups, options["num_microbatches"])
    told = recomputed(graph, blocks)
    holding: Holding | None = options.get("holding")
    alone = Savings(graph, Placement({op.name: (Tile(0),) for op in graph.operators}), 1)
    largest = largest_bytes(alone, members(graph, blocks), options["num_microbatches"])[0]
    for spared_bytes in (0, largest):  # with less memory, a placement leaves room for the block that runs again
        try:
            placement = strategy(told, _without(cluster, spared_bytes), **_running(blocks, strategy, options))
        except OutOfMemoryError:
            continue
        seen = None if holding is None else holding.of(replace(placement, recompute=blocks))
        found = fitted(graph, replace(placement, recompute=groups), cluster, seen=seen, **options)
        if found is not None:
            return found
    raise OutOfMemoryError(
        f"{error} Nor would it fit if all {len(set(blocks.values()))} blocks ran again for their backward (recompute)."
    ) from error


def _without(cluster: Cluster, spared_bytes: float) -> Cluster:
    devices = (replace(d, memory_bytes=max(int(d.memory_bytes - spared_bytes), 1)) for d in cluster.devices)
    return replace(cluster, devices=tuple(devices))
