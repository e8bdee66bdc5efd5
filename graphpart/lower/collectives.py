"""Groups of messages with the shape of a collective operation become that one collective.

Found by the bridge rule while it meets the needs of one value: who sends what to whom, and whether it is summed where
it arrives. Sums run in fixed order (by term), so results do not depend on a library's reduction order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

from graphpart.ir.program import Bridge, Collective

MIRRORED = {
    "all-reduce": "all-reduce",
    "all-gather": "reduce-scatter",
    "reduce-scatter": "all-gather",
    "all-to-all": "all-to-all",
    "broadcast": "reduce",
    "reduce": "broadcast",
    "scatter": "gather",
    "gather": "scatter",
}
"""What a collective's gradients take: the adjoint of each."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message of a value, before bridges have numbers.

    Attributes:
        wire: name of the part that is sent.
        source: index of the sending device.
        destination: index of the receiving device.
        is_summed: whether the receiver adds it to others.
        is_whole: whether it is all that the sender has of the value, not a slice.
    """

    wire: str
    source: int
    destination: int
    is_summed: bool
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Transfers:
    """The messages that meet the needs of one value in one microbatch."""

    value: str
    microbatch: int | None
    transfers: tuple[Transfer, ...]


def apart(transfers: Sequence[Transfer]) -> list[tuple[Transfer, ...]]:
    """The messages of each set of devices that send one another any: replicas of a group each have their own."""
    if len(transfers) == 1:
        return [tuple(transfers)]
    links = nx.Graph((t.source, t.destination) for t in transfers)
    number = {device: i for i, devices in enumerate(nx.connected_components(links)) for device in devices}
    found: dict[int, list[Transfer]] = {}
    for transfer in transfers:
        found.setdefault(number[transfer.source], []).append(transfer)
    return [tuple(group) for group in found.values()]


def kind_of(transfers: Sequence[Transfer]) -> str:
    """The collective that messages have the shape of, or an empty string.

    With two devices a broadcast is one message, which is a send; of several devices that all send to all others each
    sends either the same to all or to each its own part.
    """
    sources = {t.source for t in transfers}
    destinations = {t.destination for t in transfers}
    devices = sources | destinations
    pairs = {(t.source, t.destination) for t in transfers}
    if len(transfers) < 2 or len({t.is_summed for t in transfers}) > 1:
        return ""
    is_summed = transfers[0].is_summed
    same_to_all = all(t.is_whole for t in transfers) or (
        len(devices) > 2 and all(len({t.wire for t in transfers if t.source == source}) == 1 for source in sources)
    )
    if len(devices) > 2 and len(sources) == 1 and len(pairs) == len(transfers):
        return "broadcast" if same_to_all else "scatter"
    if len(devices) > 2 and len(destinations) == 1:
        return "reduce" if is_summed else "gather"
    if len(pairs) < len(devices) * (len(devices) - 1) or (same_to_all and len(pairs) < len(transfers)):
        return ""
    if is_summed:
        return "all-reduce" if same_to_all else "reduce-scatter"
    return "all-gather" if same_to_all else "all-to-all"


def name_collectives(exchanges: Iterable[Transfers], bridges: Sequence[Bridge]) -> tuple[Collective, ...]:
    """The collectives among a program's messages."""
    tag_of = {(b.wire, b.destination): b for b in bridges}
    found = []
    for exchange in exchanges:
        kind = kind_of(exchange.transfers)
        # A part that turned out not to cross (its reader was pruned) leaves plain messages.
        own = [tag_of.get((t.wire, t.destination)) for t in exchange.transfers]
        if not kind or any(b is None for b in own):
            continue
        sent = [b for b in own if b is not None]
        devices = tuple(sorted({d for b in sent for d in (b.source, b.destination)}))
        size_bytes = sum(b.size_bytes for b in sent)
        tags = tuple(b.tag for b in sent)
        found.append(Collective(kind, exchange.value, exchange.microbatch, devices, tags, size_bytes))
    return tuple(found)


def mirror_collectives(
    collectives: Sequence[Collective], forward: Sequence[Bridge], backward: Sequence[Bridge]
) -> tuple[Collective, ...]:
    """The collectives of the gradients: the adjoints of those whose every message has its mirror.

    Of an all-reduce whose gradient one device alone has (the loss is there), a broadcast is left.
    """
    sent = {b.tag: b for b in forward}
    mirror = {(b.wire, b.source, b.destination): b for b in backward}
    found = []
    for collective in collectives:
        forth = [sent[tag] for tag in collective.tags]
        back = [b for f in forth if (b := mirror.get((f.wire, f.destination, f.source))) is not None]
        if not back:
            continue
        kind = MIRRORED[collective.kind]
        devices = tuple(sorted({d for b in back for d in (b.source, b.destination)}))
        if len(back) < len(forth):
            alone = len({b.source for b in back}) == 1
            if collective.kind not in ("all-reduce", "reduce") or not alone or devices != collective.devices:
                continue
            if len(devices) < 3:
                continue
            kind = "broadcast"
        size_bytes = sum(b.size_bytes for b in back)
        found.append(
            Collective(kind, collective.value, collective.microbatch, devices, tuple(b.tag for b in back), size_bytes)
        )
    return tuple(found)
