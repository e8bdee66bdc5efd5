"""The bridges of a program, as they appear between the boxes of a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from graphpart.draw.fold import Folded
from graphpart.draw.share import Crossing, crossings, operator_devices
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import Bridge, Program


@dataclass(frozen=True, slots=True)
class Span:
    """All values that one box sends from one device to another.

    Attributes:
        box: index of the box that makes, or keeps, the values.
        source: index of the sending device.
        destination: index of the receiving device.
        readers: indices of the boxes that read them there, without ``box`` itself.
        values: names of the values.
        size_bytes: bytes in one step.
        parts: messages a value, one a microbatch; 1 where values differ in that.
        parameter: whether they are weights, not activations.
    """

    box: int
    source: int
    destination: int
    readers: tuple[int, ...]
    values: tuple[str, ...]
    size_bytes: int
    parts: int
    parameter: bool


def program_crossings(
    graph: Graph, program: Program, bridges: tuple[Bridge, ...] | None = None
) -> tuple[Crossing, ...]:
    """The program's forward messages, or other ``bridges`` of it, summed by (value, source, destination)."""
    size: Counter[tuple[str, int, int]] = Counter()
    parts: Counter[tuple[str, int, int]] = Counter()
    for bridge in program.bridges if bridges is None else bridges:
        key = (program.wire[bridge.wire].value, bridge.source, bridge.destination)
        size[key] += bridge.size_bytes
        parts[key] += 1
    return tuple(
        Crossing(*key, size[key], parts[key], key[0] in graph.source and graph.source[key[0]].kind != "input")
        for key in size
    )


def spans(graph: Graph, placement: Placement, folded: Folded, program: Program | None) -> tuple[Span, ...]:
    """Crossings gathered by (box, source device, destination device, activation or weight)."""
    found = program_crossings(graph, program) if program else crossings(graph, placement)
    devices = operator_devices(graph, placement)
    grouped: dict[tuple[int, int, int, bool], list[Crossing]] = {}
    for crossing in found:
        box = _box(graph, folded, crossing)
        if box is not None:
            key = (box, crossing.source, crossing.destination, crossing.parameter)
            grouped.setdefault(key, []).append(crossing)
    result = []
    for (box, source, destination, parameter), members in grouped.items():
        readers = {
            folded.box_of[op.name]
            for c in members
            for op in graph.consumers[c.value]
            if destination in devices[op.name]
        }
        parts = {c.parts for c in members}
        result.append(
            Span(
                box,
                source,
                destination,
                tuple(sorted(readers - {box})),
                tuple(c.value for c in members),
                sum(c.size_bytes for c in members),
                parts.pop() if len(parts) == 1 else 1,
                parameter,
            )
        )
    return tuple(result)


def _box(graph: Graph, folded: Folded, crossing: Crossing) -> int | None:
    maker = graph.producer.get(crossing.value)
    return folded.box_of[maker.name] if maker else folded.parameter_boxes.get(crossing.value)
