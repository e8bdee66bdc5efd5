"""From chosen tiles to a placement that fits: homes for all that is kept, and memory checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphpart.cost.memory.forecast import forecast_memory
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.memory.homes import homes_for
from graphpart.strategies.memory.in_flight import Holding


def finish(
    graph: Graph,
    cluster: Cluster,
    tiles: Mapping[str, tuple[Tile, ...]],
    *,
    num_microbatches: int,
    optimizer_bytes_per_element: float,
    memory_reserve: float,
    holding: Holding | None = None,
    shard_over: Sequence[int] = (),
    weights: Sequence[float] = (),
) -> Placement:
    """The placement of these tiles, parameters at home where they are read.

    Args:
        graph: the traced model.
        cluster: the devices.
        tiles: per operator name.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
        memory_reserve: part of each device's memory to leave free.
        holding: what the step's schedule lets devices hold; all microbatches if None.
        shard_over: devices over which to cut parameters that several read whole, see :func:`homes_for`.
        weights: the shares of these devices.

    Raises:
        OutOfMemoryError: if a device is too small.
    """
    placement = homes_for(graph, tiles, shard_over=shard_over, weights=weights)
    check_memory(
        graph,
        placement,
        cluster,
        num_microbatches=num_microbatches,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        memory_reserve=memory_reserve,
        holding=holding,
    )
    return placement


def check_memory(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    *,
    num_microbatches: int,
    optimizer_bytes_per_element: float,
    memory_reserve: float,
    holding: Holding | None = None,
    **_: Any,
) -> None:
    """Raise unless a placement is forecast to fit.

    With a schedule, that takes a look at the step, unless one microbatch in flight is too much already.

    Args:
        graph: the traced model.
        placement: where everything runs and lives.
        cluster: the devices.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
        memory_reserve: part of each device's memory to leave free.
        holding: what the step's schedule lets devices hold; all microbatches if None.

    Raises:
        OutOfMemoryError: if a device is too small.
    """
    forecast = forecast_memory(
        graph,
        placement,
        len(cluster),
        num_microbatches=num_microbatches,
        in_flight=None if holding is None else 1,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
    )
    forecast.check(graph, placement, cluster, memory_reserve)
    if holding is not None:
        holding.of(placement).memory.check(graph, placement, cluster, memory_reserve)
