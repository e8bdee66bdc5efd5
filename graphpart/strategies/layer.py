"""Layer splits: each device runs one interval of the graph's operator order.

An interval dynamic program finds the cuts whose slowest stage is fastest (O(devices x cuts^2), as in PipeDream,
SOSP 2019, section 3.1, and in the contiguous case of Tarnawski et al., NeurIPS 2020), exactly for this order and these
cuts. Unlike devices may come in any order of kinds: a state counts how many devices of each kind are used up.

For interleaved schedules (Narayanan et al., SC 2021, section 2.2.2) each device has several intervals, in rounds over
the devices. That is the same search over devices that each count as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import inf, isfinite, prod

import numpy as np

from graphpart.cost.memory import forecast_memory, out_of_memory, usable_bytes
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.intervals import Intervals, measure
from graphpart.strategies.order import MAX_CUTS, coarsen, operator_order
from graphpart.strategies.remedies import remedies
from graphpart.strategies.search import TOLERANCE, Cost, LinkPair, Matrix, Stage, link_pair, search

MAX_STATES = 4096
"""Above this many counts of used devices, unlike devices are taken in the order of their index."""

_MAX_CELLS = 2e9  # entries of all matrices a search looks at; a few seconds


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What one stage, an interval on a device, is forecast to cost.

    Attributes:
        device: index of the device.
        load_s: compute forward and backward, and transfers in and out, seconds a step.
        memory_bytes: parameters, gradients, optimizer state and all saved activations.
    """

    device: int
    load_s: float
    memory_bytes: int


@dataclass(frozen=True)
class LayerPlan:
    """A layer split and what it is forecast to cost.

    Attributes:
        placement: the split.
        bottleneck_s: load of the most loaded device, seconds a step.
        stages: forecast of each stage, in order.
    """

    placement: Placement
    bottleneck_s: float
    stages: tuple[StageForecast, ...]


def layer(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    optimizer_bytes_per_element: float = 8,
    memory_reserve: float = 0.0,
    use_all_devices: bool = True,
    chunks: int = 1,
) -> Placement:
    """Split a model by layers, so that the most loaded device is loaded least.

    Args:
        graph: the traced model.
        cluster: the devices.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW by default.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.
        use_all_devices: give a stage to as many devices as operators and memory allow; otherwise devices that
            don't lower the bottleneck stay empty.
        chunks: intervals of each device, given out in rounds over the devices in the order of their index, for an
            interleaved schedule. Each may fill an equal share of its device's memory.

    Raises:
        OutOfMemoryError: if no split fits, naming the device, the bytes and what is largest.
        PlacementError: if there are fewer operators than several chunks for every device take.
    """
    return plan_layers(
        graph,
        cluster,
        num_microbatches=num_microbatches,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        memory_reserve=memory_reserve,
        use_all_devices=use_all_devices,
        chunks=chunks,
    ).placement


