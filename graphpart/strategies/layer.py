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
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil, inf, isfinite, prod
from typing import Any

import numpy as np

from graphpart.cost.memory.forecast import out_of_memory
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.memory.in_flight import StepPeak
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms
from graphpart.strategies.stages.blocks import MAX_BLOCK_CUTS, into_blocks, operator_order
from graphpart.strategies.stages.interval_costs import IntervalCosts, measure
from graphpart.strategies.stages.interval_search import TOLERANCE, LinkPair, Matrix, Stage, link_pair, search
from graphpart.strategies.stages.remedies import remedies
from graphpart.strategies.stages.stage_memory import StageMemory

MAX_STATES = 4096
"""Above this many counts of used devices, unlike devices are taken in the order of their index."""

_MOST_TRIALS = 8
"""Splits that are tried along a whole step before the model is said not to fit."""

_MOST_MATRICES = 32  # that a search keeps, to give them again

_MAX_CELLS = 2e9  # entries of all matrices a search looks at; a few seconds


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What one stage, an interval on a device, is forecast to cost.

    Attributes:
        device: index of the device.
        load_s: compute forward and backward, and transfers in and out, seconds a step.
        memory_bytes: parameters, gradients, optimizer state and the activations of what is in flight.
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
    terms: Terms = DEFAULT_TERMS,
    *,
    use_all_devices: bool = True,
    chunks: int = 1,
) -> Placement:
    """Split a model by layers, so that the most loaded device is loaded least.

    Args:
        graph: the traced model.
        cluster: the devices.
        terms: what to count with.
        use_all_devices: give a stage to as many devices as operators and memory allow; otherwise devices that
            don't lower the bottleneck stay empty.
        chunks: intervals of each device, given out in rounds over the devices in the order of their index, for an
            interleaved schedule. Each may fill an equal share of its device's memory.

    Raises:
        OutOfMemoryError: if no split fits, naming the device, the bytes and what is largest.
        PlacementError: if there are fewer operators than several chunks for every device take.
    """
    return plan_layers(graph, cluster, terms, use_all_devices=use_all_devices, chunks=chunks).placement


def plan_layers(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
    *,
    use_all_devices: bool = True,
    chunks: int = 1,
) -> LayerPlan:
    """As :func:`layer`, with the forecast. Arguments and errors are the same.

    Transfers take the link between neighbouring stages, also for a value that skips a stage; where the links are
    alike that is exact. Where the schedule bounds what is in flight, each stage is weighed with its own number, and a
    look at the whole step says what that leaves out.
    """
    rounds = _in_rounds(cluster, chunks)
    room = StageMemory(cluster, terms, chunks)
    if not graph.operators:
        return LayerPlan(Placement.whole(graph, {}), 0.0, ())
    groups = device_groups(cluster) if chunks == 1 else (tuple(range(len(rounds))),)
    order = into_blocks(graph, operator_order(graph), cluster.devices[0], _num_cuts(groups))
    if chunks > 1 and order.num_blocks < len(rounds):
        raise PlacementError(
            f"{graph.name} has {order.num_blocks} operators to cut between, too few for chunks={chunks} on each of "
            f"{len(cluster)} devices; give chunks={max(1, order.num_blocks // len(cluster))}"
        )
    costs = measure(
        graph,
        order,
        num_microbatches=terms.num_microbatches,
        optimizer_bytes_per_element=terms.optimizer_bytes_per_element,
    )
    splitter = _Splitter(graph, rounds, groups, costs, room, len(cluster), use_all_devices)
    refused: tuple[Placement, StepPeak] | None = None
    for _ in range(_MOST_TRIALS):
        plan = splitter.best()
        if plan is None:
            break
        peak = room.excess(plan.placement)
        if peak is None:
            return plan
        refused = plan.placement, peak
        room.learn([stage.device for stage in plan.stages], peak)
    if refused is not None:
        refused[1].memory.check(graph, refused[0], cluster, terms.memory_reserve)
    raise splitter.nothing_fits(terms)


