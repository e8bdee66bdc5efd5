"""From chosen tiles to a placement that fits: homes for all that is kept, and memory checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from graphpart.cost.time.collectives import slowest_link
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.memory.homes import homes_for, never
from graphpart.strategies.memory.terms import Terms


def finish(
    graph: Graph,
    cluster: Cluster,
    tiles: Mapping[str, tuple[Tile, ...]],
    terms: Terms,
    *,
    pieces: bool | None = False,
    weights: Sequence[float] = (),
) -> Placement:
    """The placement of these tiles, parameters at home where they are read.

    Args:
        graph: the traced model.
        cluster: the devices.
        tiles: per operator name.
        terms: what to count with.
        pieces: whether a parameter that several devices read alike is at home on all of them, a piece on each, or whole
            on the one that keeps least; None for pieces where it takes longer to send one than to begin to.
        weights: the share of each device in what is spread; equal by default.

    Raises:
        OutOfMemoryError: if a device is too small.
    """
    links = lru_cache(maxsize=None)(lambda devices: slowest_link(cluster, devices))

    def is_worth(devices: Sequence[int], size_bytes: float) -> bool:
        # Of n devices, one home alone would carry all of it n - 1 times: nS/β against S/β, for n times the messages.
        link = links(tuple(devices))
        return bool(pieces) or size_bytes > link.latency_s * link.bandwidth_bytes_per_s

    placement = homes_for(graph, tiles, is_worth=never if pieces is False else is_worth, weights=weights)
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
