"""The bridges of a program, as they appear between the boxes of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graphpart.draw.picture.drawn_collectives import reading_operators, single_bridges, value_box
from graphpart.draw.picture.fold import Folded
from graphpart.draw.picture.returned import returned_tags
from graphpart.draw.words.groups import DeviceGroups
from graphpart.draw.words.share import Crossing, crossings, operator_devices, program_crossings
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import Program

MOST_APART = 2
"""The same values sent to more devices than this are drawn as one message with many readers."""


@dataclass(frozen=True, slots=True)
class Span:
    """All values that one box sends from one device to others.

    Attributes:
        box: index of the box that makes, or keeps, the values.
        source: index of the sending device.
        destinations: indices of the receiving devices; several where they all get the same values.
        readers: indices of the boxes that read them there, without ``box`` itself.
        values: names of the values.
        size_bytes: bytes in one step.
        parts: messages a value and device, one a microbatch; 1 where values differ in that.
        parameter: whether they are weights, not activations.
        outputs: the values again, where they are sent to be returned by the model and not to be read there.
    """

    box: int
    source: int
    destinations: tuple[int, ...]
    readers: tuple[int, ...]
    values: tuple[str, ...]
    size_bytes: int
    parts: int
    parameter: bool
    outputs: tuple[str, ...] = ()


def spans(
    graph: Graph, placement: Placement, folded: Folded, program: Program | None, groups: DeviceGroups | None = None
) -> tuple[Span, ...]:
    """Crossings gathered by (box, source device, destination device, activation or weight), without collectives.

    What goes from one box to more than :data:`MOST_APART` devices alike is one span.

    Args:
        graph: the traced model.
        placement: where its operators run, in groups if there are any.
        folded: the boxes.
        program: the lowered program; its messages count instead of an estimate from the placement.
        groups: groups of the program's devices.
    """
    devices = operator_devices(graph, placement)
    if program is None:
        return _multicasts(_gathered(graph, devices, folded, crossings(graph, placement)))
    result = []
    returned, single = returned_tags(program), single_bridges(program)
    for is_returned in (False, True):
        bridges = tuple(bridge for bridge in single if (bridge.tag in returned) == is_returned)
        found = program_crossings(graph, program, bridges)
        gathered = _gathered(program.graph, devices, folded, groups.crossings(found) if groups else found)
        result += [replace(span, readers=(), outputs=span.values) for span in gathered] if is_returned else gathered
    return _multicasts(result)


def _gathered(
    graph: Graph, devices: Mapping[str, tuple[int, ...]], folded: Folded, found: Sequence[Crossing]
) -> list[Span]:
    """Crossings as spans; who reads them is what the graph, which may be a lowered one, says."""
    grouped: dict[tuple[int, int, int, bool], list[Crossing]] = {}
    for crossing in found:
        box = value_box(graph, folded, crossing.value)
        key = (box, crossing.source, crossing.destination, crossing.parameter)
        grouped.setdefault(key, []).append(crossing)
    result = []
    for (box, source, destination, parameter), members in grouped.items():
        readers = {
            folded.box_of[name]
            for c in members
            for name in reading_operators(graph, c.value)
            if destination in devices[name] and destination != source
        }
        parts = {c.parts for c in members}
        result.append(
            Span(
                box,
                source,
                (destination,),
                tuple(sorted(readers - {box})),
                tuple(c.value for c in members),
                sum(c.size_bytes for c in members),
                parts.pop() if len(parts) == 1 else 1,
                parameter,
            )
        )
    return result


def _multicasts(found: Sequence[Span]) -> tuple[Span, ...]:
    """Spans in which those that carry the same values from one box to many devices are one."""
    alike: dict[tuple[object, ...], list[Span]] = {}
    for span in found:
        own = () if span.readers else (span.destinations, span.outputs)
        alike.setdefault((span.box, span.source, frozenset(span.values), span.parameter, own), []).append(span)
    return tuple(span for same in alike.values() for span in ([_joined(same)] if len(same) > MOST_APART else same))


def _joined(same: Sequence[Span]) -> Span:
    parts = {span.parts for span in same}
    return replace(
        same[0],
        destinations=tuple(d for span in same for d in span.destinations),
        readers=tuple(sorted({reader for span in same for reader in span.readers})),
        size_bytes=sum(span.size_bytes for span in same),
        parts=parts.pop() if len(parts) == 1 else 1,
    )
