"""A plan as a DOT picture: devices as colours, modules as nested clusters, bridges as capsules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from graphpart.draw.picture import palette
from graphpart.draw.picture.boxes import box_line, inside_lines
from graphpart.draw.picture.capsules import WIDE, Capsule, bridge_edges, capsules
from graphpart.draw.picture.drawn_collectives import DrawnCollective, exchanges
from graphpart.draw.picture.fold import MAX_BOXES, Box, Edge, Folded, Port, fold
from graphpart.draw.picture.legend import heading
from graphpart.draw.picture.markup import Markup, attributes, lines_label, preamble
from graphpart.draw.picture.program_dot import detailed, program_dot
from graphpart.draw.picture.tiles import is_cut
from graphpart.draw.picture.wiring import Span, spans
from graphpart.draw.words.groups import group_devices
from graphpart.draw.words.text import escape_html
from graphpart.errors import DrawError
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.graph import Graph, Value
from graphpart.ir.placement import Placement
from graphpart.ir.program import Program
from graphpart.ir.quantities import format_bytes

MOST_DEVICES = 8
"""On more devices than this bridges are drawn only where asked for."""

MOST_PORTS = 4
"""More inputs (or outputs) than this that go to the same boxes are drawn as one."""


def plan_dot(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program | None = None,
    *,
    max_boxes: int = MAX_BOXES,
    bridges: bool | None = None,
    title: str = "",
    degrees: Degrees | None = None,
) -> str:
    """DOT source of a picture of a plan.

    Operators are boxes, folded by module, with a cell for each tile; or, with ``bridges``, a node for each tile in a
    cluster for each device, with every slice, concat, sum, send and receive between them.

    Args:
        graph: the traced model.
        placement: where its operators run.
        cluster: the devices, for names and colours.
        program: the lowered program; its messages are shown instead of an estimate from the placement.
        max_boxes: most boxes the graph is folded to.
        bridges: whether to draw the program with its bridges; by default where operators are cut and no more than
            ``max_boxes`` boxes show every message.
        title: heading; the model's name if empty.
        degrees: what the placement was made to; colours are of its stages then.

    Raises:
        DrawError: if ``max_boxes`` is not positive, or too few for a picture with bridges; or if bridges are asked
            for without a program.
    """
    if bridges is None:
        bridges = program is not None and _is_small(graph, placement, program, max_boxes)
    if bridges:
        if program is None:
            raise DrawError("a picture with bridges needs the lowered program")
        return program_dot(graph, placement, cluster, program, max_boxes=max_boxes, title=title)
    num_devices = len(placement.devices)
    groups = group_devices(placement, cluster, degrees)
    if groups is not None:
        placement, cluster = groups.placement(placement), groups.cluster
    folded = fold(graph, placement, max_boxes=max_boxes)
    found = spans(graph, placement, folded, program, groups)
    exchanged = exchanges(graph, folded, program, groups)
    bridging = [span for span in found if span.readers or span.outputs]
    together = [exchange for exchange in exchanged if exchange.readers or exchange.outputs]
    inside = inside_lines(found, exchanged)
    port_of = {p.value: f"out{i}" for i, group in enumerate(_bundles(folded.outputs)) for p in group}
    returned = {port_of[value] for crossing in (bridging, together) for c in crossing for value in c.outputs}

    def line(index: int, label: str) -> str:
        return box_line(graph, placement, index, folded.boxes[index], label, inside.get(index, ()))

    lines = [
        *preamble("plan", heading(graph, placement, cluster, title, num_devices)),
        *_modules(folded, line, capsules(cluster, bridging, together)),
        *_ports(graph, folded, returned),
        *_edges(folded, found, together),
        *bridge_edges(bridging, together, port_of),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _is_small(graph: Graph, placement: Placement, program: Program, max_boxes: int) -> bool:
    """Whether operators are cut, and few enough boxes show every message of the program."""
    if not is_cut(placement, graph.operator) or len(placement.devices) > MOST_DEVICES:
        return False
    found = detailed(graph, placement, program, max_boxes, fewest=max_boxes)
    if found is None:
        return False
    shown = {tag for node in found[1].nodes.values() for tag in node.tags}
    return all(bridge.tag in shown for bridge in program.bridges if not program.wire[bridge.wire].microbatch)


def _modules(folded: Folded, line: Callable[[int, str], str], capsules: Sequence[Capsule]) -> list[str]:
    """Box and cluster lines, nested as the modules are; a module with one box gets no cluster.

    A capsule goes into the innermost cluster that holds all the boxes it joins.
    """
    counter = iter(range(len(folded.boxes) + 1))

    def labelled(i: int, depth: int) -> str:
        box = folded.boxes[i]
        return line(i, ".".join((*box.path[depth:-1], box.label)))

    def emit(members: Sequence[int], depth: int, level: int, capsules: Sequence[Capsule]) -> list[str]:
        lines: list[str] = []
        parts: dict[str, list[int]] = {}
        for i in members:
            parts.setdefault(_part(folded.boxes[i], depth), []).append(i)
        for part, below in parts.items():
            if not part or len(below) == 1:
                lines += [labelled(i, depth) for i in below]
                continue
            within = [c for c in capsules if c[0] <= set(below)]
            capsules = [c for c in capsules if c not in within]
            deeper = depth + 1
            while len({_part(folded.boxes[i], deeper) for i in below}) == 1 and _part(folded.boxes[below[0]], deeper):
                deeper += 1
            name = ".".join(folded.boxes[below[0]].path[depth:deeper])
            lines += [f"subgraph cluster_{next(counter)} {{", f"graph [{_cluster_style(name, level)}]"]
            lines += [*emit(below, deeper, level + 1, within), "}"]
        return lines + [line for _, line in capsules]

    return emit(range(len(folded.boxes)), 0, 0, capsules)


def _part(box: Box, depth: int) -> str:
    return box.path[depth] if len(box.path) > depth else ""


def _cluster_style(name: str, level: int) -> str:
    return attributes(
        {
            "label": Markup(f'<FONT COLOR="{palette.NEUTRAL}">{escape_html(name)}</FONT>'),
            "style": "filled,rounded",
            "fillcolor": palette.MODULE_FILLS[min(level, len(palette.MODULE_FILLS) - 1)],
            "color": palette.MODULE_BORDER,
            "labeljust": "l",
            "labelloc": "t",
            "margin": "10",
            "tooltip": name,
        }
    )


def _ports(graph: Graph, folded: Folded, returned: Collection[str]) -> list[str]:
    """Inputs and outputs with their edges; outputs in ``returned`` are reached over a bridge."""
    lines = []
    for kind, ports in (("in", folded.inputs), ("out", folded.outputs)):
        for number, group in enumerate(_bundles(ports)):
            node = f"{kind}{number}"
            lines.append(f"{node} [{_port_style(graph, group, kind, folded.outputs)}]")
            style = attributes({"color": palette.FAINT, "constraint": "false"} if len(group[0].boxes) > WIDE else {})
            for place, box in enumerate(() if node in returned else group[0].boxes):
                suffix = f" [{style}]" if style and place else ""
                lines.append(f"{node} -> b{box}{suffix}" if kind == "in" else f"b{box} -> {node}")
    inputs = {p.value: f"in{i}" for i, group in enumerate(_bundles(folded.inputs)) for p in group}
    for number, group in enumerate(_bundles(folded.outputs)):
        lines += [f"{inputs[p.value]} -> out{number}" for p in group if p.value in inputs]
    return lines


def _bundles(ports: Sequence[Port]) -> list[list[Port]]:
    together: dict[tuple[int, ...], list[Port]] = {}
    for port in ports:
        together.setdefault(port.boxes, []).append(port)
    return [
        part
        for group in together.values()
        for part in ([group] if len(group) > MOST_PORTS else [[port] for port in group])
    ]


def _port_style(graph: Graph, group: Sequence[Port], kind: str, returned: Sequence[Port]) -> str:
    if len(group) == 1:
        read = kind == "out" or group[0].boxes or any(p.value == group[0].value for p in returned)
        unread = "" if read else "not used"
        label = lines_label(escape_html(group[0].label), _shape(graph.values[group[0].value]), unread)
    else:
        size = format_bytes(sum(p.size_bytes for p in group))
        label = lines_label(f"{len(group)} {kind}puts", size)
    return attributes(
        {
            "label": label,
            "style": "filled,rounded",
            "shape": "box",
            "fillcolor": "white",
            "color": palette.NEUTRAL,
            "tooltip": ", ".join(p.label for p in group[:12]),
        }
    )


def _shape(value: Value) -> str:
    return f"{' × '.join(map(str, value.shape)) or 'scalar'} {value.dtype}"


def _edges(folded: Folded, found: Sequence[Span], together: Sequence[DrawnCollective]) -> list[str]:
    """Edges on one device; those that cross are drawn by :func:`bridge_edges`."""
    bridged = {(span.box, reader) for span in found for reader in span.readers}
    bridged |= {(exchange.box, reader) for exchange in together for reader in exchange.readers}
    data = [edge for edge in folded.edges if edge.kind == "data"]
    readers: dict[int, list[int]] = {}
    for edge in data:
        readers.setdefault(edge.source, []).append(edge.destination)
    lines = []
    for edge in data:
        if (edge.source, edge.destination) in bridged:
            continue
        tip = {"tooltip": f"{format_bytes(edge.size_bytes)}: {', '.join(edge.values[:8])}"}
        faint = len(readers[edge.source]) > WIDE and edge.destination != min(readers[edge.source])
        style = {"color": palette.FAINT, "penwidth": "0.7"} if faint else _weight(folded, edge)
        lines.append(f"b{edge.source} -> b{edge.destination} [{attributes({**style, **tip})}]")
    return lines


def _weight(folded: Folded, edge: Edge) -> dict[str, str]:
    """Edges between boxes of one device are kept straight."""
    same = folded.boxes[edge.source].devices == folded.boxes[edge.destination].devices
    return {"weight": "4" if same else "1"}
