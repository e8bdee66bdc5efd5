"""Time of collective operations, by their usual algorithms on the switches that the devices hang on.

Costs in the model of R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in
MPICH", IJHPCA 19(1), 2005: ``α`` a step, ``S/β`` for bytes. With ``n`` devices, ``g`` units at a switch (nodes,
say), ``x`` bytes in and out of a unit, and ``B`` what the ports of its devices carry together:

- ring: ``n - 1`` steps; every unit's ports carry ``(n-1)/n · S``;
- tree (recursive doubling, Bruck, binomial): ``⌈log2 g⌉`` steps a switch, one switch after another, ``Σ x/B``;
- by levels (two-level, where there are nodes): a ring at each switch, so ``Σ (g - 1)`` steps; pieces stream from one
  switch to the next, so that bytes take as long as the busiest ports, ``max x/B``, as in NCCL's model of its
  algorithms (``src/graph/tuning.cc``: latencies add up, bandwidth is that of the slower part).

An all-gather by levels brings each unit what the others at its switch have, ``x = S(1 - n_unit/n_switch)``, a share to
each of its devices by its own rail, and then spreads it within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

from graphpart.cost.time.hubs import Hub, Load, Unit, join
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.topology import Topology

_LIKE = {"reduce-scatter": "all-gather", "reduce": "broadcast", "gather": "scatter"}
"""Kinds that are another one backwards, and take the same time."""


def slowest_link(cluster: Cluster, devices: Sequence[int]) -> Link:
    """The largest latency and the smallest bandwidth of one message between any two of these devices."""
    return CollectiveTimes(cluster, devices).link


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to carry out a collective.

    Attributes:
        name: ``ring``, ``tree``, ``by levels`` or ``direct``.
        latency_s: of its steps.
        byte_s: seconds for each byte of the value.
        loads: bytes on each lane, per byte of the value.
        limit: the lane that takes all that time; None where none does.
    """

    name: str
    latency_s: float
    byte_s: float
    loads: Mapping[int, float]
    limit: int | None = None

    def time_s(self, size_bytes: float) -> float:
        """Time for a value of so many bytes."""
        return self.latency_s + size_bytes * self.byte_s


class CollectiveTimes:
    """Times of collectives among some devices.

    Attributes:
        devices: their indices.
        link: what one message between them goes by, at worst.
    """

    def __init__(
        self,
        cluster: Cluster,
        devices: Sequence[int],
        *,
        count_latency: bool = True,
        beside: Iterable[Sequence[int]] = (),
    ) -> None:
        """Look at a group.

        Args:
            cluster: the devices.
            devices: indices of the group's devices.
            count_latency: whether steps take time, or bytes alone do.
            beside: other groups, which do the same at the same time, and may share ports with this one.
        """
        self.devices = tuple(devices)
        hub = join(cluster, devices)
        link = cluster.default_link if hub is None else hub.worst_link
        self.link = link if count_latency else replace(link, latency_s=0.0)
        self._topology, self._hub, self._count_latency = cluster.topology, hub, count_latency
        self._beside = [other for group in beside if (other := join(cluster, group)) is not None]
        self._patterns: dict[str, tuple[Pattern, ...]] = {}

    def pattern(self, kind: str, size_bytes: float) -> Pattern:
        """The fastest way.

        Args:
            kind: see :class:`graphpart.ir.program.Collective`.
            size_bytes: bytes of the whole value: of what is summed, of all parts together.
        """
        return min(self._all(_LIKE.get(kind, kind)), key=lambda pattern: pattern.time_s(size_bytes))

    def time_s(self, kind: str, size_bytes: float) -> float:
        """Time of the fastest way; see :meth:`pattern`."""
        return self.pattern(kind, size_bytes).time_s(size_bytes)

    @property
    def like(self) -> object:
        """What groups have in common whose collectives take the same times."""
        patterns = (*self._all("all-gather"), *self._all("all-to-all"))
        return self.link, tuple((pattern.name, pattern.latency_s, pattern.byte_s) for pattern in patterns)

    @property
    def received_byte_s(self) -> float:
        """Seconds for each byte that every device gets at once, from all others alike."""
        num_devices = len(self.devices)
        if num_devices < 2:
            return 1 / self.link.bandwidth_bytes_per_s
        part = (num_devices - 1) / num_devices**2
        return min(pattern.byte_s for pattern in self._all("all-to-all")) / part

    def of_messages(self, kind: str, message_bytes: float) -> tuple[Pattern, float]:
        """The fastest way, and the size of the value, if direct messages would have so many bytes together."""
        num_devices = len(self.devices)
        others = max(num_devices - 1, 1)
        size_bytes = message_bytes / others
        if kind == "all-reduce":
            size_bytes /= num_devices
        elif kind in ("all-to-all", "scatter", "gather"):
            size_bytes *= num_devices
        return self.pattern(kind, size_bytes), size_bytes

    def _all(self, kind: str) -> tuple[Pattern, ...]:
        found = self._patterns.get(kind)
        if found is None:
            found = self._patterns[kind] = self._make(kind)
        return found

    def _make(self, kind: str) -> tuple[Pattern, ...]:
        if self._hub is None:
            return (Pattern("none", 0.0, 0.0, {}),)
        found = _PATTERNS[kind](self._hub, self._topology)
        for other in self._beside:
            theirs = {pattern.name: pattern for pattern in _PATTERNS[kind](other, self._topology)}
            plainest = next(iter(theirs.values()))  # where theirs is another tree
            found = tuple(_together(own, theirs.get(own.name, plainest), self._topology) for own in found)
        return found if self._count_latency else tuple(replace(pattern, latency_s=0.0) for pattern in found)


