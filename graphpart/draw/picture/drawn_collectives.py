"""The collectives of a program, as they appear between the boxes of a picture, or within one."""

from __future__ import annotations

from dataclasses import dataclass

from graphpart.draw.picture.fold import Folded
from graphpart.draw.picture.returned import returned_tags
from graphpart.draw.words.groups import DeviceGroups
from graphpart.ir.graph import Graph
from graphpart.ir.program import Bridge, Collective, Program


@dataclass(frozen=True, slots=True)
class DrawnCollective:
    """Collectives of one kind, on the same devices, that carry what one box makes to the same boxes.

    Attributes:
        box: index of the box that makes, or keeps, the values.
        kind: ``all-reduce``, ``all-gather``, …
        devices: indices of the devices that take part.
        readers: indices of the boxes that read the values, without ``box`` itself; none if it all is within the box.
        values: their names.
        size_bytes: bytes of the messages in one step.
        parts: collectives a value, one a microbatch; 1 where values differ in that.
        parameter: whether the values are weights.
        outputs: the values again, where they are exchanged to be returned by the model and not to be read.
    """

    box: int
    kind: str
    devices: tuple[int, ...]
    readers: tuple[int, ...]
    values: tuple[str, ...]
    size_bytes: int
    parts: int
    parameter: bool
    outputs: tuple[str, ...] = ()


def single_bridges(program: Program) -> tuple[Bridge, ...]:
    """The forward messages that belong to no collective."""
    together = {tag for collective in program.collectives for tag in collective.tags}
    return tuple(bridge for bridge in program.bridges if bridge.tag not in together)


def exchanges(
    graph: Graph, folded: Folded, program: Program | None, groups: DeviceGroups | None = None
) -> tuple[DrawnCollective, ...]:
    """A program's forward collectives, gathered by (box, kind, devices, readers).

    Args:
        graph: the traced model.
        folded: the boxes.
        program: the lowered program; without one there are none.
        groups: groups of the program's devices.
    """
    gathered: dict[tuple[int, str, tuple[int, ...], tuple[int, ...], bool, bool], list[Collective]] = {}
    lowered = program.graph if program else graph
    returned = returned_tags(program) if program else frozenset[int]()
    for collective in program.collectives if program else ():
        box = value_box(lowered, folded, collective.value)
        is_returned = returned.issuperset(collective.tags)
        readers = (
            set()
            if is_returned
            else {folded.box_of[name] for name in reading_operators(lowered, collective.value)} - {box}
        )
        devices = collective.devices if groups is None else tuple(sorted({groups.of[d] for d in collective.devices}))
        key = (box, collective.kind, devices, tuple(sorted(readers)), collective.value in graph.source, is_returned)
        gathered.setdefault(key, []).append(collective)
    found = []
    for (box, kind, devices, boxes, parameter, is_returned), members in gathered.items():
        values = tuple(dict.fromkeys(c.value for c in members))
        counts = {sum(c.value == value for c in members) for value in values}
        size_bytes = sum(c.size_bytes for c in members)
        parts = counts.pop() if len(counts) == 1 else 1
        outputs = values if is_returned else ()
        found.append(DrawnCollective(box, kind, devices, boxes, values, size_bytes, parts, parameter, outputs))
    return tuple(found)


def value_box(graph: Graph, folded: Folded, value: str) -> int:
    """The box that makes, or keeps, a value of a graph, which may be a lowered one."""
    origin = graph.origin(value)
    return folded.parameter_boxes[value] if origin is None else folded.box_of[origin]


def reading_operators(graph: Graph, value: str) -> tuple[str, ...]:
    """The traced operators that read a value of a graph, which may be a lowered one."""
    return tuple(dict.fromkeys(op.origin for op in graph.consumers[value]))
