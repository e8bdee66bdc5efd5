"""Layers divided among groups of devices, each of which cuts its layers in its own way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from graphpart.cost.time.collectives import CollectiveTimes
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Tile
from graphpart.strategies.cuts.choose_cuts import CutChoice
from graphpart.strategies.stages.interval_costs import IntervalCosts
from graphpart.strategies.stages.interval_search import TOLERANCE, Matrix

Tiling = tuple[CutChoice, Mapping[str, float]]
"""How a group would cut every operator, and what each would cost it in seconds a step."""


@dataclass(frozen=True)
class Grouping:
    """A division of the layers among groups of devices.

    Attributes:
        tiles: per operator name.
        step_s: estimated time of a step, in seconds.
        choices: how each group cuts what it has.
    """

    tiles: Mapping[str, tuple[Tile, ...]]
    step_s: float
    choices: tuple[CutChoice, ...]


def divide_among(
    graph: Graph,
    cluster: Cluster,
    groups: Sequence[Sequence[int]],
    tile: Callable[[Sequence[int]], Tiling],
    costs: IntervalCosts,
    *,
    rounds: int = 1,
) -> Grouping:
    """Give every group an interval of the layers, so that the slowest is fastest.

    Args:
        graph: the traced model.
        cluster: the devices.
        groups: indices of each group's devices.
        tile: what tells how a group would cut operators; groups of like devices and links cut alike.
        costs: of intervals of the order of operators, as far as they cross between groups.
        rounds: intervals that each group has, given out in rounds.
    """
    order = costs.order
    known: dict[object, tuple[CutChoice, np.ndarray]] = {}
    of_group: list[tuple[CutChoice, np.ndarray]] = []
    for devices in groups:
        kind = (
            tuple((d.kind, d.overhead_s, *d.flops_per_s.items()) for d in (cluster.devices[i] for i in devices)),
            CollectiveTimes(cluster, devices).like,
        )
        if kind not in known:
            choice, cost_s = tile(devices)
            blocks = np.zeros(order.num_blocks)
            for name, seconds in cost_s.items():
                blocks[order.block_of[name]] += seconds
            known[kind] = (choice, blocks)
        choice, blocks = known[kind]
        of_group.append((CutChoice(tuple(devices), choice.cuts, choice.cost_s, choice.bound_s), blocks))
    takers = list(range(len(groups))) * rounds
    links = [_between(cluster, groups[a], groups[b]) for a, b in pairwise(takers)]
    ends, loads = _cut_layers([of_group[taker][1] for taker in takers], links, costs)
    spans = zip(takers, pairwise([0, *ends]), strict=True)
    taker_of = {block: taker for taker, (first, end) in spans for block in range(first, end)}
    tiles = [choice.tiles(graph) for choice, _ in of_group]
    load_s = [sum(loads[i] for i, taker in enumerate(takers) if taker == group) for group in range(len(groups))]
    step_s = (sum(load_s) + (costs.num_microbatches - 1) * max(load_s)) / costs.num_microbatches
    found = {op.name: tiles[taker_of[order.block_of[op.name]]][op.name] for op in graph.operators}
    return Grouping(found, step_s, tuple(choice for choice, _ in of_group))


def _between(cluster: Cluster, sources: Sequence[int], destinations: Sequence[int]) -> Link:
    """What a value goes by from one group to another, in as many parts as the smaller one has devices.

    Parts go at once, each by links of its own, but for what these share.
    """
    pairs = tuple(zip(sources, destinations, strict=False))
    links = {cluster.link(*way) for pair in pairs for way in (pair, pair[::-1])}
    slowest_s = max(1 / link.bandwidth_bytes_per_s for link in links) / len(pairs)
    lanes = Counter(lane for pair in pairs if (way := cluster.way(*pair)) is not None for lane in way.lanes)
    shared_s = [
        count / len(pairs) / cluster.topology.lanes[lane].bandwidth_bytes_per_s for lane, count in lanes.items()
    ]
    return Link(max(link.latency_s for link in links), 1 / max([slowest_s, *shared_s]))


def _cut_layers(
    blocks: Sequence[np.ndarray], links: Sequence[Link], costs: IntervalCosts
) -> tuple[list[int], list[float]]:
    """The end of each interval, and each one's load; every interval has at least one block."""
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
