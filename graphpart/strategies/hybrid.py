"""Hybrid splits: groups of layers on groups of devices, every operator cut within its group as takes least time.

One group of all devices gives batch here and feature there (A. Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", arXiv:1404.5997); groups of one device give a pipeline; between lie pipelines of cut
layers. Cuts within a group are chosen exactly among the candidates, then the layers are divided among the groups by
dynamic programming, so that the slowest group is fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np

from graphpart.cost.time.collectives import slowest_link
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import CutChoice, choose_cuts, domains, operator_costs
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import feature_seeds, sample_starts, spatial_starts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms
from graphpart.strategies.stages.blocks import into_blocks, operator_order
from graphpart.strategies.stages.interval_costs import IntervalCosts, Order, measure
from graphpart.strategies.stages.interval_search import TOLERANCE, Matrix

MAX_MEETING_PLACES = 120
"""Places between layers where groups may meet."""


@dataclass(frozen=True)
class Grouping:
    """A division of the devices into groups of consecutive ones, and of the layers among them.

    Attributes:
        tiles: per operator name.
        step_s: estimated time of a step, in seconds.
    """

    tiles: Mapping[str, tuple[Tile, ...]]
    step_s: float


def hybrid(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Divide layers among groups of devices, and cut every operator within its group.

    All numbers of equal groups are tried, and the one with the least estimated time of a step is taken.

    Args:
        graph: the traced model.
        cluster: the devices; groups are of consecutive ones, and within a group unlike ones get unlike parts.
        terms: what to count with.

    Raises:
        OutOfMemoryError: if no division fits; the error is that of the one that is estimated fastest.
    """
    order = into_blocks(graph, operator_order(graph), cluster.devices[0], MAX_MEETING_PLACES)
    costs = measure(graph, order, num_microbatches=terms.num_microbatches)
    found = [
        grouping
        for groups in _divisions(len(cluster))
        if len(groups) <= order.num_blocks or len(groups) == 1
        for grouping in [_divide(graph, cluster, groups, order, costs, terms.num_microbatches)]
    ]
    errors: list[OutOfMemoryError] = []
    for grouping in sorted(found, key=lambda g: g.step_s):
        try:
            return finish(graph, cluster, grouping.tiles, terms)
        except OutOfMemoryError as error:
            errors.append(error)
    raise errors[0] if errors else PlacementError(f"{graph.name} cannot be divided among {len(cluster)} devices")


def tile_group(
    graph: Graph, cluster: Cluster, devices: Sequence[int], num_microbatches: int
) -> tuple[CutChoice, Prices]:
    """The best cut of every operator on one group, along samples, features or positions."""
    geometry = Geometry(graph, speeds(graph, cluster, devices))
    prices = Prices(geometry, cluster, devices, num_microbatches)
    if len(devices) == 1:
        whole = {name: cuts[0] for name, cuts in domains(graph, {}, 1).items()}
        return CutChoice(tuple(devices), whole, 0.0, 0.0), prices
    found = propagate(geometry, feature_seeds(geometry), [*sample_starts(geometry), *spatial_starts(geometry)])
    return choose_cuts(prices, domains(graph, found, len(devices))), prices


def _divisions(num_devices: int) -> list[list[range]]:
    """Consecutive groups of equal size, for every size that divides the number of devices."""
    return [
        [range(first, first + size) for first in range(0, num_devices, size)]
        for size in range(num_devices, 0, -1)
        if num_devices % size == 0
    ]


def _divide(
    graph: Graph, cluster: Cluster, groups: Sequence[range], order: Order, costs: IntervalCosts, num_microbatches: int
) -> Grouping:
    """Give every group an interval of the layers, so that the slowest is fastest."""
    choices: dict[object, tuple[CutChoice, np.ndarray]] = {}
    of_group: list[tuple[CutChoice, np.ndarray]] = []
    for devices in groups:
        # Groups of like devices and links choose alike.
        kind = (
            tuple((d.kind, d.overhead_s, *d.flops_per_s.items()) for d in (cluster.devices[i] for i in devices)),
            slowest_link(cluster, devices),
        )
        if kind not in choices:
            choice, prices = tile_group(graph, cluster, devices, num_microbatches)
            choices[kind] = (choice, _block_costs(prices, choice, order))
        of_group.append(choices[kind])
    links = [slowest_link(cluster, [a[-1], b[0]]) for a, b in pairwise(groups)]
    ends, loads = _cut_layers([blocks for _, blocks in of_group], links, costs)
    tiles: dict[str, tuple[Tile, ...]] = {}
    first = 0
    for devices, (choice, _), end in zip(groups, of_group, ends, strict=True):
        moved = CutChoice(tuple(devices), choice.cuts, choice.cost_s, choice.bound_s).tiles(graph)
        tiles.update((name, moved[name]) for name, block in order.block_of.items() if first <= block < end)
        first = end
    step_s = (sum(loads) + (num_microbatches - 1) * max(loads)) / num_microbatches
    if not all(_shares_work(choice) for choice, _ in of_group):
        step_s = inf  # devices that all do the same would only have sums to make
    return Grouping({op.name: tiles[op.name] for op in graph.operators}, step_s)


def _shares_work(choice: CutChoice) -> bool:
    """Whether a group of several devices cuts anything."""
    return len(choice.devices) == 1 or any(any(cut) for cut in choice.cuts.values())


def _block_costs(prices: Prices, choice: CutChoice, order: Order) -> np.ndarray:
    """Time of every block of operators under a choice, work and traffic within the group."""
    blocks = np.zeros(order.num_blocks)
    for name, cost_s in operator_costs(prices, choice).items():
        blocks[order.block_of[name]] += cost_s
    return blocks


def _cut_layers(
    blocks: Sequence[np.ndarray], links: Sequence[Link], costs: IntervalCosts
) -> tuple[list[int], list[float]]:
    """The end of each group's interval, and each group's load; every group gets at least one block."""
    num_blocks = costs.order.num_blocks
    loads: list[Matrix] = []
    for i, own in enumerate(blocks):
        total = np.concatenate(([0.0], np.cumsum(own)))
        load = total[None, :] - total[:, None]
        if i:
            value, value_bytes, gradient, gradient_bytes = costs.traffic_in
            arrival_s = (value + gradient) * links[i - 1].latency_s
            load = load + arrival_s + (value_bytes + gradient_bytes) / links[i - 1].bandwidth_bytes_per_s
        load[np.tri(num_blocks + 1, dtype=bool)] = np.inf
        loads.append(load)
    bottleneck, _ = _search(loads, np.maximum)
    limit = bottleneck * (1 + TOLERANCE)
    # Many divisions share a bottleneck; of these, the most even.
    _, ends = _search([np.where(load <= limit, load, np.inf) ** 2 for load in loads], np.add)
    return ends[1:], [float(load[a, b]) for load, (a, b) in zip(loads, pairwise(ends), strict=True)]


def _search(loads: Sequence[Matrix], combine: np.ufunc) -> tuple[float, list[int]]:
    """The division with the least combined load, and its ends, 0 first."""
    num_blocks = len(loads[0]) - 1
    best = np.full(num_blocks + 1, np.inf)
    best[0] = 0.0
    came = []
    for load in loads:
        through = combine(best[:, None], load)
        came.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [num_blocks]
    for step in reversed(came):
        ends.append(int(step[ends[-1]]))
    return float(best[num_blocks]), ends[::-1]
