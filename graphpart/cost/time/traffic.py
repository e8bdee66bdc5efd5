"""When messages go, as the links and lanes on their ways are free.

One thing at a time: whatever crosses a link or a lane has a turn on it, in the order in which it became ready. On a
link between two devices, and on one that pairs of devices share, a turn is the whole time of the message. On a lane,
which may be faster than one message, it is the message's bytes over the lane's bandwidth; turns of messages under way
at once follow one another within these messages' times, so a lane never carries more than its bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphpart.cost.time.collectives import CollectiveTimes
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.program import Bridge, Collective
from graphpart.ir.timeline import LinkUse


@dataclass(frozen=True, slots=True)
class _Route:
    """The way from one device to another: its link, the numbers of all that carries one message at a time on it, the
    pair's own first, and its lanes.
    """

    link: Link
    queues: tuple[int, ...]
    lanes: tuple[int, ...]


class Traffic:
    """What messages have taken so far of a cluster's links."""

    def __init__(self, cluster: Cluster) -> None:
        """Begin with all links free."""
        self._cluster = cluster
        self._lanes = cluster.topology.lanes
        self._routes: dict[tuple[int, int], _Route] = {}
        self._pairs: list[tuple[int, int]] = []
        self._free_s = [0.0] * len(cluster.shared)  # per queue: what pairs share, then pairs of their own
        self._lane_free_s: dict[int, float] = {}
        self._busy_s: dict[int, float] = {}  # per queue that is a link
        self._bytes: dict[int, float] = {}
        self._lane_bytes: dict[int, float] = {}
        self._times: dict[tuple[int, ...], CollectiveTimes] = {}

    def send(self, bridge: Bridge, now_s: float) -> tuple[float, float]:
        """Let a message go: when it starts, and how long it takes."""
        size_bytes = bridge.size_bytes
        route = self._route(bridge.source, bridge.destination)
        took_s = route.link.time_s(size_bytes)
        start_s = self._turns(route.queues, dict.fromkeys(route.lanes, size_bytes), took_s, now_s)
        self._note(route, size_bytes)
        return start_s, took_s

    def exchange(self, collective: Collective, bridges: Sequence[Bridge], now_s: float) -> tuple[float, float]:
        """Let the messages of a collective go together, as by its best algorithm: when, and how long that takes."""
        devices = collective.devices
        times = self._times.get(devices)
        if times is None:
            times = self._times[devices] = CollectiveTimes(self._cluster, devices)
        pattern, size_bytes = times.of_messages(collective.kind, collective.size_bytes)
        routes = [self._route(bridge.source, bridge.destination) for bridge in bridges]
        loads = {lane: load * size_bytes for lane, load in pattern.loads.items()}
        if not loads:  # as the messages themselves would
            for bridge, route in zip(bridges, routes, strict=True):
                for lane in route.lanes:
                    loads[lane] = loads.get(lane, 0.0) + bridge.size_bytes
        queues = dict.fromkeys(queue for route in routes for queue in route.queues)
        took_s = pattern.time_s(size_bytes)
        start_s = self._turns(queues, loads, took_s, now_s)
        for bridge, route in zip(bridges, routes, strict=True):
            self._note(route, bridge.size_bytes)
        return start_s, took_s

    def _turns(self, queues: Iterable[int], loads: Mapping[int, float], took_s: float, now_s: float) -> float:
        """Take a turn on each, as soon as all are free for it: when that is."""
        start_s, free_s, lane_free_s, lanes = now_s, self._free_s, self._lane_free_s, self._lanes
        for queue in queues:
            if free_s[queue] > start_s:
                start_s = free_s[queue]
        turns = {lane: load / lanes[lane].bandwidth_bytes_per_s for lane, load in loads.items()}
        for lane, turn_s in turns.items():
            earliest_s = lane_free_s.get(lane, 0.0) + turn_s - took_s
            if earliest_s > start_s:
                start_s = earliest_s
        for queue in queues:
            free_s[queue] = start_s + took_s
            self._busy_s[queue] = self._busy_s.get(queue, 0.0) + took_s
        for lane, turn_s in turns.items():
            lane_free_s[lane] = max(lane_free_s.get(lane, 0.0), start_s) + turn_s
            self._lane_bytes[lane] = self._lane_bytes.get(lane, 0.0) + loads[lane]
        return start_s

    def _note(self, route: _Route, size_bytes: float) -> None:
        for queue in route.queues:
            self._bytes[queue] = self._bytes.get(queue, 0.0) + size_bytes

    def _route(self, source: int, destination: int) -> _Route:
        route = self._routes.get((source, destination))
        if route is None:
            self._free_s.append(0.0)
            self._pairs.append((source, destination))
            queues = (len(self._free_s) - 1, *self._cluster.shared_by(source, destination))
            way = self._cluster.way(source, destination)
            link = self._cluster.link(source, destination)
            route = self._routes[source, destination] = _Route(link, queues, () if way is None else way.lanes)
        return route

    def links(self) -> tuple[LinkUse, ...]:
        """What each link has carried, the busiest first."""
        found = [
            LinkUse(self._lanes[lane].name, size_bytes, size_bytes / self._lanes[lane].bandwidth_bytes_per_s)
            for lane, size_bytes in self._lane_bytes.items()
        ]
        names = [shared.name for shared in self._cluster.shared]
        devices = self._cluster.devices
        names += [f"{devices[source].name} → {devices[destination].name}" for source, destination in self._pairs]
        through = {route.queues[0] for route in self._routes.values() if route.lanes}  # the lanes are the links there
        found += [
            LinkUse(names[queue], self._bytes.get(queue, 0.0), busy_s)
            for queue, busy_s in self._busy_s.items()
            if queue not in through
        ]
        return tuple(sorted(found, key=lambda link: -link.busy_s))
