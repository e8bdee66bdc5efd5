"""A plan as a DOT picture: devices as colours, modules as nested clusters, bridges as capsules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from graphpart.draw import palette
from graphpart.draw.fold import MAX_BOXES, Box, Edge, Folded, Port, fold
from graphpart.draw.groups import group_devices
from graphpart.draw.legend import heading
from graphpart.draw.text import escape_html, format_bytes, format_flops, quote
from graphpart.draw.wiring import Span, spans
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Value
from graphpart.ir.placement import Placement
from graphpart.ir.program import Program

FONT = "Helvetica,Arial,sans-serif"
MOST_PORTS = 4
"""More inputs (or outputs) than this that go to the same boxes are drawn as one."""

WIDE = 4
"""A box's edge is drawn faintly if its values go to more boxes than this, as masks do."""

Capsule = tuple[frozenset[int], str]
"""The boxes that a bridge joins, and its node line."""

_GRAPH = {
    "rankdir": "TB", "labelloc": "t", "labeljust": "l", "fontname": FONT, "fontsize": "11", "nodesep": "0.28",
    "ranksep": "0.25", "pad": "0.25", "bgcolor": "white", "charset": "UTF-8",
}  # fmt: skip
_NODE = {"shape": "box", "fontname": FONT, "fontsize": "11", "margin": "0.12,0.05", "height": "0.42", "penwidth": "1.3"}
_EDGE = {"fontname": FONT, "fontsize": "9", "color": palette.NEUTRAL, "arrowsize": "0.6", "penwidth": "1.0"}


