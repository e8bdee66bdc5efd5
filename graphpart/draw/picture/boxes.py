"""The box of a folded picture: what it is, what it costs, and the tiles that it is cut into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphpart.draw.picture import palette
from graphpart.draw.picture.drawn_collectives import DrawnCollective
from graphpart.draw.picture.fold import Box
from graphpart.draw.picture.markup import attributes, lines_label
from graphpart.draw.picture.tiles import cut_lines, drawn_axes
from graphpart.draw.picture.wiring import Span
from graphpart.draw.words.text import escape_html
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.quantities import format_bytes, format_flops

MOST_CELLS = 4
"""On more devices than this a box says how often it is cut, and not where."""


def box_line(graph: Graph, placement: Placement, index: int, box: Box, label: str, inside: Sequence[str]) -> str:
    """The node line of a box.

    Args:
        graph: the traced model.
        placement: where its operators run.
        index: number of the box.
        box: the box.
        label: what it is called here.
        inside: what crosses between devices within it, a line each.
    """
    operators = f"{box.num_operators} op{'s' if box.num_operators > 1 else ''}"
    flops = format_flops(box.flops) if box.flops else ""
    size = format_bytes(box.parameter_bytes) if box.parameter_bytes else ""
    facts = " · ".join(fact for fact in (operators, flops, size) if fact)
    style = {
        "label": lines_label(escape_html(label), facts, *inside, rows=_tiles(graph, placement, box)),
        **palette.box_style(box.devices),
        "tooltip": f"{'.'.join(box.path) or label}: {', '.join(box.operators[:12])}",
    }
    return f"b{index} [{attributes(style)}]"


def _tiles(graph: Graph, placement: Placement, box: Box) -> str:
    """Rows with a cell a device, or for many devices a square each and how they cut the box."""
    if len(box.devices) < 2:
        return ""
    if len(box.devices) > MOST_CELLS:
        grey = "".join(
            f'<TR><TD><FONT POINT-SIZE="8.5">{escape_html(line)}</FONT></TD></TR>'
            for line in drawn_axes(graph, placement, box.operators)
        )
        return grey + palette.swatches(box.devices)
    texts = {d: [escape_html(t) for t in cut_lines(graph, placement, box.operators, d)] for d in box.devices}
    return palette.tile_cells(texts)


def inside_lines(found: Iterable[Span], together: Iterable[DrawnCollective]) -> dict[int, list[str]]:
    """Per box, what crosses between devices within it: collectives by kind, and the bytes of other messages."""
    single: dict[int, int] = {}
    for span in found:
        if not (span.readers or span.outputs):
            single[span.box] = single.get(span.box, 0) + span.size_bytes
    kinds: dict[tuple[int, str], tuple[int, int]] = {}
    for exchange in together:
        if not (exchange.readers or exchange.outputs):
            count, size_bytes = kinds.get((exchange.box, exchange.kind), (0, 0))
            key = (exchange.box, exchange.kind)
            kinds[key] = (count + len(exchange.values), size_bytes + exchange.size_bytes)
    lines: dict[int, list[str]] = {}
    for (box, kind), (count, size_bytes) in kinds.items():
        times = f"{count} × " if count > 1 else ""
        lines.setdefault(box, []).append(f"⇄ {times}{kind}, {format_bytes(size_bytes)}")
    for box, size_bytes in single.items():
        lines.setdefault(box, []).append(f"⇄ {format_bytes(size_bytes)} inside")
    return lines
