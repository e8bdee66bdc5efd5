"""Many devices as a few groups of neighbours, so that tables and pictures of large clusters stay readable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from graphpart.draw.words.share import Crossing
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.placement import Placement, Shard

MOST_DEVICES = 16
"""More used devices than this are shown in groups."""

_SMALLEST_GROUP = 8


@dataclass(frozen=True)
class DeviceGroups:
    """Devices in groups of neighbours of one kind, numbered as the devices of a small cluster would be.

    Attributes:
        cluster: a device per group; only names and kinds mean something.
        members: per group, the indices of its devices.
    """

    cluster: Cluster
    members: tuple[tuple[int, ...], ...]

    @property
    def of(self) -> dict[int, int]:
        """Per device, its group."""
        return {device: group for group, devices in enumerate(self.members) for device in devices}

    def placement(self, placement: Placement) -> Placement:
        """The same decision with groups in place of devices."""
        of = self.of
        tiles = {n: tuple(replace(t, device=of[t.device]) for t in cut) for n, cut in placement.tiles.items()}
        homes = {name: of[home] for name, home in placement.homes.items()}
        shards = {n: tuple(Shard(of[s.device], s.region) for s in parts) for n, parts in placement.shards.items()}
        return Placement(tiles, homes, shards)

    def crossings(self, found: Iterable[Crossing]) -> tuple[Crossing, ...]:
        """Crossings between groups; those within one have it as source and destination."""
        of = self.of
        total: dict[tuple[str, int, int, bool], Crossing] = {}
        for c in found:
            key = (c.value, of[c.source], of[c.destination], c.parameter)
            had = total.get(key)
            size_bytes, parts = (had.size_bytes, had.parts) if had else (0, 0)
            total[key] = replace(
                c, source=key[1], destination=key[2], size_bytes=size_bytes + c.size_bytes, parts=parts + c.parts
            )
        return tuple(total.values())


def group_devices(placement: Placement, cluster: Cluster, degrees: Degrees | None = None) -> DeviceGroups | None:
    """Groups of the devices that a placement uses; None where there are few enough to show each.

    Under degrees, a group is a stage, or of many devices of one stage, a replica.

    Args:
        placement: where everything runs and lives.
        cluster: the devices.
        degrees: of which the placement is.
    """
    used = placement.devices
    if degrees is not None and (found := _by_degrees(degrees, cluster)) is not None:
        return found
    size = _SMALLEST_GROUP
    if len(used) <= MOST_DEVICES:
        return None
    while len(members := _runs(used, cluster, size)) > MOST_DEVICES and size < len(used):
        size *= 2
    devices = tuple(replace(cluster.devices[m[0]], name=_name(m, cluster), kind=_kind(m, cluster)) for m in members)
    return DeviceGroups(Cluster(devices, cluster.default_link, name=cluster.name), members)


def _by_degrees(degrees: Degrees, cluster: Cluster) -> DeviceGroups | None:
    """Stages, or many replicas; several neighbours in one group where they are many. None where each is one device."""
    kind, count = ("stage", degrees.pp) if degrees.pp > 1 else ("replica", degrees.dp)
    size = degrees.num_devices // count
    if size == 1 or (kind == "replica" and (count == 1 or degrees.num_devices <= MOST_DEVICES)):
        return None
    together = -(-count // MOST_DEVICES)
    order = cluster.topology.neighbours_first()
    members, devices = [], []
    for first in range(0, count, together):
        last = min(first + together, count) - 1
        own = order[first * size : (last + 1) * size]
        members.append(own)
        name = f"{kind} {first}" if first == last else f"{kind}s {first}–{last}"
        devices.append(
            replace(cluster.devices[own[0]], name=name, kind=f"{_name(own, cluster)}, {_kind(own, cluster)}")
        )
    return DeviceGroups(Cluster(tuple(devices), cluster.default_link, name=cluster.name), tuple(members))


def _runs(used: tuple[int, ...], cluster: Cluster, size: int) -> tuple[tuple[int, ...], ...]:
    runs: list[list[int]] = []
    for device in used:
        last = runs[-1] if runs else []
        alike = last and cluster.devices[last[-1]].kind == cluster.devices[device].kind
        if alike and len(last) < size:
            last.append(device)
        else:
            runs.append([device])
    return tuple(map(tuple, runs))


def _name(members: tuple[int, ...], cluster: Cluster) -> str:
    """``cuda:0–7``; first and last name where they have no common stem."""
    first, last = cluster.devices[members[0]].name, cluster.devices[members[-1]].name
    if len(members) == 1:
        return first
    stem, colon, number = first.rpartition(":")
    consecutive = members == tuple(range(members[0], members[-1] + 1))
    if colon and number.isdigit() and last.startswith(stem + colon):
        return f"{first}{'–' if consecutive else ' … '}{last[len(stem) + 1 :]}"
    return f"{first} … {last}"


def _kind(members: tuple[int, ...], cluster: Cluster) -> str:
    kind = cluster.devices[members[0]].kind
    return f"{len(members)} × {kind}" if len(members) > 1 else kind
