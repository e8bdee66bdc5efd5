"""Time of collective operations, by their usual algorithms.

Costs after R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH",
IJHPCA 19(1), 2005: with ``n`` devices, latency ``α`` and bandwidth ``β`` of the slowest link, ring algorithms move the
fewest bytes and tree algorithms take the fewest messages; the better of both is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

from graphpart.ir.cluster import Cluster, Link


def slowest_link(cluster: Cluster, devices: Sequence[int]) -> Link:
    """The largest latency and the smallest bandwidth between any two of these devices."""
    links = [cluster.link(a, b) for a in devices for b in devices if a != b] or [cluster.default_link]
    return Link(max(link.latency_s for link in links), min(link.bandwidth_bytes_per_s for link in links))


def all_reduce_s(size_bytes: float, num_devices: int, link: Link) -> float:
    """Every device gets the sum of what all have: ring ``2(n-1)α + 2(n-1)/n·S/β``, tree ``2⌈log n⌉(α + S/β)``."""
    ring = 2 * _ring_s(size_bytes, num_devices, link)
    return min(ring, 2 * _rounds(num_devices) * link.time_s(size_bytes))


def all_gather_s(size_bytes: float, num_devices: int, link: Link) -> float:
    """Every device gets all parts, together ``size_bytes``: ring ``(n-1)α + (n-1)/n·S/β``; reduce-scatter too."""
    return _ring_s(size_bytes, num_devices, link)


def all_to_all_s(size_bytes: float, num_devices: int, link: Link) -> float:
    """Every device sends each other one its part; ``size_bytes`` is the whole value, of which each holds 1/n."""
    return _ring_s(size_bytes / max(num_devices, 1), num_devices, link)


def broadcast_s(size_bytes: float, num_devices: int, link: Link) -> float:
    """One device's value to all: tree ``⌈log n⌉(α + S/β)``, or scatter and all-gather ``2(n-1)α + 2(n-1)/n·S/β``."""
    return min(_rounds(num_devices) * link.time_s(size_bytes), 2 * _ring_s(size_bytes, num_devices, link))


def collective_s(kind: str, message_bytes: float, num_devices: int, link: Link) -> float:
    """Time of a collective whose messages, sent from each device to each other, would have so many bytes together.

    Args:
        kind: see :class:`graphpart.ir.program.Collective`.
        message_bytes: bytes of all of them.
        num_devices: how many devices take part.
        link: the slowest link between them.
    """
    others = max(num_devices - 1, 1)
    if kind == "all-reduce":
        return all_reduce_s(message_bytes / (num_devices * others), num_devices, link)
    if kind in ("all-gather", "reduce-scatter"):
        return all_gather_s(message_bytes / others, num_devices, link)
    if kind == "all-to-all":
        return all_to_all_s(message_bytes * num_devices / others, num_devices, link)
    if kind in ("broadcast", "reduce"):
        return broadcast_s(message_bytes / others, num_devices, link)
    return others * link.time_s(message_bytes / others)  # scatter, gather: one after another through the root's link


def _ring_s(size_bytes: float, num_devices: int, link: Link) -> float:
    steps = num_devices - 1
    return steps * link.time_s(size_bytes / max(num_devices, 1))


def _rounds(num_devices: int) -> int:
    return ceil(log2(num_devices)) if num_devices > 1 else 0