def plan_layers(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    optimizer_bytes_per_element: float = 8,
    memory_reserve: float = 0.0,
    use_all_devices: bool = True,
    chunks: int = 1,
) -> LayerPlan:
    """As :func:`layer`, with the forecast. Arguments and errors are the same.

    Transfers take the link between neighbouring stages, also for a value that skips a stage; where the links are
    alike that is exact. All microbatches count as in flight, as in GPipe.
    """
    rounds = _in_rounds(cluster, chunks)
    limits = [usable_bytes(device, memory_reserve) for device in rounds.devices]
    if not graph.operators:
        return LayerPlan(Placement.whole(graph, {}), 0.0, ())
    groups = device_groups(cluster) if chunks == 1 else (tuple(range(len(rounds))),)
    order = coarsen(graph, operator_order(graph), cluster.devices[0], _num_cuts(groups))
    if chunks > 1 and order.num_blocks < len(rounds):
        raise PlacementError(
            f"{graph.name} has {order.num_blocks} operators to cut between, too few for chunks={chunks} on each of "
            f"{len(cluster)} devices; give chunks={max(1, order.num_blocks // len(cluster))}"
        )
    costs = measure(
        graph, order, num_microbatches=num_microbatches, optimizer_bytes_per_element=optimizer_bytes_per_element
    )

    @cache
    def load(device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
        found = costs.load_s(rounds.devices[device], before, after)
        return np.where(costs.memory_bytes <= limits[device], found, np.inf)

    found = search(rounds, groups, order.num_blocks, _for_alike(load, rounds), np.maximum)
    bottleneck, ends = found.ends(use_all_devices=use_all_devices)
    if not isfinite(bottleneck):
        raise _nothing_fits(graph, rounds, costs, groups, memory_reserve, optimizer_bytes_per_element, chunks)

    # Many splits share a bottleneck. Of those with the fewest devices, take the one with the least sum of squared
    # loads: the other stages come out even, and needless transfers go.
    @cache
    def squared(device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
        loads = load(device, before, after)
        return np.where(loads <= bottleneck * (1 + TOLERANCE), loads / (bottleneck or 1.0), np.inf) ** 2

    even = search(rounds, groups, order.num_blocks, _for_alike(squared, rounds), np.add)
    return _layer_plan(graph, rounds, costs, even.stages(ends), len(cluster))


def _in_rounds(cluster: Cluster, chunks: int) -> Cluster:
    """A cluster in which each device counts as many, with a share of its memory; only neighbours have their links."""
    if chunks < 1:
        raise PlacementError(f"chunks={chunks}; give each device at least one")
    if chunks == 1:
        return cluster
    num_devices = len(cluster)
    shares = tuple(
        replace(device, name=f"{device.name}, chunk {chunk}", memory_bytes=max(device.memory_bytes // chunks, 1))
        for chunk in range(chunks)
        for device in cluster.devices
    )
    ways = [way for pair in pairwise(range(len(shares))) for way in (pair, pair[::-1])]
    here = Link(0.0, inf)
    links = {(a, b): cluster.link(a % num_devices, b % num_devices) if num_devices > 1 else here for a, b in ways}
    return Cluster(shares, cluster.default_link, links, cluster.name)


def _layer_plan(
    graph: Graph, cluster: Cluster, costs: Intervals, stages: Sequence[Stage], num_devices: int
) -> LayerPlan:
    """The plan that stages make, which go round so many devices."""
    device_of_block = {block: stage.device % num_devices for stage in stages for block in range(stage.first, stage.end)}
    device_of = {op.name: device_of_block[costs.order.block_of[op.name]] for op in graph.operators}
    placement = Placement.whole(graph, device_of)
    unread = {s.value.name: stages[0].device % num_devices for s in graph.sources if not graph.consumers[s.value.name]}
    homes = {name: unread.get(name, home) for name, home in placement.homes.items()}
    pairs = [link_pair(cluster, a.device, b.device) for a, b in pairwise(stages)]
    forecasts = []
    for stage, before, after in zip(stages, [None, *pairs], [*pairs, None], strict=True):
        at = (stage.first, stage.end)
        load_s = float(costs.load_s(cluster.devices[stage.device], before, after)[at])
        forecasts.append(StageForecast(stage.device % num_devices, load_s, int(costs.memory_bytes[at])))
    loads_s = [sum(f.load_s for f in forecasts if f.device == device) for device in range(num_devices)]
    return LayerPlan(Placement(placement.tiles, homes), max(loads_s), tuple(forecasts))


def _nothing_fits(
    graph: Graph,
    cluster: Cluster,
    costs: Intervals,
    groups: Sequence[Sequence[int]],
    memory_reserve: float,
    optimizer_bytes_per_element: float,
    chunks: int,
) -> OutOfMemoryError:
    """The error that names the fullest device of the split that comes closest to fitting, and what would fit."""
    limits = [usable_bytes(device, memory_reserve) for device in cluster.devices]

    def fullness(device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
        empty = np.tri(costs.order.num_blocks + 1, dtype=bool)
        return np.where(empty, np.inf, costs.memory_bytes / max(limits[device], 1))

    found = search(cluster, groups, costs.order.num_blocks, fullness, np.maximum)
    _, ends = found.ends()
    stages = found.stages(ends)
    fullest = max(stages, key=lambda s: costs.memory_bytes[s.first, s.end] / max(limits[s.device], 1))
    there = [name for name, block in costs.order.block_of.items() if fullest.first <= block < fullest.end]
    placement = _layer_plan(graph, cluster, costs, stages, len(cluster)).placement
    forecast = forecast_memory(graph, placement, len(cluster), optimizer_bytes_per_element=optimizer_bytes_per_element)
    advice = f"Each of a device's {chunks} chunks may fill an equal share of its memory; fewer chunks may fit."
    if chunks == 1:
        advice = remedies(
            graph,
            cluster,
            costs.order,
            memory_reserve=memory_reserve,
            optimizer_bytes_per_element=optimizer_bytes_per_element,
        )
    device, limit = cluster.devices[fullest.device], limits[fullest.device]
    return out_of_memory(
        graph, device, forecast.devices[fullest.device], limit, there, optimizer_bytes_per_element, advice
    )


def _for_alike(cost: Cost, cluster: Cluster) -> Cost:
    """The same costs, asked for only once for devices that are alike."""
    first: dict[tuple[object, ...], int] = {}
    stand_in = [first.setdefault(_alike(device), index) for index, device in enumerate(cluster.devices)]
    return lambda device, before, after: cost(stand_in[device], before, after)


def device_groups(cluster: Cluster) -> tuple[tuple[int, ...], ...]:
    """Indices of interchangeable devices, group by group; one group in index order if there are too many kinds."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, device in enumerate(cluster.devices):
        groups.setdefault(_alike(device), []).append(index)
    if prod(len(group) + 1 for group in groups.values()) > MAX_STATES:
        return (tuple(range(len(cluster))),)
    return tuple(tuple(group) for group in groups.values())


def _alike(device: Device) -> tuple[object, ...]:
    """What makes two devices interchangeable: everything but the name."""
    rates = tuple(sorted(device.flops_per_s.items()))
    memory = (device.memory_bytes, device.memory_bandwidth_bytes_per_s)
    return (device.kind, rates, *memory, device.efficiency, device.overhead_s)


def _num_cuts(groups: Sequence[Sequence[int]]) -> int:
    """How many cuts a search over these devices can afford."""
    num_matrices = prod(len(group) + 1 for group in groups) * len(groups) ** 2
    fewest = max(32, 2 * sum(len(group) for group in groups))
    return max(fewest, min(MAX_CUTS, int((_MAX_CELLS / num_matrices) ** 0.5)))
