"""A program with its bridges, node by node: what each device computes, slices, sends, receives, joins and sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat

from graphpart.draw.picture.drawn_collectives import value_box
from graphpart.draw.picture.fold import Folded
from graphpart.ir.graph import Graph, Ref, refs
from graphpart.ir.program import Bridge, Collective, Program, Segment, Step

DetailKey = tuple[object, ...]
"""What tells one node from another."""


@dataclass(frozen=True)
class DetailNode:
    """One node of the picture.

    Attributes:
        key: what tells it from others.
        kind: ``tile``; ``slice``, ``split``, ``concat`` or ``sum``; ``send`` or ``recv``; ``home`` of weights that are
            sent; ``input``; ``output``; or the kind of a collective.
        device: index of its device; None for what is on no single one.
        box: for a tile or a home, the index of its box in the folded graph.
        names: what it computes or carries: results of a slice, values of a home, an input or an output.
        size_bytes: bytes that it carries, for what crosses.
        tags: numbers of the messages, for what crosses.
        devices: indices of the devices that take part in a collective.
    """

    key: DetailKey
    kind: str
    device: int | None = None
    box: int | None = None
    names: tuple[str, ...] = ()
    size_bytes: int = 0
    tags: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()


@dataclass
class Detail:
    """Nodes by key, in topological order of their first parts, and edges."""

    nodes: dict[DetailKey, DetailNode] = field(default_factory=dict)
    edges: dict[tuple[DetailKey, DetailKey], None] = field(default_factory=dict)


def detail(graph: Graph, program: Program, folded: Folded, *, inner: bool) -> Detail:
    """What one microbatch (the first) runs, with every bridge.

    Operators are drawn a box and device; what a box passes to itself on another device is left out.

    Args:
        graph: the traced model.
        program: the lowered program.
        folded: the boxes.
        inner: also draw bridges of weights that only the box reads that keeps them.
    """
    return _Builder(graph, program, folded, inner).run()


def without_messages(found: Detail) -> Detail:
    """The same with an edge in place of each send and receive: the model before bridges were put in."""
    leads_to: dict[DetailKey, list[DetailKey]] = {}
    for source, destination in found.edges:
        leads_to.setdefault(source, []).append(destination)

    def reached(key: DetailKey) -> Iterator[DetailKey]:
        if found.nodes[key].kind not in ("send", "recv"):
            yield key
            return
        for following in leads_to.get(key, ()):
            yield from reached(following)

    nodes = {key: node for key, node in found.nodes.items() if node.kind not in ("send", "recv")}
    edges = {(source, end): None for source in nodes for key in leads_to.get(source, ()) for end in reached(key)}
    return Detail(nodes, edges)


class _Builder:
    def __init__(self, graph: Graph, program: Program, folded: Folded, inner: bool) -> None:
        self.graph = graph
        self.program = program
        self.folded = folded
        self.found = Detail()
        self.maker: dict[str, DetailKey] = {}  # per local name, the node that makes it
        self.bridge = {(b.wire, b.destination): b for b in program.bridges}
        self.collective: dict[int, Collective] = {t: c for c in program.collectives for t in c.tags}
        self.exchanged = {c.value: c for c in program.collectives if not c.microbatch}
        self.inside = self._values_inside(inner)

    def run(self) -> Detail:
        for segment, step in self._steps():
            key = self._node_of(segment, step)
            for ref in refs((step.args, dict(step.kwargs))):
                self._read(ref.name, key, segment.device)
            self.maker.update((name, key) for name in step.results if name)
        for ref, wire in zip(self.graph.outputs, self.program.outputs, strict=True):
            if isinstance(ref, Ref) and wire in self.maker:
                self._join(self.maker[wire], self._add(DetailNode(("output", ref.name), "output", names=(ref.name,))))
        return self.found

    def _steps(self) -> Iterator[tuple[Segment, Step]]:
        for segment in self.program.segments:
            if not segment.microbatch:
                yield from ((segment, step) for step in segment.steps)

    def _box(self, step: Step) -> int:
        return self.folded.box_of[self.program.graph.operator[step.operator].origin]

    def _values_inside(self, inner: bool) -> set[str]:
        """Values that no box but the one that makes them reads."""
        readers: dict[str, set[int]] = {}
        for _, step in self._steps():
            if not step.is_bridge:
                for ref in refs((step.args, dict(step.kwargs))):
                    readers.setdefault(self._value(ref.name), set()).add(self._box(step))
        return {
            value
            for value, boxes in readers.items()
            if not (value in self.graph.source and (inner or self.graph.source[value].kind == "input"))
            and boxes == {value_box(self.program.graph, self.folded, value)}
        }

    def _value(self, name: str) -> str:
        """The value that a local is a part of."""
        if name in self.program.wire:
            return self.program.wire[name].value
        return self._local_values[name]

    @cached_property
    def _local_values(self) -> Mapping[str, str]:
        operator, found = self.program.graph.operator, dict[str, str]()
        for _, step in self._steps():
            values = repeat(step.operator) if step.is_bridge else (v.name for v in operator[step.operator].results)
            found.update(zip(step.results, values, strict=False))
        return found

    def _node_of(self, segment: Segment, step: Step) -> DetailKey:
        """The node that a step belongs to; parts of a bridge may belong to a collective or be hidden in a box."""
        if not step.is_bridge:
            key: DetailKey = ("tile", self._box(step), segment.device)
            return self._add(DetailNode(key, "tile", segment.device, self._box(step)))
        if step.operator in self.inside:
            return ("tile", value_box(self.program.graph, self.folded, step.operator), segment.device)
        if step.operator in self.exchanged:
            return self._together(self.exchanged[step.operator])
        kind = step.target.removeprefix("graphpart.")
        names = tuple(name for name in step.results if name)
        return self._add(DetailNode((kind, names, segment.device), kind, segment.device, names=names))

    def _read(self, name: str, reader: DetailKey, device: int) -> None:
        wire = self.program.wire.get(name)
        if wire is not None and wire.origin == "input":
            self._join(self._add(DetailNode(("input", wire.value), "input", names=(wire.value,))), reader)
            return
        bridge = self.bridge.get((name, device)) if wire is not None and wire.device != device else None
        if name not in self.maker and (bridge is None or wire is None or wire.segment):
            return  # a weight at hand, or a part of another microbatch
        if bridge is not None and self._value(name) in self.inside:
            return
        source = self.maker.get(name) or self._home(name)
        if bridge is None:
            self._join(source, reader)
        elif bridge.tag in self.collective:
            key = self._together(self.collective[bridge.tag])
            self._join(source, key)
            self._join(key, reader)
        else:
            self._message(source, bridge, reader)

    def _home(self, name: str) -> DetailKey:
        """The weights of one box that one device keeps and sends."""
        wire = self.program.wire[name]
        box = self.folded.parameter_boxes[wire.value]
        key: DetailKey = ("home", box, wire.device)
        had = self.found.nodes.get(key)
        names = had.names if had else ()
        if wire.value not in names:
            self.found.nodes[key] = DetailNode(key, "home", wire.device, box, (*names, wire.value))
        return key

    def _message(self, source: DetailKey, bridge: Bridge, reader: DetailKey) -> None:
        """A send and a receive; messages between the same two nodes are drawn as one pair."""
        ends = (source, bridge.destination)
        send: DetailKey = ("send", *ends)
        recv: DetailKey = ("recv", *ends)
        had = self.found.nodes.get(send)
        tags = had.tags if had else ()
        if bridge.tag not in tags:
            size_bytes = bridge.size_bytes + (had.size_bytes if had else 0)
            node = DetailNode(send, "send", bridge.source, size_bytes=size_bytes, tags=(*tags, bridge.tag))
            self.found.nodes[send] = node
            self.found.nodes[recv] = replace(node, key=recv, kind="recv", device=bridge.destination)
        self._join(source, send)
        self._join(send, recv)
        self._join(recv, reader)

    def _together(self, collective: Collective) -> DetailKey:
        key: DetailKey = (collective.kind, collective.value)
        had = self.found.nodes.get(key)
        if had is None or not set(collective.tags) <= set(had.tags):
            tags = (*(had.tags if had else ()), *collective.tags)
            size_bytes = collective.size_bytes + (had.size_bytes if had else 0)
            names = (collective.value,)
            self.found.nodes[key] = DetailNode(
                key, collective.kind, names=names, size_bytes=size_bytes, tags=tags, devices=collective.devices
            )
        return key

    def _add(self, node: DetailNode) -> DetailKey:
        self.found.nodes.setdefault(node.key, node)
        return node.key

    def _join(self, source: DetailKey, destination: DetailKey) -> None:
        if source != destination:
            self.found.edges[source, destination] = None
