"""The part of a cluster's tree of switches that some devices use together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.topology import Topology


@dataclass(frozen=True, slots=True)
class Unit:
    """Devices of a hub that reach one another without it, or a single one.

    Attributes:
        devices: their indices.
        lanes: per device, the lanes out that lead from it to the hub, the unit's own first.
        within: how many of these lie within the unit, and not on its border.
        most_bytes_per_s: a rate that it cannot pass, whatever its lanes could.
        hub: what joins its devices; None for a single one.
    """

    devices: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]
    within: tuple[int, ...]
    most_bytes_per_s: float
    hub: Hub | None = None


@dataclass(frozen=True, slots=True)
class Hub:
    """A switch at which units meet.

    Attributes:
        link: its latency, and the rate of one message.
        num_devices: in all its units.
        units: at least two.
    """

    link: Link
    num_devices: int
    units: tuple[Unit, ...]

    @property
    def worst_link(self) -> Link:
        """What one message between any two of the devices goes by, at worst."""
        return Link(max(hub.link.latency_s for hub in self.all()), self.link.bandwidth_bytes_per_s)

    def all(self) -> Iterator[Hub]:
        """This hub and all those below it."""
        yield self
        for unit in self.units:
            if unit.hub is not None:
                yield from unit.hub.all()


@dataclass
class Load:
    """Bytes on lanes, per byte of the value that is exchanged.

    Attributes:
        topology: whose lanes they are.
        on: per lane.
        rest_s: seconds a byte that no lane accounts for.
    """

    topology: Topology
    on: dict[int, float] = field(default_factory=dict)
    rest_s: float = 0.0

    def add(self, unit: Unit, share: float, *, border: bool) -> None:
        """Let a part of the value leave a unit, and as much enter it, evenly by all its devices.

        Args:
            unit: whose ports it crosses.
            share: the part of the value.
            border: whether only the unit's own ports count, not those within it.
        """
        each = share / len(unit.devices)
        for lanes, within in zip(unit.lanes, unit.within, strict=True):
            for lane in lanes[within if border else 0 :]:
                self.on[lane] = self.on.get(lane, 0.0) + each
        self.rest_s = max(self.rest_s, share / unit.most_bytes_per_s)

    @property
    def busiest(self) -> tuple[float, int | None]:
        """Seconds a byte of the lane that takes longest, and which it is; None if none limits."""
        lanes = self.topology.lanes
        slowest = max(
            ((load / lanes[lane].bandwidth_bytes_per_s, -lane) for lane, load in self.on.items()), default=(0.0, 0)
        )
        return (slowest[0], -slowest[1]) if slowest[0] >= self.rest_s and self.on else (self.rest_s, None)


def join(cluster: Cluster, devices: Sequence[int]) -> Hub | None:
    """What joins these devices; None for fewer than two.

    Where links of their own join some of them, all are taken to be joined by links like the slowest.
    """
    if len(devices) < 2:
        return None
    own, topology = set(devices), cluster.topology
    links = [link for (a, b), link in cluster.links.items() if a in own and b in own and a != b]
    top = topology.meeting(devices)
    tree = None if top is None else _below(topology, top, tuple(devices))
    if tree is not None and not links:
        return tree
    if len(links) < len(devices) * (len(devices) - 1):
        links.append(cluster.default_link if tree is None else tree.link)
    if tree is None and cluster.switches:  # which join some of them
        links += {cluster.link(a, b) for a in devices for b in devices if a != b}
    link = Link(max(link.latency_s for link in links), min(link.bandwidth_bytes_per_s for link in links))
    units = tuple(Unit((device,), ((),), (0,), link.bandwidth_bytes_per_s) for device in devices)
    return Hub(link, len(devices), units)


def _below(topology: Topology, top: int, devices: tuple[int, ...]) -> Hub:
    climbs = {device: topology.climb(device) for device in devices}
    lanes = topology.lanes
    rate = min(lanes[lane].message_bytes_per_s for device in devices for lane in climbs[device][top])
    members: dict[int, list[int]] = {}
    for device in devices:
        members.setdefault(_member(topology, climbs[device], top, device), []).append(device)
    units = []
    for own in members.values():
        hub, within = None, (0,) * len(own)
        if len(own) > 1:
            meeting = topology.meeting(own)
            assert meeting is not None  # they have a switch with peer access in common below the top
            hub = _below(topology, meeting, tuple(own))
            within = tuple(len(climbs[device][meeting]) for device in own)
        pairs = len(own) * (len(devices) - len(own))
        units.append(Unit(tuple(own), tuple(climbs[d][top] for d in own), within, pairs * rate, hub))
    return Hub(Link(topology.switch(top).latency_s, rate), len(devices), tuple(units))


def _member(topology: Topology, climb: Mapping[int, tuple[int, ...]], top: int, device: int) -> int:
    """The highest switch with peer access below another one, above a device; the device where there is none."""
    found = device
    for switch in climb:
        if switch == top:
            break
        if topology.switch(switch).peer_access:
            found = switch
    return found
