"""The dynamic program behind layer splits: which device gets which interval of blocks.

A state is how many devices of each group of interchangeable ones are used, which group the last stage took, and
the link to the stage that follows. Per state, a vector holds the best cost of covering the first ``j`` blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from graphpart.ir.cluster import Cluster, Link

Counts = tuple[int, ...]
Matrix = NDArray[np.float64]
Indices = NDArray[np.intp]
LinkPair = tuple[Link, Link]
IntervalCost = Callable[[int, int, LinkPair | None, LinkPair | None], Matrix]
"""Costs of all intervals ``[i, j)`` as the stage with a number, from 0, on a device (by index), given the link pairs
before and after it.
"""

TOLERANCE = 1e-9
"""Relative difference below which two costs count as equal."""


@dataclass(frozen=True)
class Stage:
    """An interval of blocks on one device.

    Attributes:
        device: index of the device.
        first: first block.
        end: block after the last.
    """

    device: int
    first: int
    end: int


@dataclass(frozen=True)
class _State:
    """Devices used so far per group, the group of the last one, and its links to the next (None: there is none)."""

    counts: Counts
    last: int
    after: LinkPair | None


@dataclass(frozen=True)
class _Arrival:
    """Ways to reach a device over one link pair.

    Attributes:
        links: between the stage before and the device; None where it is the first.
        states: states before.
        cost: least cost over those states, by block.
        which: the state that has it, by block.
    """

    links: LinkPair | None
    states: tuple[_State, ...]
    cost: Matrix
    which: Indices


@dataclass(frozen=True)
class _Best:
    """Best way to reach a state, by end block: its cost, the state before (position) and the first block."""

    cost: Matrix
    states: tuple[_State, ...]
    which: Indices
    first: Indices


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        num_blocks: number of blocks.
        groups: device indices, group by group.
        best: per state, the best ways to it.
    """

    num_blocks: int
    groups: Sequence[Sequence[int]]
    best: Mapping[_State, _Best] = field(repr=False)

    def ends(self, *, use_all_devices: bool = False, num_stages: int | None = None) -> tuple[float, list[_State]]:
        """Least cost of covering all blocks, and the final states that have it with the fewest devices.

        Args:
            use_all_devices: consider only the ways that use most devices.
            num_stages: consider only the ways with so many.
        """
        cost = {
            state: float(best.cost[self.num_blocks])
            for state, best in self.best.items()
            if num_stages in (None, sum(state.counts))
        }
        if use_all_devices:
            most = max((sum(state.counts) for state, c in cost.items() if isfinite(c)), default=0)
            cost = {state: c for state, c in cost.items() if sum(state.counts) == most} or cost
        least = min(cost.values())
        ends = [state for state, c in cost.items() if c <= least * (1 + TOLERANCE)]
        fewest = min(sum(state.counts) for state in ends)
        return least, [state for state in ends if sum(state.counts) == fewest]

    def stages(self, ends: Sequence[_State]) -> list[Stage]:
        """The stages of the cheapest way to one of these final states, in order."""
        state = min(ends, key=lambda s: self.best[s].cost[self.num_blocks])
        end = self.num_blocks
        found: list[Stage] = []
        while end > 0:
            best = self.best[state]
            first = int(best.first[end])
            found.append(Stage(self.groups[state.last][state.counts[state.last] - 1], first, end))
            if best.states:
                state = best.states[int(best.which[end])]
            end = first
        return found[::-1]


def search(
    cluster: Cluster,
    groups: Sequence[Sequence[int]],
    num_blocks: int,
    cost: IntervalCost,
    combine: np.ufunc,
    *,
    most_stages: int | None = None,
) -> Found:
    """Best cost of every state.

    Args:
        cluster: the devices.
        groups: indices of interchangeable devices, group by group; within a group they are used in order.
        num_blocks: number of blocks to cover.
        cost: of all intervals on a device; infinite where an interval is empty or forbidden.
        combine: joins the costs of stages: ``np.maximum`` or ``np.add``.
        most_stages: states with more are left out.
    """
    best: dict[_State, _Best] = {}
    states: dict[tuple[Counts, int], list[_State]] = {}
    every = product(*(range(len(group) + 1) for group in groups))
    most_stages = most_stages or sum(map(len, groups))
    for counts in sorted((c for c in every if 0 < sum(c) <= most_stages), key=sum):
        for last in (t for t, count in enumerate(counts) if count):
            device = groups[last][counts[last] - 1]
            arrivals = list(_arrivals(cluster, groups, best, states, counts, last, num_blocks))
            states[counts, last] = [_State(counts, last, a) for a in _links_after(cluster, groups, counts, device)]
            for state in states[counts, last]:
                best[state] = _reach(arrivals, partial(cost, sum(counts) - 1, device), state.after, combine)
    return Found(num_blocks, groups, best)


def link_pair(cluster: Cluster, source: int, destination: int) -> LinkPair:
    """The links between two devices, there and back."""
    return cluster.link(source, destination), cluster.link(destination, source)


def _links_after(
    cluster: Cluster, groups: Sequence[Sequence[int]], counts: Counts, device: int
) -> list[LinkPair | None]:
    """The different links that may lead on from a device to the next of each group."""
    following = [group[count] for group, count in zip(groups, counts, strict=True) if count < len(group)]
    return list(dict.fromkeys(link_pair(cluster, device, other) for other in following)) or [None]


def _arrivals(
    cluster: Cluster,
    groups: Sequence[Sequence[int]],
    best: Mapping[_State, _Best],
    states: Mapping[tuple[Counts, int], list[_State]],
    counts: Counts,
    last: int,
    num_blocks: int,
) -> Iterator[_Arrival]:
    """Ways to reach the last device, one for each different link pair that leads to it."""
    before = tuple(count - (t == last) for t, count in enumerate(counts))
    if not any(before):
        start = np.full(num_blocks + 1, np.inf)
        start[0] = 0.0
        yield _Arrival(None, (), start, np.zeros(num_blocks + 1, np.intp))
        return
    device = groups[last][counts[last] - 1]
    by_link: dict[LinkPair, list[_State]] = {}
    for t, count in enumerate(before):
        if count:
            pair = link_pair(cluster, groups[t][count - 1], device)
            by_link.setdefault(pair, []).extend(state for state in states[before, t] if state.after == pair)
    for pair, from_states in by_link.items():
        costs = np.stack([best[state].cost for state in from_states])
        which = costs.argmin(axis=0)
        yield _Arrival(pair, tuple(from_states), np.take_along_axis(costs, which[None], axis=0)[0], which)


def _reach(
    arrivals: Sequence[_Arrival],
    cost: Callable[[LinkPair | None, LinkPair | None], Matrix],
    after: LinkPair | None,
    combine: np.ufunc,
) -> _Best:
    """Best way to a state, over all arrivals and first blocks."""
    found: _Best | None = None
    for arrival in arrivals:
        candidates = combine(arrival.cost[:, None], cost(arrival.links, after))
        first = candidates.argmin(axis=0)
        least = np.take_along_axis(candidates, first[None], axis=0)[0]
        which = arrival.which[first]
        if found is None:
            found = _Best(least, arrival.states, which, first)
            continue
        better = least < found.cost
        found = _Best(
            np.where(better, least, found.cost),
            found.states + arrival.states,
            np.where(better, which + len(found.states), found.which),
            np.where(better, first, found.first),
        )
    assert found is not None  # every state has at least one way to it
    return found
