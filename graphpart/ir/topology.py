"""Trees of switches: the way between any two devices, and what messages on their ways share.

Devices hang on switches, these on further ones: an NVSwitch joins the devices of a node, leaf switches join the network
cards of nodes, a spine joins racks. Whatever a member of a switch sends to or gets from the others goes through its
ports on that switch, of which it may have several (rails).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from graphpart.errors import ClusterError

MAX_DEPTH = 16
"""Switches above one device."""

MAX_PORTS = 4096
"""Ports that one member has on its switch."""

MAX_OVERSUBSCRIPTION = 1e6


@dataclass(frozen=True, slots=True)
class Switch:
    """What joins several devices, or several switches, each by ports of its own.

    Attributes:
        name: for people, and for switches above it.
        members: indices of devices, and names of switches, that hang on this one.
        latency_s: time until the first byte arrives, of a message that turns around here.
        bandwidth_bytes_per_s: of one port, in each direction.
        ports: ports that each member has here (rails). The devices under it share them evenly, neighbours together, and
            one message takes one port.
        oversubscription: how many times as much its ports could carry than all of them together do.
        peer_access: whether messages between members may turn around here; otherwise they go on to the next switch
            above where they may, as PCIe traffic does that has to pass through the host.
    """

    name: str
    members: tuple[int | str, ...]
    latency_s: float
    bandwidth_bytes_per_s: float
    ports: int = 1
    oversubscription: float = 1.0
    peer_access: bool = True

    def __post_init__(self) -> None:
        called = f"switch {self.name!r}"
        if not self.members:
            raise ClusterError(f"{called} needs at least one member")
        if not (isfinite(self.latency_s) and self.latency_s >= 0):
            raise ClusterError(f"{called}: latency_s {self.latency_s} is no time")
        if not (isfinite(self.bandwidth_bytes_per_s) and self.bandwidth_bytes_per_s > 0):
            raise ClusterError(f"{called}: bandwidth_bytes_per_s {self.bandwidth_bytes_per_s} is no rate")
        if isinstance(self.ports, bool) or not isinstance(self.ports, int) or not 1 <= self.ports <= MAX_PORTS:
            raise ClusterError(f"{called}: ports {self.ports!r} is no whole number from 1 to {MAX_PORTS}")
        if not 1 <= self.oversubscription <= MAX_OVERSUBSCRIPTION:
            raise ClusterError(
                f"{called}: oversubscription {self.oversubscription} is not from 1 to {MAX_OVERSUBSCRIPTION:.0f}"
            )


@dataclass(frozen=True, slots=True)
class Lane:
    """One direction of some ports: all that crosses it shares its bandwidth.

    Attributes:
        name: for people.
        bandwidth_bytes_per_s: of all its ports together.
        message_bytes_per_s: the most that one message gets of it.
    """

    name: str
    bandwidth_bytes_per_s: float
    message_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Way:
    """How messages go from one device to another.

    Attributes:
        latency_s: time until the first byte arrives.
        bandwidth_bytes_per_s: rate of one message that has the way for itself.
        lanes: what it crosses, by index in :attr:`Topology.lanes`.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    lanes: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """The ways through a tree of switches, or several.

    Nodes of the trees are numbered: devices first, then switches.

    Attributes:
        switches: in the order in which they were given.
        device_names: in rank order.
        parent: per node, the switch that it hangs on; absent at the top.
        lanes: directions of ports; those out of a member have even numbers, each with its way in after it.
    """

    switches: tuple[Switch, ...]
    device_names: tuple[str, ...]
    parent: Mapping[int, int] = field(init=False)
    lanes: tuple[Lane, ...] = field(init=False, repr=False)
    _lanes_of: Mapping[tuple[int, int], tuple[int, ...]] = field(init=False, repr=False)
    _climbs: dict[int, Mapping[int, tuple[int, ...]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parent", _parents(self.switches, self.device_names))
        lanes, lanes_of = self._make_lanes()
        object.__setattr__(self, "lanes", lanes)
        object.__setattr__(self, "_lanes_of", lanes_of)

    def switch(self, node: int) -> Switch:
        """The switch with a number."""
        return self.switches[node - len(self.device_names)]

    def climb(self, device: int) -> Mapping[int, tuple[int, ...]]:
        """The switches above a device, lowest first, each with the lanes out that lead there."""
        found = self._climbs.get(device)
        if found is None:
            node = device
            lanes: tuple[int, ...] = ()
            above: dict[int, tuple[int, ...]] = {}
            while (switch := self.parent.get(node)) is not None:
                lanes += self._lanes_of[node, device]
                above[switch] = lanes
                node = switch
            found = self._climbs[device] = above
        return found

    def meeting(self, devices: Sequence[int]) -> int | None:
        """The lowest switch under which all these devices reach one another; None where there is none."""
        first, *others = devices
        climbs = [self.climb(device) for device in others]
        return next(
            (s for s in self.climb(first) if self.switch(s).peer_access and all(s in climb for climb in climbs)), None
        )

    def way(self, source: int, destination: int) -> Way | None:
        """From one device to another; None where no switch joins them."""
        top = self.meeting((source, destination))
        if top is None:
            return None
        out, back = self.climb(source)[top], self.climb(destination)[top]
        lanes = (*out, *(lane + 1 for lane in reversed(back)))
        return Way(self.switch(top).latency_s, min(self.lanes[i].message_bytes_per_s for i in lanes), lanes)

    def apart(self) -> tuple[int, int] | None:
        """Two devices that no switch joins; None where all are joined."""
        first, *others = range(len(self.device_names))
        return next(((first, other) for other in others if self.meeting((first, other)) is None), None)

    def neighbours_first(self) -> tuple[int, ...]:
        """All devices, those under one switch one after another; in rank order as far as that allows."""
        first = {node: devices[0] for node, devices in self._below().items()}

        def place(device: int) -> list[int]:
            return [*(first[switch] for switch in reversed(tuple(self.climb(device)))), device]

        return tuple(sorted(range(len(self.device_names)), key=place))

    def _below(self) -> dict[int, list[int]]:
        """Per node, the devices under it, in rank order."""
        below: dict[int, list[int]] = {}
        for device in range(len(self.device_names)):
            node = device
            below[node] = [device]
            while (switch := self.parent.get(node)) is not None:
                below.setdefault(switch, []).append(device)
                node = switch
        return below

    def _make_lanes(self) -> tuple[tuple[Lane, ...], dict[tuple[int, int], tuple[int, ...]]]:
        """All lanes, and per node and device under it, those out that its messages take from there."""
        lanes: list[Lane] = []
        lanes_of: dict[tuple[int, int], tuple[int, ...]] = {}

        def add(name: str, bandwidth: float, port: float) -> int:
            lanes.extend(Lane(f"{name}, {way}", bandwidth, min(bandwidth, port)) for way in ("out", "in"))
            return len(lanes) - 2

        below = self._below()
        for node, above in self.parent.items():
            switch, devices = self.switch(above), below[node]
            bandwidth, ports = switch.bandwidth_bytes_per_s, switch.ports
            called = self.device_names[node] if node < len(self.device_names) else self.switch(node).name
            where = f"{called} to {switch.name}"
            rails = min(ports, len(devices))
            total = ports * bandwidth / switch.oversubscription
            pool = (add(where, total, bandwidth),) if rails == 1 or switch.oversubscription > 1 else ()
            own = [
                add(f"{where}, rail {rail}", ports * bandwidth / rails, bandwidth)
                for rail in range(rails * (rails > 1))
            ]
            for rank, device in enumerate(devices):
                lanes_of[node, device] = (*((own[rank * rails // len(devices)],) if own else ()), *pool)
        return tuple(lanes), lanes_of


def _parents(switches: Sequence[Switch], device_names: Sequence[str]) -> dict[int, int]:
    """Per node, the switch that it hangs on; refuses what is no tree, or leads nowhere."""
    number = _numbers(switches, device_names)
    parent: dict[int, int] = {}
    for switch in switches:
        own = number[switch.name]
        for member in switch.members:
            node = number.get(member) if isinstance(member, str) else member
            called = f"switch {switch.name!r}: member {member!r}"
            if node is None or isinstance(member, bool) or not isinstance(node, int):
                raise ClusterError(f"{called} is neither a device nor a switch")
            if not isinstance(member, str) and not 0 <= node < len(device_names):
                raise ClusterError(f"{called} is no device from 0 to {len(device_names) - 1}")
            if node in parent:
                other = switches[parent[node] - len(device_names)].name
                raise ClusterError(f"{called} hangs on switch {other!r} already; it can hang on one only")
            parent[node] = own
    for name, node in number.items():
        _check_above(name, node, parent, switches, len(device_names))
    return dict(sorted(parent.items()))


def _numbers(switches: Sequence[Switch], device_names: Sequence[str]) -> dict[str, int]:
    if len(switches) > 2 * len(device_names) + MAX_DEPTH:
        raise ClusterError(f"{len(switches)} switches for {len(device_names)} devices; that is more than they can need")
    number: dict[str, int] = {}
    taken = set(device_names)
    for node, switch in enumerate(switches, len(device_names)):
        if switch.name in number or switch.name in taken:
            raise ClusterError(f"two devices or switches are called {switch.name!r}")
        number[switch.name] = node
    return number


def _check_above(name: str, node: int, parent: Mapping[int, int], switches: Sequence[Switch], num_devices: int) -> None:
    """Refuse a switch that is above itself, in too high a tree, or cannot connect its members."""
    top, height = node, 1
    connects = switches[node - num_devices].peer_access
    while (above := parent.get(top)) is not None:
        top, height = above, height + 1
        connects = connects or switches[top - num_devices].peer_access
        if top == node:
            raise ClusterError(f"switch {name!r} is, through its members, a member of itself")
        if height > MAX_DEPTH:
            raise ClusterError(f"switch {name!r} has more than {MAX_DEPTH - 1} switches above it")
    if not connects:
        raise ClusterError(f"switch {name!r} does not connect its members: neither it nor one above has peer access")