def _together(own: Pattern, other: Pattern, topology: Topology) -> Pattern:
    """A pattern while another one uses some of its lanes."""
    load = Load(topology, {lane: share + other.loads.get(lane, 0.0) for lane, share in own.loads.items()})
    byte_s, limit = load.busiest
    return replace(
        own, loads=load.on, byte_s=max(own.byte_s, byte_s), limit=limit if byte_s >= own.byte_s else own.limit
    )


def _all_gather(hub: Hub, topology: Topology) -> tuple[Pattern, ...]:
    def lacks(unit: Unit, at: Hub) -> float:
        return 1 - len(unit.devices) / at.num_devices

    around = 1 - 1 / hub.num_devices
    found = [
        _streamed("ring", _ring_s(hub), _load(hub, topology, lambda unit, at: around, border=True)),
        _tree(hub, topology, lacks),
    ]
    return (*found, _by_levels(hub, topology, lacks)) if _has_levels(hub) else tuple(found)


def _all_reduce(hub: Hub, topology: Topology) -> tuple[Pattern, ...]:
    """A reduce-scatter, and an all-gather after it."""
    return tuple(
        replace(
            half,
            latency_s=2 * half.latency_s,
            byte_s=2 * half.byte_s,
            loads={lane: 2 * load for lane, load in half.loads.items()},
        )
        for half in _all_gather(hub, topology)
    )


def _all_to_all(hub: Hub, topology: Topology) -> tuple[Pattern, ...]:
    """Parts sent to where they go; or by levels, first to the neighbour that has the rail to there."""
    total = hub.num_devices

    def crosses(unit: Unit, at: Hub) -> float:
        return len(unit.devices) * (total - len(unit.devices)) / total**2

    def passes(unit: Unit, at: Hub) -> float:
        return len(unit.devices) / total * (1 - len(unit.devices) / at.num_devices)

    direct = _streamed("direct", _ring_s(hub), _load(hub, topology, crosses, border=True))
    return (direct, _by_levels(hub, topology, passes)) if _has_levels(hub) else (direct,)


def _broadcast(hub: Hub, topology: Topology) -> tuple[Pattern, ...]:
    """The whole value down a tree, or parts of it to all and these to one another."""
    byte_s = _deepest(hub, lambda at: _rounds(at) / at.link.bandwidth_bytes_per_s)
    load = _load(hub, topology, lambda unit, at: 1.0, border=True)
    tree = Pattern("tree", _deepest(hub, _tree_s), byte_s, _both_ways(load.on))
    return (tree, *_all_reduce(hub, topology))


def _scatter(hub: Hub, topology: Topology) -> tuple[Pattern, ...]:
    """One after another through the root's link, or down a tree; what lanes carry depends on who the root is."""
    byte_s = (1 - 1 / hub.num_devices) / hub.link.bandwidth_bytes_per_s
    return Pattern("direct", _ring_s(hub), byte_s, {}), Pattern("tree", _deepest(hub, _tree_s), byte_s, {})


_PATTERNS: Mapping[str, Callable[[Hub, Topology], tuple[Pattern, ...]]] = {
    "all-gather": _all_gather,
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
    "broadcast": _broadcast,
    "scatter": _scatter,
}

_Share = Callable[[Unit, Hub], float]
"""The part of the value that enters and leaves a unit of a hub."""


def _load(hub: Hub, topology: Topology, share: _Share, *, border: bool) -> Load:
    load = Load(topology)
    for at in hub.all():
        for unit in at.units:
            load.add(unit, share(unit, at), border=border)
    return load


def _both_ways(loads: Mapping[int, float]) -> dict[int, float]:
    return {lane + way: load for lane, load in loads.items() for way in (0, 1)}


def _streamed(name: str, latency_s: float, load: Load) -> Pattern:
    byte_s, limit = load.busiest
    return Pattern(name, latency_s, byte_s, _both_ways(load.on), limit)


def _by_levels(hub: Hub, topology: Topology, share: _Share) -> Pattern:
    latency_s = _deepest(hub, lambda at: (len(at.units) - 1) * at.link.latency_s)
    return _streamed("by levels", latency_s, _load(hub, topology, share, border=False))


def _tree(hub: Hub, topology: Topology, share: _Share) -> Pattern:
    """Switch by switch, the highest first."""

    def bytes_s(at: Hub) -> float:
        load = Load(topology)
        for unit in at.units:
            load.add(unit, share(unit, at), border=False)
        return load.busiest[0]

    load = _load(hub, topology, share, border=False)
    return Pattern("tree", _deepest(hub, _tree_s), _deepest(hub, bytes_s), _both_ways(load.on), load.busiest[1])


def _has_levels(hub: Hub) -> bool:
    return any(unit.hub is not None for unit in hub.units)


def _deepest(hub: Hub, cost_s: Callable[[Hub], float]) -> float:
    """The sum of what switches cost, on the way down that costs most."""
    below = [_deepest(unit.hub, cost_s) for unit in hub.units if unit.hub is not None]
    return cost_s(hub) + max(below, default=0.0)


def _ring_s(hub: Hub) -> float:
    return (hub.num_devices - 1) * hub.worst_link.latency_s


def _rounds(hub: Hub) -> int:
    return ceil(log2(len(hub.units)))


def _tree_s(hub: Hub) -> float:
    return _rounds(hub) * hub.link.latency_s
