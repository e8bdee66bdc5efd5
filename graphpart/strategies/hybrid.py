"""Hybrid splits: groups of layers on groups of devices, every operator cut within its group as takes least time.

One group of all devices gives batch here and feature there (A. Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", arXiv:1404.5997); groups of one device give a pipeline; between lie pipelines of cut
layers. Cuts within a group are chosen exactly among the candidates, then the layers are divided among the groups by
dynamic programming, so that the slowest group is fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import CutChoice, choose_cuts, domains, operator_costs
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import feature_seeds, sample_starts, spatial_starts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms
from graphpart.strategies.stages.among_groups import Grouping, Tiling, divide_among
from graphpart.strategies.stages.blocks import into_blocks, operator_order
from graphpart.strategies.stages.interval_costs import measure

MAX_MEETING_PLACES = 120
"""Places between layers where groups may meet."""


def hybrid(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Divide layers among groups of devices, and cut every operator within its group.

    All numbers of equal groups are tried, and the one with the least estimated time of a step is taken.

    Args:
        graph: the traced model.
        cluster: the devices; groups are of consecutive ones, node by node, and within one unlike ones get unlike parts.
        terms: what to count with.

    Raises:
        OutOfMemoryError: if no division fits; the error is that of the one that is estimated fastest.
    """
    order = into_blocks(graph, operator_order(graph), cluster.devices[0], MAX_MEETING_PLACES)
    costs = measure(graph, order, num_microbatches=terms.num_microbatches)

    def tile(devices: Sequence[int]) -> Tiling:
        choice, prices = tile_group(graph, cluster, devices, terms.num_microbatches)
        return choice, operator_costs(prices, choice)

    found = [
        grouping
        for groups in _divisions(cluster.topology.neighbours_first())
        if len(groups) <= order.num_blocks or len(groups) == 1
        for grouping in [divide_among(graph, cluster, groups, tile, costs)]
    ]
    errors: list[OutOfMemoryError] = []
    for grouping in sorted(found, key=_time_s):
        try:
            return finish(graph, cluster, grouping.tiles, terms, pieces=None)
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


def _divisions(order: Sequence[int]) -> list[list[Sequence[int]]]:
    """Consecutive groups of equal size, for every size that divides the number of devices."""
    num_devices = len(order)
    return [
        [order[first : first + size] for first in range(0, num_devices, size)]
        for size in range(num_devices, 0, -1)
        if num_devices % size == 0
    ]


def _time_s(grouping: Grouping) -> float:
    """The estimated time of a step; groups of devices that all do the same, with only sums to make, come last."""
    return grouping.step_s if all(map(_shares_work, grouping.choices)) else inf


def _shares_work(choice: CutChoice) -> bool:
    """Whether a group of several devices cuts anything."""
    return len(choice.devices) == 1 or any(any(cut) for cut in choice.cuts.values())