def plan_dot(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program | None = None,
    *,
    max_boxes: int = MAX_BOXES,
    title: str = "",
) -> str:
    """DOT source of a picture of a plan.

    Args:
        graph: the traced model.
        placement: where its operators run.
        cluster: the devices, for names and colours.
        program: the lowered program; its messages are shown instead of an estimate from the placement.
        max_boxes: most boxes the graph is folded to.
        title: heading; the model's name if empty.

    Raises:
        DrawError: if ``max_boxes`` is not positive.
    """
    num_devices = len(placement.devices)
    groups = group_devices(placement, cluster)
    if groups is not None:
        placement, cluster = groups.placement(placement), groups.cluster
    folded = fold(graph, placement, max_boxes=max_boxes)
    found = spans(graph, placement, folded, program, groups)
    bridging = [span for span in found if span.readers]
    lines = [
        "digraph plan {",
        f"graph [{_attributes(_GRAPH)}]",
        f"label=<{heading(graph, placement, cluster, title, num_devices)}>",
        f"node [{_attributes(_NODE)}]",
        f"edge [{_attributes(_EDGE)}]",
        *_modules(folded, _inside(found), _capsules(cluster, bridging)),
        *_ports(graph, folded),
        *_edges(folded, found),
        *_bridges(bridging),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _attributes(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={quote(value) if not value.startswith('<<') else value}" for key, value in values.items())


def _two_lines(first: str, second: str, third: str = "", rows: str = "") -> str:
    """An HTML-like label of escaped parts: a line in the box's own type, small grey ones, and further rows."""
    small = "".join(
        f'<TR><TD><FONT POINT-SIZE="8.5" COLOR="{palette.NEUTRAL}">{line}</FONT></TD></TR>'
        for line in (second, third)
        if line
    )
    frame = 'BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"'
    return f"<<TABLE {frame}><TR><TD>{first}</TD></TR>{small}{rows}</TABLE>>"


def _inside(found: Iterable[Span]) -> dict[int, int]:
    """Per box, bytes that cross between devices within it."""
    total: dict[int, int] = {}
    for span in found:
        if not span.readers:
            total[span.box] = total.get(span.box, 0) + span.size_bytes
    return total


def _box_line(index: int, box: Box, label: str, inside: int) -> str:
    operators = f"{box.num_operators} op{'s' if box.num_operators > 1 else ''}"
    flops = format_flops(box.flops) if box.flops else ""
    size = format_bytes(box.parameter_bytes) if box.parameter_bytes else ""
    facts = " · ".join(fact for fact in (operators, flops, size) if fact)
    inner = f"⇄ {format_bytes(inside)} inside" if inside else ""
    attributes = {
        "label": _two_lines(escape_html(label), facts, inner, palette.swatches(box.devices)),
        **palette.box_style(box.devices),
        "tooltip": f"{'.'.join(box.path) or label}: {', '.join(box.operators[:12])}",
    }
    return f"b{index} [{_attributes(attributes)}]"


def _modules(folded: Folded, inside: Mapping[int, int], capsules: Sequence[Capsule]) -> list[str]:
    """Box and cluster lines, nested as the modules are; a module with one box gets no cluster.

    A capsule goes into the innermost cluster that holds all the boxes it joins.
    """
    counter = iter(range(len(folded.boxes) + 1))

    def box_line(i: int, depth: int) -> str:
        box = folded.boxes[i]
        return _box_line(i, box, ".".join((*box.path[depth:-1], box.label)), inside.get(i, 0))

    def emit(members: Sequence[int], depth: int, level: int, capsules: Sequence[Capsule]) -> list[str]:
        lines: list[str] = []
        parts: dict[str, list[int]] = {}
        for i in members:
            parts.setdefault(_part(folded.boxes[i], depth), []).append(i)
        for part, below in parts.items():
            if not part or len(below) == 1:
                lines += [box_line(i, depth) for i in below]
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
    return _attributes(
        {
            "label": f'<<FONT COLOR="{palette.NEUTRAL}">{escape_html(name)}</FONT>>',
            "style": "filled,rounded",
            "fillcolor": palette.MODULE_FILLS[min(level, len(palette.MODULE_FILLS) - 1)],
            "color": palette.MODULE_BORDER,
            "labeljust": "l",
            "labelloc": "t",
            "margin": "10",
            "tooltip": name,
        }
    )


def _ports(graph: Graph, folded: Folded) -> list[str]:
    lines = []
    for kind, ports in (("in", folded.inputs), ("out", folded.outputs)):
        for number, group in enumerate(_bundles(ports)):
            node = f"{kind}{number}"
            lines.append(f"{node} [{_port_style(graph, group, kind, folded.outputs)}]")
            style = _attributes({"color": palette.FAINT, "constraint": "false"} if len(group[0].boxes) > WIDE else {})
            for place, box in enumerate(group[0].boxes):
                attributes = f" [{style}]" if style and place else ""
                lines.append(f"{node} -> b{box}{attributes}" if kind == "in" else f"b{box} -> {node}")
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
        label = _two_lines(escape_html(group[0].label), _shape(graph.values[group[0].value]), unread)
    else:
        size = format_bytes(sum(p.size_bytes for p in group))
        label = _two_lines(f"{len(group)} {kind}puts", size)
    return _attributes(
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


def _edges(folded: Folded, found: Sequence[Span]) -> list[str]:
    """Edges on one device; those that cross are drawn by :func:`_bridges`."""
    bridged = {(span.box, reader) for span in found for reader in span.readers}
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
        lines.append(f"b{edge.source} -> b{edge.destination} [{_attributes({**style, **tip})}]")
    return lines


def _weight(folded: Folded, edge: Edge) -> dict[str, str]:
    """Edges between boxes of one device are kept straight."""
    same = folded.boxes[edge.source].devices == folded.boxes[edge.destination].devices
    return {"weight": "4" if same else "1"}


def _capsules(cluster: Cluster, bridging: Sequence[Span]) -> list[Capsule]:
    return [
        (frozenset((span.box, *span.readers)), f"s{number} [{_attributes(_capsule(cluster, span))}]")
        for number, span in enumerate(bridging)
    ]


def _bridges(bridging: Sequence[Span]) -> list[str]:
    lines = []
    for number, span in enumerate(bridging):
        style = {"color": palette.border(span.source), "penwidth": "2.2", "arrowsize": "0.75", "weight": "2"}
        if span.parameter:
            style |= {"style": "dashed", "penwidth": "1.5", "weight": "0"}
        lines.append(f"b{span.box} -> s{number} [{_attributes(style | {'arrowhead': 'none'})}]")
        for place, reader in enumerate(span.readers):
            faint: dict[str, str] = {}
            if place and len(span.destinations) > 1:
                faint = {"penwidth": "0.8", "arrowsize": "0.6", "weight": "0", "color": palette.FAINT}
            elif place and len(span.readers) > WIDE:
                faint = {"penwidth": "0.8", "arrowsize": "0.6", "weight": "1"}
            lines.append(f"s{number} -> b{reader} [{_attributes(style | faint)}]")
    return lines


def _capsule(cluster: Cluster, span: Span) -> dict[str, str]:
    count = len(span.destinations)
    size = format_bytes(span.size_bytes / span.parts / count)
    amount = (f"{span.parts} × {size}" if span.parts > 1 else size) + (" each" if count > 1 else "")
    source, destination = cluster.devices[span.source].name, cluster.devices[span.destinations[0]].name
    what = f"{source} → {destination if count == 1 else f'{count} others'}"
    what = f"weight, {what}" if span.parameter else what
    return {
        "label": _two_lines(f"<B>{escape_html(amount)}</B>", escape_html(what)),
        "style": "filled,rounded" + (",dashed" if span.parameter else ""),
        "fillcolor": palette.fill((span.source, span.destinations[0]) if count == 1 else (span.source,)),
        "color": palette.border(span.source),
        "penwidth": "2.2",
        "fontsize": "10",
        "height": "0.3",
        "margin": "0.08,0.05",
        "tooltip": ", ".join(span.values[:12]),
    }
