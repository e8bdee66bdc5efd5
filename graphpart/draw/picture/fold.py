"""Fold a graph to a few boxes, one or more a module, that a person can take in at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graphpart.draw.picture.coarsen import coarsen
from graphpart.draw.picture.quotient import Group
from graphpart.draw.words.share import operator_devices, parameter_homes, short_target
from graphpart.errors import DrawError
from graphpart.ir.graph import Graph, Operator, refs
from graphpart.ir.placement import Placement

MAX_BOXES = 60
MAX_DEPTH = 14


@dataclass(frozen=True, slots=True)
class Box:
    """Operators drawn as one box.

    Attributes:
        label: what a person calls it, short, as its modules are drawn around it.
        path: module path, a part each; the last part is the box's own.
        devices: indices of the devices that its operators run on.
        operators: their names, in topological order.
        flops: floating-point operations of one forward and backward pass.
        parameter_bytes: bytes of the parameters that have their home with this box.
        repeats: number of alike blocks folded into it.
    """

    label: str
    path: tuple[str, ...]
    devices: tuple[int, ...]
    operators: tuple[str, ...]
    flops: float
    parameter_bytes: int
    repeats: int = 1

    @property
    def num_operators(self) -> int:
        """Number of operators."""
        return len(self.operators)


@dataclass(frozen=True, slots=True)
class Edge:
    """What passes from one box to another.

    Attributes:
        source: index of the box that makes, or keeps, the values.
        destination: index of the box that reads them.
        values: their names, each once.
        size_bytes: their bytes, each value once.
        crosses: whether some of them change device.
        kind: ``data``; ``constant`` for masks and such, made from nothing; or ``parameter`` for a weight read by
            boxes on several devices.
    """

    source: int
    destination: int
    values: tuple[str, ...]
    size_bytes: int
    crosses: bool = False
    kind: str = "data"


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of the model.

    Attributes:
        label: the input's path in the call, or the output's value name.
        value: name of the value.
        size_bytes: bytes of the value.
        boxes: indices of the boxes that read it, or of the one that makes it; none for an input handed back.
    """

    label: str
    value: str
    size_bytes: int
    boxes: tuple[int, ...]


@dataclass(frozen=True)
class Folded:
    """A graph folded to boxes.

    Attributes:
        boxes: in topological order of their first operators.
        edges: between different boxes.
        inputs: the model's inputs.
        outputs: the model's outputs that are tensors.
        parameter_boxes: per parameter, buffer or constant that is read, the index of the box it is at home with.
    """

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameter_boxes: Mapping[str, int]

    @cached_property
    def box_of(self) -> dict[str, int]:
        """Per operator name, the index of its box."""
        return {name: i for i, box in enumerate(self.boxes) for name in box.operators}


def fold(graph: Graph, placement: Placement, *, max_boxes: int = MAX_BOXES, max_depth: int = MAX_DEPTH) -> Folded:
    """Fold a graph to boxes: modules, cut where they span devices.

    Args:
        graph: the traced model.
        placement: where its operators run.
        max_boxes: most boxes there may be.
        max_depth: longest chain of boxes that is aimed at, so that the picture fits a screen.

    Raises:
        DrawError: if ``max_boxes`` is not positive.
    """
    if max_boxes < 1:
        raise DrawError(f"max_boxes is {max_boxes}; a picture needs at least one box")
    groups = coarsen(graph, placement, max_boxes, max_depth)
    where = {name: i for i, group in enumerate(groups) for name in group.members}
    homes = _parameter_boxes(graph, placement, where)
    parameters: Counter[int] = Counter()
    for name, box in homes.items():
        if graph.source[name].kind == "parameter":
            parameters[box] += graph.values[name].size_bytes
    boxes = tuple(_box(graph, group, parameters[i], _label(graph, group, groups)) for i, group in enumerate(groups))
    edges = (*_data_edges(graph, placement, where), *_parameter_edges(graph, placement, where, homes))
    return Folded(boxes, edges, _inputs(graph, where), _outputs(graph, where), homes)


