"""A program with its bridges as a DOT picture: a cluster a device, and what is sent between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphpart.draw.picture import palette
from graphpart.draw.picture.boxes import inside_lines
from graphpart.draw.picture.detail import Detail, DetailKey, DetailNode, detail, without_messages
from graphpart.draw.picture.drawn_collectives import exchanges
from graphpart.draw.picture.fold import MAX_BOXES, Folded, fold
from graphpart.draw.picture.legend import heading
from graphpart.draw.picture.markup import Markup, attributes, lines_label, preamble
from graphpart.draw.picture.tiles import cut_lines
from graphpart.draw.picture.wiring import spans
from graphpart.draw.words.text import escape_html
from graphpart.errors import DrawError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import Program
from graphpart.ir.quantities import format_bytes

LAYOUT = {"ranksep": "0.22", "nodesep": "0.2", "newrank": "true"}
MOST_TAGS = 3
"""Numbers of messages that are told of one send."""

NOTE = "send and recv of one message share its number · slice, concat and sum are bridges' parts, not the model's"
PARTS = ("slice", "split", "concat", "sum", "send", "recv")


def detailed(
    graph: Graph, placement: Placement, program: Program, max_boxes: int, *, fewest: int = 1
) -> tuple[Folded, Detail] | None:
    """The boxes and the nodes of a detailed picture, folded until there are few enough; None if that can't be.

    Args:
        graph: the traced model.
        placement: where its operators run.
        program: the lowered program.
        max_boxes: most nodes of the picture.
        fewest: give up where the graph would have to be folded to fewer boxes than this.
    """
    boxes = max_boxes
    while boxes >= fewest:
        folded = fold(graph, placement, max_boxes=boxes)
        for inner in (True, False):
            found = detail(graph, program, folded, inner=inner)
            if len(found.nodes) <= max_boxes:
                return folded, found
        boxes = min(boxes, len(folded.boxes)) // 2
    return None


def program_dot(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program,
    *,
    max_boxes: int = MAX_BOXES,
    title: str = "",
    messages: bool = True,
) -> str:
    """DOT source of a picture of a program with all its bridges.

    Each device is a cluster with its tiles. A message is a send in one and a receive in another that share its number;
    messages with the shape of a collective are one node between the devices.

    Args:
        graph: the traced model.
        placement: where its operators run.
        cluster: the devices, for names and colours.
        program: the lowered program; its first microbatch is drawn.
        max_boxes: most nodes; alike and neighbouring operators fold until they are no more.
        title: heading; the model's name if empty.
        messages: whether to draw sends and receives; without them edges go straight from device to device.

    Raises:
        DrawError: if not even one box a device leaves few enough nodes.
    """
    found = detailed(graph, placement, program, max_boxes)
    if found is None:
        raise DrawError(
            f"a picture of {graph.name} with its bridges on {len(placement.devices)} devices needs more than "
            f"{max_boxes} boxes; give a larger max_boxes, or draw it without bridges"
        )
    folded, drawn = found
    drawn = drawn if messages else without_messages(drawn)
    return _source(graph, placement, cluster, program, folded, drawn, title)


def _source(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    program: Program,
    folded: Folded,
    drawn: Detail,
    title: str,
) -> str:
    notes = [NOTE] if any(node.kind in PARTS for node in drawn.nodes.values()) else []
    if program.num_microbatches > 1:
        notes.append(f"the first of {program.num_microbatches} microbatches")
    name_of = {key: f"n{i}" for i, key in enumerate(drawn.nodes)}
    label = _Labels(graph, placement, folded, _inside(graph, placement, program, folded, drawn))
    lines = preamble("program", heading(graph, placement, cluster, title, notes=notes), **LAYOUT)
    own: dict[int | None, list[str]] = {}
    for key, node in drawn.nodes.items():
        own.setdefault(node.device, []).append(f"{name_of[key]} [{attributes(label.style(node))}]")
    for device in placement.devices:
        if device in own:
            lines += [f"subgraph cluster_{device} {{", f"graph [{_cluster(cluster.devices[device].name, device)}]"]
            lines += [*own[device], "}"]
    lines += own.get(None, [])
    lines += [f"{{rank=same; {'; '.join(name_of[key] for key in tiles)}}}" for tiles in _beside(drawn)]
    for source, destination in drawn.edges:
        style = _edge(drawn.nodes[source], drawn.nodes[destination])
        lines.append(f"{name_of[source]} -> {name_of[destination]} [{attributes(style)}]")
    return "\n".join([*lines, "}"]) + "\n"


def _inside(
    graph: Graph, placement: Placement, program: Program, folded: Folded, drawn: Detail
) -> Mapping[int, Sequence[str]]:
    """Per box, what it passes to itself on other devices, as far as that is not drawn."""
    shown = {name for node in drawn.nodes.values() if node.kind == "home" for name in node.names}
    found = (s for s in spans(graph, placement, folded, program) if shown.isdisjoint(s.values))
    together = (e for e in exchanges(graph, folded, program) if shown.isdisjoint(e.values))
    return inside_lines(found, together)


def _beside(drawn: Detail) -> list[list[DetailKey]]:
    """Tiles of one box, which stand beside one another."""
    tiles: dict[int | None, list[DetailKey]] = {}
    for key, node in drawn.nodes.items():
        if node.kind == "tile":
            tiles.setdefault(node.box, []).append(key)
    return [keys for keys in tiles.values() if len(keys) > 1]


def _cluster(name: str, device: int) -> str:
    return attributes(
        {
            "label": Markup(f'<FONT COLOR="{palette.border(device)}"><B>{escape_html(name)}</B></FONT>'),
            "style": "rounded" + (",dashed" if device >= len(palette.BORDERS) else ""),
            "color": palette.border(device),
            "labeljust": "l",
            "labelloc": "t",
            "margin": "10",
        }
    )


def _edge(source: DetailNode, destination: DetailNode) -> dict[str, str]:
    if source.kind == "send" and destination.kind == "recv":
        device = source.device or 0
        text = format_bytes(source.size_bytes)
        return {"color": palette.border(device), "penwidth": "2.2", "arrowsize": "0.75", "label": text}
    if None in (source.device, destination.device) and (source.devices or destination.devices):
        return {"penwidth": "1.8", "arrowsize": "0.7"}
    return {"weight": "4"} if source.device == destination.device else {}


class _Labels:
    """Labels and looks of nodes."""

    def __init__(self, graph: Graph, placement: Placement, folded: Folded, inside: Mapping[int, Sequence[str]]) -> None:
        self.graph = graph
        self.placement = placement
        self.folded = folded
        self.inside = inside

    def style(self, node: DetailNode) -> Mapping[str, str]:
        if node.kind == "tile":
            return self._tile(node)
        if node.devices:
            return self._collective(node)
        small = {"fontsize": "9", "height": "0.25", "margin": "0.07,0.03", "penwidth": "1.1"}
        if node.kind in PARTS:
            return {
                "label": self._part(node),
                **small,
                "style": "filled" if node.kind in PARTS[:4] else "filled,rounded",
                "fillcolor": "white",
                "color": palette.border(node.device or 0),
                "tooltip": ", ".join(node.names),
            }
        if node.kind == "home":
            text = node.names[0] if len(node.names) == 1 else f"{len(node.names)} weights"
            style = {"style": "filled,rounded,dashed", "fillcolor": "white", "color": palette.border(node.device or 0)}
            return {"label": lines_label(escape_html(text)), **small, **style, "tooltip": ", ".join(node.names[:12])}
        value = self.graph.values[node.names[0]]
        text = value.name
        if value.name in self.graph.source and self.graph.source[value.name].names:
            text = self.graph.source[value.name].names[0]
        shape = f"{' × '.join(map(str, value.shape)) or 'scalar'} {value.dtype}"
        style = {"style": "filled,rounded", "fillcolor": "white", "color": palette.NEUTRAL}
        return {"label": lines_label(escape_html(text), shape), **style}

    def _tile(self, node: DetailNode) -> dict[str, str]:
        box, device = self.folded.boxes[node.box or 0], node.device or 0
        path = ".".join((*box.path[-2:-1], box.label)) if box.path else box.label
        lines = [escape_html(line) for line in cut_lines(self.graph, self.placement, box.operators, device)]
        told = [] if lines == ["whole"] else lines
        tip = f"{'.'.join(box.path) or box.label}: {', '.join(box.operators[:12])}"
        told += self.inside.get(node.box or 0, ())
        return {"label": lines_label(escape_html(path), *told), **palette.box_style((device,)), "tooltip": tip}

    def _collective(self, node: DetailNode) -> dict[str, str]:
        size = format_bytes(node.size_bytes)
        return {
            "label": lines_label(f"<B>{node.kind}</B>", size, rows=palette.swatches(node.devices)),
            "style": "filled,rounded",
            "fillcolor": "white",
            "color": palette.NEUTRAL,
            "peripheries": "2",
            "fontsize": "10",
            "height": "0.3",
            "margin": "0.1,0.04",
            "tooltip": ", ".join(node.names),
        }

    def _part(self, node: DetailNode) -> str:
        if node.tags:
            more = f" +{len(node.tags) - MOST_TAGS}" if len(node.tags) > MOST_TAGS else ""
            return f"{node.kind} {', '.join(f'#{tag}' for tag in node.tags[:MOST_TAGS])}{more}"
        return node.kind