@dataclass(frozen=True)
class _Splitter:
    """Finds the best split into stages that have room.

    Attributes:
        graph: the traced model.
        rounds: the devices, in rounds if each has several chunks.
        groups: indices of interchangeable ones, group by group.
        costs: of every interval.
        room: what stages may hold.
        num_devices: devices of a round.
        use_all_devices: see :func:`layer`.
    """

    graph: Graph
    rounds: Cluster
    groups: Sequence[Sequence[int]]
    costs: IntervalCosts
    room: StageMemory
    num_devices: int
    use_all_devices: bool

    def best(self) -> LayerPlan | None:
        """The split whose most loaded stage is loaded least; None where no split has room."""
        most = min(len(self.rounds), self.costs.order.num_blocks)
        parts = self.room.parts(most)
        if len(set(parts)) == 1:  # one search for any number of stages
            return self._within(parts, None)
        found: LayerPlan | None = None
        for num_stages in range(most, 0, -1):
            plan = self._within(self.room.parts(num_stages), num_stages)
            if plan is not None and self.use_all_devices:
                return plan
            if plan is not None and (found is None or plan.bottleneck_s <= found.bottleneck_s * (1 + TOLERANCE)):
                found = plan
        return found

    def _within(self, parts: Sequence[float], num_stages: int | None) -> LayerPlan | None:
        """The best split into so many stages, or any number, that keep these parts of the batch."""
        num_blocks = self.costs.order.num_blocks

        @lru_cache(_MOST_MATRICES)
        def with_room(
            part: float, limit: float, device: int, before: LinkPair | None, after: LinkPair | None
        ) -> Matrix:
            loads = self.costs.load_s(self.rounds.devices[device], before, after)
            return np.where(self.costs.memory.at(part) <= limit, loads, np.inf)

        def load(stage: int, device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
            return with_room(parts[stage], self.room.limits[device], self.stand_in[device], before, after)

        found = search(self.rounds, self.groups, num_blocks, load, np.maximum, most_stages=len(parts))
        bottleneck, ends = found.ends(use_all_devices=self.use_all_devices, num_stages=num_stages)
        if not isfinite(bottleneck):
            return None

        # Many splits share a bottleneck. Of those with the fewest devices, take the one with the least sum of squared
        # loads: the other stages come out even, and needless transfers go.
        @lru_cache(_MOST_MATRICES)
        def squared_with_room(*key: Any) -> Matrix:
            loads = with_room(*key)
            return np.where(loads <= bottleneck * (1 + TOLERANCE), loads / (bottleneck or 1.0), np.inf) ** 2

        def squared(stage: int, device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
            return squared_with_room(parts[stage], self.room.limits[device], self.stand_in[device], before, after)

        even = search(self.rounds, self.groups, num_blocks, squared, np.add, most_stages=len(parts))
        return self._plan(even.stages(ends), parts)

    @cached_property
    def stand_in(self) -> tuple[int, ...]:
        """Per device, the first that is like it: costs are looked at once for devices that are alike."""
        first: dict[tuple[object, ...], int] = {}
        return tuple(first.setdefault(_alike(device), index) for index, device in enumerate(self.rounds.devices))

    def _plan(self, stages: Sequence[Stage], parts: Sequence[float]) -> LayerPlan:
        """The plan that stages make, which go round the devices and keep these parts of the batch."""
        graph, order, num_devices = self.graph, self.costs.order, self.num_devices
        device_of_block = {b: stage.device % num_devices for stage in stages for b in range(stage.first, stage.end)}
        device_of = {op.name: device_of_block[order.block_of[op.name]] for op in graph.operators}
        placement = Placement.whole(graph, device_of)
        first = stages[0].device % num_devices
        unread = {s.value.name: first for s in graph.sources if not graph.consumers[s.value.name]}
        homes = {name: unread.get(name, home) for name, home in placement.homes.items()}
        pairs = [link_pair(self.rounds, a.device, b.device) for a, b in pairwise(stages)]
        forecasts = []
        for stage, part, before, after in zip(stages, parts, [None, *pairs], [*pairs, None], strict=False):
            at = (stage.first, stage.end)
            load_s = float(self.costs.load_s(self.rounds.devices[stage.device], before, after)[at])
            memory_bytes = ceil(self.costs.memory.at(part)[at])
            forecasts.append(StageForecast(stage.device % num_devices, load_s, memory_bytes))
        loads_s = [sum(f.load_s for f in forecasts if f.device == device) for device in range(num_devices)]
        return LayerPlan(Placement(placement.tiles, homes), max(loads_s), tuple(forecasts))

    def nothing_fits(self, terms: Terms) -> OutOfMemoryError:
        """The error that names the fullest device of the split that comes closest to fitting, and what would fit."""
        order, limits, chunks = self.costs.order, self.room.limits, len(self.rounds) // self.num_devices
        parts = self.room.parts(min(len(self.rounds), order.num_blocks))
        memory = [self.costs.memory.at(part) for part in parts]

        def fullness(stage: int, device: int, before: LinkPair | None, after: LinkPair | None) -> Matrix:
            empty = np.tri(order.num_blocks + 1, dtype=bool)
            return np.where(empty, np.inf, memory[stage] / max(limits[device], 1))

        found = search(self.rounds, self.groups, order.num_blocks, fullness, np.maximum, most_stages=len(parts))
        _, ends = found.ends()
        stages = found.stages(ends)
        number, fullest = max(
            enumerate(stages), key=lambda s: memory[s[0]][s[1].first, s[1].end] / max(limits[s[1].device], 1)
        )
        there = [name for name, block in order.block_of.items() if fullest.first <= block < fullest.end]
        placement = replace(self, num_devices=len(self.rounds))._plan(stages, parts).placement
        forecast = terms.memory(self.graph, placement, self.rounds, parts[number] * terms.num_microbatches)
        advice = f"Each of a device's {chunks} chunks may fill an equal share of its memory; fewer chunks may fit."
        if chunks == 1:
            advice = remedies(self.graph, self.rounds, order, self.room.parts, terms)
        device, limit = self.rounds.devices[fullest.device], limits[fullest.device]
        memory_there, optimizer_bytes = forecast.devices[fullest.device], terms.optimizer_bytes_per_element
        return out_of_memory(self.graph, device, memory_there, limit, there, optimizer_bytes, advice)


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
    return max(fewest, min(MAX_BLOCK_CUTS, int((_MAX_CELLS / num_matrices) ** 0.5)))
