"""How devices of presets and of this host are joined: switches in nodes, a network between nodes, links of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphpart.cost.devices.datasheets import (
    CPU_LINK_LATENCY_S,
    CPU_MEMORY_BANDWIDTH_BYTES_PER_S,
    INFINIBAND_NDR,
    DataSheet,
)
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.topology import Switch

NETWORK = "InfiniBand"

_IN_HOST = Link(CPU_LINK_LATENCY_S, CPU_MEMORY_BANDWIDTH_BYTES_PER_S)
"""Between workers of one host values pass by reference: the reader's own traffic to memory is what remains."""


def connect(devices: Sequence[Device], sheets: Sequence[DataSheet | None], nodes: Sequence[int], name: str) -> Cluster:
    """Join all devices.

    Args:
        devices: in rank order.
        sheets: their data sheets; None for a worker on a host's CPU.
        nodes: the node of each.
        name: of the cluster.
    """
    links = _host_links(sheets, nodes)
    switches = _switches(devices, sheets, nodes)
    # The most common link of their own is the default; where there is none, what everybody reaches everybody by.
    counts = Counter(links.values())
    top = Link(switches[-1].latency_s, switches[-1].bandwidth_bytes_per_s) if switches else _IN_HOST
    default = counts.most_common(1)[0][0] if counts else top
    own = {pair: link for pair, link in links.items() if link != default}
    return Cluster(tuple(devices), default, dict(sorted(own.items())), name, switches=tuple(switches))


def _host_links(sheets: Sequence[DataSheet | None], nodes: Sequence[int]) -> dict[tuple[int, int], Link]:
    """Links of CPU workers, to one another and to all other devices."""
    found = {}
    for worker in (i for i, sheet in enumerate(sheets) if sheet is None):
        for other, sheet in enumerate(sheets):
            if other != worker:
                link = _IN_HOST if sheet is None else sheet.host
                link = link if nodes[worker] == nodes[other] else INFINIBAND_NDR
                found[worker, other] = found[other, worker] = link
    return found


def _switches(devices: Sequence[Device], sheets: Sequence[DataSheet | None], nodes: Sequence[int]) -> list[Switch]:
    """What joins the cards: workers of one card, cards of one kind, kinds of one node, nodes."""
    found: list[Switch] = []
    tops: dict[int, list[int | str]] = {}  # by number of cards: nodes, or devices that are alone in one
    for node in dict.fromkeys(nodes):
        here = [i for i, sheet in enumerate(sheets) if sheet is not None and nodes[i] == node]
        if here:
            own, top, num_cards = _node(devices, sheets, here, f"node {node}")
            found += own
            tops.setdefault(num_cards, []).append(top)
    if sum(map(len, tops.values())) < 2:
        return found
    latency_s, bandwidth = INFINIBAND_NDR.latency_s, INFINIBAND_NDR.bandwidth_bytes_per_s
    if len(tops) == 1:
        ((num_cards, members),) = tops.items()
        return [*found, Switch(NETWORK, tuple(members), latency_s, bandwidth, num_cards)]
    leaves = {num_cards: f"{NETWORK} of nodes of {num_cards}" for num_cards in tops}
    found += [Switch(leaves[n], tuple(members), latency_s, bandwidth, n) for n, members in tops.items()]
    ports = max(n * len(members) for n, members in tops.items())  # enough for all at once
    return [*found, Switch(NETWORK, tuple(leaves.values()), latency_s, bandwidth, ports)]


def _node(
    devices: Sequence[Device], sheets: Sequence[DataSheet | None], here: Sequence[int], name: str
) -> tuple[list[Switch], int | str, int]:
    """The switches of a node, what of it hangs on the network, and how many cards it has."""
    found: list[Switch] = []
    cards: dict[str, list[int]] = {}
    for i in here:
        cards.setdefault(devices[i].place, []).append(i)
    kinds: dict[str, tuple[DataSheet, list[int | str]]] = {}
    for place, workers in cards.items():
        sheet = sheets[workers[0]]
        assert sheet is not None  # cards alone have one
        card: int | str = workers[0]
        if len(workers) > 1:
            card = f"card {place}"
            rate = sheet.memory_bandwidth_bytes_per_s
            found.append(Switch(card, tuple(workers), CPU_LINK_LATENCY_S, rate))
        kinds.setdefault(sheet.kind, (sheet, []))[1].append(card)
    if len(kinds) == 1:
        ((sheet, members),) = kinds.values()
        if len(members) > 1:
            found.append(_of_kind(name, sheet, members))
        return found, found[-1].name if found else members[0], len(cards)
    hosts = []
    for kind, (sheet, members) in kinds.items():
        if len(members) > 1:
            found.append(_of_kind(f"{name}, {kind}", sheet, members))
            members = [found[-1].name]
        # Each card has its own way to the host, as fast as its kind's.
        hosts.append(f"{name}, {kind}, host")
        ports = len(kinds[kind][1])
        found.append(Switch(hosts[-1], tuple(members), sheet.host.latency_s, sheet.host.bandwidth_bytes_per_s, ports))
    links = [sheet.host for sheet, _ in kinds.values()]
    latency_s, bandwidth = max(k.latency_s for k in links), max(k.bandwidth_bytes_per_s for k in links)
    found.append(Switch(name, tuple(hosts), latency_s, bandwidth, max(len(cards) for _, cards in kinds.values())))
    return found, name, len(cards)


def _of_kind(name: str, sheet: DataSheet, members: Sequence[int | str]) -> Switch:
    link = sheet.peer or sheet.host
    return Switch(
        name, tuple(members), link.latency_s, link.bandwidth_bytes_per_s, sheet.peer_ports if sheet.peer else 1
    )
