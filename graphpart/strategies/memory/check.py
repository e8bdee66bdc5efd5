"""From chosen tiles to a placement that fits: homes for all that is kept, and memory checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.memory.homes import homes_for
from graphpart.strategies.memory.terms import Terms


def finish(
    graph: Graph,
    cluster: Cluster,
    tiles: Mapping[str, tuple[Tile, ...]],
    terms: Terms,
    *,
    shard_over: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Placement:
    """The placement of these tiles, parameters at home where they are read.

    Args:
        graph: the traced model.
        cluster: the devices.
        tiles: per operator name.
        terms: what to count with.
        shard_over: devices over which to cut parameters that several read whole, see :func:`homes_for`.
        weights: the shares of these devices.

    Raises:
        OutOfMemoryError: if a device is too small.
    """
    placement = homes_for(graph, tiles, shard_over=shard_over, weights=weights)
    check_memory(graph, placement, cluster, terms)
    return placement


def check_memory(graph: Graph, placement: Placement, cluster: Cluster, terms: Terms) -> None:
    """Raise unless a placement is forecast to fit.

    With a schedule, that takes a trial of the step, unless one microbatch in flight is too much already.

    Args:
        graph: the traced model.
        placement: where everything runs and lives.
        cluster: the devices.
        terms: what to count with.

    Raises:
        OutOfMemoryError: if a device is too small.
    """
    in_flight = terms.in_flight
    forecast = terms.memory(graph, placement, cluster, None if in_flight is None else 1)
    forecast.check(graph, placement, cluster, terms.memory_reserve)
    if in_flight is not None:
        in_flight.peak(placement).memory.check(graph, placement, cluster, terms.memory_reserve)
