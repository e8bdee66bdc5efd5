"""Free splits: every operator on any device, or cut over all, wherever it would be finished soonest.

List scheduling by upward rank and earliest finish (HEFT: H. Topcuoglu, S. Hariri, M.-Y. Wu, IEEE TPDS 13(3), 2002),
of whole operators, and once more with cuts among the choices. A greedy schedule cannot see what a choice costs later,
so both are compared with the cuts of least total time, under the same estimate. Where masks make weights sparse, groups
of neurons are found first, and the other operators are cut around them.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.cost.time.collectives import slowest_link
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import CutChoice, alone_on, choose_cuts, domains, is_partial
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.inverse_rules import Cut
from graphpart.strategies.cuts.layouts import Geometry, Layout
from graphpart.strategies.cuts.neuron_groups import Groups, neuron_groups
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import feature_seeds, sample_starts, spatial_starts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms

MAX_TRIED_CUTS = 6
"""Candidate cuts of an operator that the schedule tries, besides each device alone."""


def free(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Place every operator by itself: whole on any device, or cut over all of them.

    Args:
        graph: the traced model.
        cluster: the devices.
        terms: what to count with.

    Raises:
        OutOfMemoryError: if what is estimated fastest does not fit.
    """
    geometry = Geometry(graph, speeds(graph, cluster))
    prices = Prices(geometry, cluster, range(len(cluster)), terms.num_microbatches)
    groups = neuron_groups(graph, terms.masks or {}, geometry.weights)
    tiles = around_groups(prices, groups) if groups else by_schedule(prices)
    return finish(graph, cluster, tiles, terms)


def around_groups(prices: Prices, groups: Mapping[str, Groups]) -> dict[str, tuple[Tile, ...]]:
    """Tiles of every operator where groups of neurons are given; a group reads the neurons that it has edges from."""
    fixed: dict[str, Cut] = {name: tuple((("n", own),) for own in found.outputs) for name, found in groups.items()}
    allowed = domains(prices.graph, propagate(prices.geometry, fixed.items()), len(prices.devices))
    allowed.update((name, (cut,)) for name, cut in fixed.items())
    tiles = choose_cuts(prices, allowed).tiles(prices.graph)
    for name, found in groups.items():
        tiles[name] = tuple(
            Tile(tile.device, tile.axes, {"k": read}) for tile, read in zip(tiles[name], found.inputs, strict=True)
        )
    return tiles


def by_schedule(prices: Prices) -> dict[str, tuple[Tile, ...]]:
    """Tiles of every operator by the best of the list schedules and the cuts of least total time."""
    graph, geometry, num_devices = prices.graph, prices.geometry, len(prices.devices)
    starts = [*sample_starts(geometry), *spatial_starts(geometry)]
    found = propagate(geometry, feature_seeds(geometry), starts) if num_devices > 1 else {}
    whole = domains(graph, found, num_devices)
    anywhere = tuple(alone_on(i, num_devices) for i in range(num_devices))
    options = {name: tuple(dict.fromkeys((*anywhere, *cuts[: MAX_TRIED_CUTS + 1]))) for name, cuts in whole.items()}
    order = by_upward_rank(prices, options)
    schedules = [
        earliest_finish(prices, order, dict.fromkeys(whole, anywhere)),
        earliest_finish(prices, order, options),
    ]
    together = choose_cuts(prices, whole).cuts
    if any(any(cut) for cut in together.values()):  # devices that all do the same gain nothing
        schedules.append(earliest_finish(prices, order, {name: (cut,) for name, cut in together.items()}))
    cuts, makespan_s = min(schedules, key=lambda schedule: schedule[1])
    return CutChoice(prices.devices, cuts, makespan_s, 0.0).tiles(graph)


def by_upward_rank(prices: Prices, options: Mapping[str, tuple[Cut, ...]]) -> list[Operator]:
    """Operators, those first from which the longest way leads to the end; an order that respects all edges."""
    graph, link = prices.graph, slowest_link(prices.cluster, prices.devices)
    num_devices = len(prices.devices)
    rank: dict[str, float] = {}
    for op in reversed(graph.operators):
        if op.name not in options:
            continue
        works = [prices.compute_s(op, alone_on(i, num_devices)) for i in range(num_devices)]
        after = [
            rank[reader.name] + link.time_s(value.size_bytes)
            for value in op.results
            for reader in graph.consumers[value.name]
            if reader.name in rank
        ]
        rank[op.name] = sum(works) / num_devices + max(after, default=0.0)
    position = {op.name: i for i, op in enumerate(graph.operators)}
    return [graph.operator[name] for name in sorted(rank, key=lambda name: (-rank[name], position[name]))]


def earliest_finish(
    prices: Prices, order: list[Operator], options: Mapping[str, tuple[Cut, ...]]
) -> tuple[dict[str, Cut], float]:
    """Give every operator, in order, the cut with which it is finished soonest.

    Args:
        prices: times on the group.
        order: operators, each after those that make what it reads.
        options: per operator name, the cuts to choose from; ties go to the first.

    Returns:
        The cut of each operator, and the estimated time at which all are finished, forward and backward.
    """
    schedule = _Schedule(prices)
    for op in order:
        ends = [(schedule.ends(op, cut), cut) for cut in options[op.name]]
        best, cut = min(ends, key=lambda option: max(option[0].values()))
        schedule.take(op, cut, best)
    return schedule.cuts, max(schedule.ready.values(), default=0.0)


class _Schedule:
    """When each device is ready, and where and when each value was made."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.cuts: dict[str, Cut] = {}
        self.ready = dict.fromkeys(range(len(prices.devices)), 0.0)
        self.made: dict[str, tuple[Layout, bool, Mapping[int, float]]] = {}

    def ends(self, op: Operator, cut: Cut) -> dict[int, float]:
        """When each device would finish its tile, by its place in the group."""
        work_s = self.prices.compute_s(op, cut)
        starts = {i: self.ready[i] for i, axes in enumerate(cut) if axes is not None}
        for position, name in enumerate(op.operands):
            need = self.prices.geometry.needed(op, position, cut)
            if name in self.made:
                held, partial, finished = self.made[name]
                move_s = self.prices.move_s(name, held, partial, need)
                for i in starts:
                    at_hand = i in finished and not move_s
                    arrival = finished[i] if at_hand else max(finished.values()) + move_s
                    starts[i] = max(starts[i], arrival)
            elif name in self.prices.graph.source and self.prices.graph.source[name].kind != "input":
                work_s += self.prices.spread_s(name, need)
        return {i: start + work_s for i, start in starts.items()}

    def take(self, op: Operator, cut: Cut, ends: Mapping[int, float]) -> None:
        """Fix an operator's cut."""
        self.cuts[op.name] = cut
        self.ready.update(ends)
        for k, value in enumerate(op.results):
            self.made[value.name] = (self.prices.geometry.made(op, k, cut), is_partial(op, cut), ends)
