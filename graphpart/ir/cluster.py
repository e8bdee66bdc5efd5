"""The machines at hand: devices, and the links between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from graphpart.errors import ClusterError
from graphpart.ir.topology import Switch, Topology, Way

MAX_DEVICES = 4096
"""Devices of a cluster: planning compares pairs of them."""


def check_count(count: int) -> None:
    """Refuse a cluster of too many devices, before they are made.

    Raises:
        ClusterError: with the most that there may be.
    """
    if count > MAX_DEVICES:
        shown = str(count) if count < 10**18 else "that many"
        raise ClusterError(f"a cluster of {shown} devices was asked for; {MAX_DEVICES} are the most")


@dataclass(frozen=True, slots=True)
class Device:
    """One device that computes.

    Attributes:
        name: as PyTorch writes it, ``cuda:0`` or ``cpu:1``; ``cpu:1`` is the second CPU worker, and ``cuda:0#1`` the
            second of several workers that share the card ``cuda:0``.
        kind: model of the device, such as ``H100-SXM``; devices of one kind are interchangeable.
        flops_per_s: peak rate by dtype; ``float32`` must be there.
        memory_bytes: memory that may be filled.
        memory_bandwidth_bytes_per_s: rate at which that memory is read or written.
        efficiency: part of the peak that dense products reach in practice, in ``(0, 1]``.
        overhead_s: time to start one operator.
    """

    name: str
    kind: str
    flops_per_s: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    efficiency: float = 0.6
    overhead_s: float = 5e-6

    def __post_init__(self) -> None:
        if self.flops_per_s.get("float32", 0) <= 0:
            raise ClusterError(f"device {self.name!r} needs a positive flops_per_s for float32")
        if self.memory_bytes <= 0 or self.memory_bandwidth_bytes_per_s <= 0:
            raise ClusterError(f"device {self.name!r} needs positive memory_bytes and memory bandwidth")
        for dtype, rate in self.flops_per_s.items():
            if not 0 < rate < float("inf"):
                raise ClusterError(f"device {self.name!r}: flops_per_s of {dtype} is {rate}, not a rate")
        if not 0 <= self.overhead_s < float("inf"):
            raise ClusterError(f"device {self.name!r}: overhead_s {self.overhead_s} is no time")
        if not 0 < self.efficiency <= 1:
            raise ClusterError(f"device {self.name!r}: efficiency {self.efficiency} is not in (0, 1]")

    @property
    def place(self) -> str:
        """The device of PyTorch that the worker is on: ``cuda:0`` for ``cuda:0#1``."""
        return self.name.partition("#")[0]

    def rate(self, dtype: str) -> float:
        """Peak FLOP/s for a dtype; one that isn't listed runs at the float32 rate."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a connection between two devices.

    Attributes:
        latency_s: time until the first byte arrives.
        bandwidth_bytes_per_s: rate after that.
    """

    latency_s: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        if self.latency_s < 0 or self.bandwidth_bytes_per_s <= 0:
            raise ClusterError(f"a link needs latency_s >= 0 and a positive bandwidth, not {self}")

    def time_s(self, size_bytes: float) -> float:
        """Time to carry a message: latency plus bytes over bandwidth (Hockney's model)."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class SharedLink:
    """A part of the way that several pairs of devices have in common: a network card, a PCIe switch.

    It carries one message at a time, at the rate of the link between the two devices, in one direction. A card that
    sends and receives at once is two of these.

    Attributes:
        name: for people.
        sources: indices of the devices whose messages take it.
        destinations: indices of the devices that they go to.
    """

    name: str
    sources: frozenset[int]
    destinations: frozenset[int]


@dataclass(frozen=True)
class Cluster:
    """Devices, and the link between any two of them.

    Attributes:
        devices: in rank order.
        default_link: the link between any two devices that neither ``links`` nor a switch joins.
        links: links by (source, destination) device index; a pair that has one goes through no switch.
        name: for tables.
        shared: what messages between several pairs of devices wait for one another at.
        switches: what joins devices, and these switches in turn, each member by ports that its messages share.
    """

    devices: tuple[Device, ...]
    default_link: Link
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    name: str = ""
    shared: tuple[SharedLink, ...] = ()
    switches: tuple[Switch, ...] = ()

    def __post_init__(self) -> None:
        check_count(len(self.devices))
        if not self.devices:
            raise ClusterError("a cluster needs at least one device")
        for name, count in Counter(d.name for d in self.devices).items():
            if count > 1:
                way = "'cpu:0', 'cpu:1'"
                if name.startswith("cuda"):
                    way = f"'cuda:0', 'cuda:1'; workers that share one card are '{name}#0', '{name}#1'"
                raise ClusterError(f"two devices are called {name!r}; give each its own index, as in {way}")
        known = range(len(self.devices))
        for source, destination in self.links:
            if not (source in known and destination in known):
                raise ClusterError(f"link {source}->{destination} names a device outside 0..{len(known) - 1}")
        for shared in self.shared:
            if not (shared.sources and shared.destinations):
                raise ClusterError(f"shared link {shared.name!r} needs at least one source and one destination")
            for device in sorted(shared.sources | shared.destinations):
                if device not in known:
                    raise ClusterError(
                        f"shared link {shared.name!r} names device {device}, outside 0..{len(known) - 1}"
                    )
        _ = self.topology  # which refuses switches that make no tree

    def __len__(self) -> int:
        return len(self.devices)

    def link(self, source: int, destination: int) -> Link:
        """The link from one device to another, by index, as one message has it that is alone."""
        found = self.links.get((source, destination))
        if found is None and (way := self.way(source, destination)) is not None:
            return Link(way.latency_s, way.bandwidth_bytes_per_s)
        return found or self.default_link

    @cached_property
    def topology(self) -> Topology:
        """The trees that the switches make."""
        return Topology(self.switches, tuple(device.name for device in self.devices))

    def way(self, source: int, destination: int) -> Way | None:
        """The way from one device to another through switches; None where a link of their own joins them."""
        if not self.switches or source == destination or (source, destination) in self.links:
            return None
        return self.topology.way(source, destination)

    def shared_by(self, source: int, destination: int) -> tuple[int, ...]:
        """The shared links on the way from one device to another, by their index in ``shared``."""
        return tuple(
            i for i, link in enumerate(self.shared) if source in link.sources and destination in link.destinations
        )
