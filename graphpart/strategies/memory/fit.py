"""Strategies that run modules again for their backward where nothing fits without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphpart.cost.memory.forecast import trains
from graphpart.cost.memory.recompute import members, recomputed
from graphpart.cost.memory.saved import Savings
from graphpart.errors import OutOfMemoryError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.memory.check import check_memory
from graphpart.strategies.memory.in_flight import InFlight, StepPeak
from graphpart.strategies.memory.recompute_blocks import blocks_of, largest_bytes
from graphpart.strategies.memory.recompute_milp import least_recomputation
from graphpart.strategies.memory.terms import Terms

Strategy = Callable[..., Placement]
"""``strategy(graph, cluster, terms, **options) -> Placement``; raises a ``PlacementError`` where it has no plan."""

_MOST_ROUNDS = 3
"""At most this many rounds of: choose, simulate, reserve the bytes by which it overflowed."""


def recomputing(strategy: Strategy, groups: Mapping[str, str], automatic: bool) -> Strategy:
    """A strategy that knows of groups that run again, and may choose more of them.

    Args:
        strategy: what places operators.
        groups: group by operator name.
        automatic: whether more may run again where nothing fits otherwise: as little as makes it fit.

    Returns:
        A strategy whose placements say what runs again. Where all of a model's blocks together would not be enough, its
        ``OutOfMemoryError`` says so.
    """

    def placed(graph: Graph, cluster: Cluster, terms: Terms, **options: Any) -> Placement:
        try:
            # Groups are a property of the graph here: trials have to run them again.
            placement = strategy(recomputed(graph, groups), cluster, terms.with_groups(groups), **options)
            if groups:
                placement = replace(placement, recompute=groups)
                check_memory(graph, placement, cluster, terms)  # with what a group saves while it runs again
        except OutOfMemoryError as error:
            if not automatic or not trains(graph):
                raise
            return _forced(strategy, graph, cluster, groups, error, terms, options)
        return placement

    return placed


def fitted(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    terms: Terms,
    *,
    seen: StepPeak | None = None,
    excess_bytes: Sequence[float] = (),
) -> Placement | None:
    """The placement, with as little more run again as makes it fit; None where nothing does.

    Args:
        graph: the traced model.
        placement: where everything runs.
        cluster: the devices.
        terms: what to count with.
        seen: what devices hold if something else runs again, where it is known that something has to.
        excess_bytes: per device, bytes to leave free besides, where all microbatches are in flight.
    """
    limits = terms.limits_bytes(cluster)
    if terms.in_flight is not None:
        peak = seen or terms.in_flight.peak(placement)
        if seen is None and not any(peak.over_bytes(limits)):
            return placement
        return _refitted(graph, placement, cluster, terms, terms.in_flight, peak)
    limits = [limit - more for limit, more in zip(limits, excess_bytes or [0.0] * len(cluster), strict=True)]
    forecast = terms.memory(graph, placement, cluster)
    if all(device.total_bytes <= limit for device, limit in zip(forecast.devices, limits, strict=True)):
        return placement
    if not trains(graph):
        return None
    return least_recomputation(graph, placement, cluster, limits, terms)


def _refitted(
    graph: Graph, placement: Placement, cluster: Cluster, terms: Terms, in_flight: InFlight, peak: StepPeak
) -> Placement | None:
    """The placement, with as little run again as makes every moment of a step fit, as far as trials show.

    Args:
        graph: the traced model.
        placement: where everything runs.
        cluster: the devices.
        terms: what to count with.
        in_flight: what the step's schedule lets devices hold.
        peak: what devices hold under such a placement, whatever runs again.
    """
    if not trains(graph):
        return None
    limits = terms.limits_bytes(cluster)
    flights = peak.in_flight
    spared = [0.0] * len(limits)
    for _ in range(_MOST_ROUNDS):
        left = [limit - more for limit, more in zip(limits, spared, strict=True)]
        found = least_recomputation(graph, placement, cluster, left, terms, in_flight=flights)
        if found is None:
            return None
        peak = in_flight.peak(found)
        over = peak.over_bytes(limits)
        if not any(over):
            return found
        flights = tuple(map(max, flights, peak.in_flight))
        spared = [before + more for before, more in zip(spared, over, strict=True)]
    return None


def settled(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    groups: Mapping[str, str],
    peak_bytes: Callable[[Placement], Sequence[float]],
    terms: Terms,
) -> Placement:
    """The placement, with so much run again by choice that every moment of a forecast step fits, if it can.

    Args:
        graph: the traced model.
        placement: where everything runs; what it runs again besides ``groups`` is by choice.
        cluster: the devices.
        groups: group by name of an operator that runs again anyway.
        peak_bytes: the most that each device holds at any moment under a placement.
        terms: what to count with.
    """
    limits = terms.limits_bytes(cluster)
    excess = [0.0] * len(limits)
    for _ in range(_MOST_ROUNDS if placement.recompute != groups else 0):
        over = [max(peak - limit, 0.0) for peak, limit in zip(peak_bytes(placement), limits, strict=True)]
        if not any(over):
            break
        excess = [before + more for before, more in zip(excess, over, strict=True)]
        bare = replace(placement, recompute=groups)
        found = fitted(graph, bare, cluster, terms, excess_bytes=excess)
        if found is None:
            break
        placement = found
    return placement


def _forced(
    strategy: Strategy,
    graph: Graph,
    cluster: Cluster,
    groups: Mapping[str, str],
    error: OutOfMemoryError,
    terms: Terms,
    options: Mapping[str, Any],
) -> Placement:
    """Place the model as if every block ran again, then keep as much as fits."""
    blocks = blocks_of(graph, groups, terms.num_microbatches)
    told = recomputed(graph, blocks)
    alone = Savings(graph, Placement({op.name: (Tile(0),) for op in graph.operators}), 1)
    largest = largest_bytes(alone, members(graph, blocks), terms.num_microbatches)[0]
    for spared_bytes in (0, largest):  # with less memory, a placement leaves room for the block that runs again
        try:
            placement = strategy(told, _without(cluster, spared_bytes), terms.with_groups(blocks), **options)
        except OutOfMemoryError:
            continue
        seen = None if terms.in_flight is None else terms.in_flight.peak(replace(placement, recompute=blocks))
        found = fitted(graph, replace(placement, recompute=groups), cluster, terms, seen=seen)
        if found is not None:
            return found
    raise OutOfMemoryError(
        f"{error} Nor would it fit if all {len(set(blocks.values()))} blocks ran again for their backward (recompute)."
    ) from error


def _without(cluster: Cluster, spared_bytes: float) -> Cluster:
    devices = (replace(d, memory_bytes=max(int(d.memory_bytes - spared_bytes), 1)) for d in cluster.devices)
    return replace(cluster, devices=tuple(devices))