def _label(graph: Graph, group: Group, groups: Sequence[Group]) -> str:
    operators = [graph.operator[name] for name in group.members]
    if group.span is not None:
        return group.path[-1]
    depth = len(group.path)
    inner = any(len(g.path) > depth and g.path[:depth] == group.path for g in groups)
    name = group.path[-1] if group.path else ""
    if inner or not name:
        return _summary(operators)
    if name.isdigit():
        name = f"{name}: {_summary(operators)}"
    pieces = [g.first for g in groups if g.path == group.path]
    if len(pieces) > 1:
        return f"{name} (part {1 + pieces.index(group.first)} of {len(pieces)})"
    return f"{name} (×{group.repeats})" if group.repeats > 1 else name


def _box(graph: Graph, group: Group, parameter_bytes: int, label: str) -> Box:
    operators = [graph.operator[name] for name in group.members]
    flops = sum(op.flops_forward + op.flops_backward for op in operators)
    return Box(label, group.path, group.devices, group.members, flops, parameter_bytes, group.repeats)


def _summary(operators: list[Operator]) -> str:
    """The two kinds of operator that cost most, or are most frequent."""
    weight: Counter[str] = Counter()
    for op in operators:
        weight[short_target(op.target)] += int(op.flops_forward + op.flops_backward) + 1
    names = [name for name, _ in weight.most_common()]
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")


def _parameter_boxes(graph: Graph, placement: Placement, where: dict[str, int]) -> dict[str, int]:
    """Per parameter or buffer, the box of its first consumer on a home device, or else of its first consumer."""
    devices = operator_devices(graph, placement)
    found = {}
    for name, shards in parameter_homes(graph, placement).items():
        users = graph.consumers[name]
        near = [op for op in users if any(s.device in devices[op.name] for s in shards)] or list(users)
        if near:
            found[name] = where[near[0].name]
    return found


def _data_edges(graph: Graph, placement: Placement, where: dict[str, int]) -> tuple[Edge, ...]:
    devices = operator_devices(graph, placement)
    values: dict[tuple[int, int], dict[str, bool]] = {}
    for op in graph.operators:
        for name in dict.fromkeys(op.operands):
            maker = graph.producer.get(name)
            if maker is None or where[maker.name] == where[op.name]:
                continue
            crosses = not set(devices[op.name]) <= set(devices[maker.name])
            between = values.setdefault((where[maker.name], where[op.name]), {})
            between[name] = between.get(name, False) or crosses
    return tuple(
        Edge(
            source,
            destination,
            tuple(names),
            sum(graph.values[n].size_bytes for n in names),
            any(names.values()),
            "constant" if all(graph.producer[n].name in graph.unsourced for n in names) else "data",
        )
        for (source, destination), names in values.items()
    )


def _parameter_edges(
    graph: Graph, placement: Placement, where: dict[str, int], homes: dict[str, int]
) -> tuple[Edge, ...]:
    devices = operator_devices(graph, placement)
    shards = parameter_homes(graph, placement)
    shared: dict[tuple[int, int], list[str]] = {}
    for name, box in homes.items():
        for op in graph.consumers[name]:
            is_near = any(shard.device in devices[op.name] for shard in shards[name])
            if not is_near and where[op.name] != box:
                names = shared.setdefault((box, where[op.name]), [])
                if name not in names:
                    names.append(name)
    return tuple(
        Edge(a, b, tuple(names), sum(graph.values[n].size_bytes for n in names), True, "parameter")
        for (a, b), names in shared.items()
    )


def _inputs(graph: Graph, where: dict[str, int]) -> tuple[Port, ...]:
    return tuple(
        Port(
            s.names[0] if s.names else s.value.name,
            s.value.name,
            s.value.size_bytes,
            tuple(dict.fromkeys(where[op.name] for op in graph.consumers[s.value.name])),
        )
        for s in graph.inputs
    )


def _outputs(graph: Graph, where: dict[str, int]) -> tuple[Port, ...]:
    found = []
    for name in dict.fromkeys(ref.name for ref in refs(graph.outputs)):
        maker = graph.producer.get(name)
        boxes = (where[maker.name],) if maker else ()
        found.append(Port(name, name, graph.values[name].size_bytes, boxes))
    return tuple(found)
