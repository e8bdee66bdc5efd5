"""What crosses between the boxes of a folded picture: messages as capsules, collectives as framed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphpart.draw.picture import palette
from graphpart.draw.picture.drawn_collectives import DrawnCollective
from graphpart.draw.picture.markup import attributes, lines_label
from graphpart.draw.picture.wiring import Span
from graphpart.draw.words.text import escape_html
from graphpart.ir.cluster import Cluster
from graphpart.ir.quantities import format_bytes

WIDE = 4
"""Edges are drawn faintly where a value goes to more boxes than this, as masks do."""

Capsule = tuple[frozenset[int], str]
"""The boxes that a bridge joins, and its node line."""


def capsules(cluster: Cluster, bridging: Sequence[Span], together: Sequence[DrawnCollective]) -> list[Capsule]:
    """A capsule for everything that crosses between boxes."""
    spans = [
        (frozenset((span.box, *span.readers)), f"s{number} [{attributes(_message(cluster, span))}]")
        for number, span in enumerate(bridging)
    ]
    return spans + [
        (frozenset((e.box, *e.readers)), f"c{number} [{attributes(collective_style(e))}]")
        for number, e in enumerate(together)
    ]


def bridge_edges(
    bridging: Sequence[Span], together: Sequence[DrawnCollective], port_of: Mapping[str, str]
) -> list[str]:
    """Edges from boxes to capsules and on to the boxes that read, or the outputs."""
    lines = []
    for number, span in enumerate(bridging):
        style = {"color": palette.border(span.source), "penwidth": "2.2", "arrowsize": "0.75", "weight": "2"}
        if span.parameter:
            style |= {"style": "dashed", "penwidth": "1.5", "weight": "0"}
        lines.append(f"b{span.box} -> s{number} [{attributes(style | {'arrowhead': 'none'})}]")
        for place, reader in enumerate(span.readers):
            faint = _faint(place, len(span.destinations) > 1, len(span.readers))
            lines.append(f"s{number} -> b{reader} [{attributes(style | faint)}]")
        ports = dict.fromkeys(port_of[value] for value in span.outputs)
        lines += [f"s{number} -> {port} [{attributes(style)}]" for port in ports]
    for number, exchange in enumerate(together):
        style = {"color": palette.NEUTRAL, "penwidth": "2.2", "arrowsize": "0.75", "weight": "4"}
        if exchange.parameter:
            style |= {"style": "dashed", "penwidth": "1.5", "weight": "0"}
        lines.append(f"b{exchange.box} -> c{number} [{attributes(style | {'arrowhead': 'none'})}]")
        for place, reader in enumerate(exchange.readers):
            faint = _faint(place, exchange.kind == "broadcast", len(exchange.readers))
            lines.append(f"c{number} -> b{reader} [{attributes(style | faint)}]")
        ports = dict.fromkeys(port_of[value] for value in exchange.outputs)
        lines += [f"c{number} -> {port} [{attributes(style)}]" for port in ports]
    return lines


def _faint(place: int, to_many: bool, num_readers: int) -> dict[str, str]:
    if place and to_many:
        return {"penwidth": "0.8", "arrowsize": "0.6", "weight": "0", "color": palette.FAINT}
    if place and num_readers > WIDE:
        return {"penwidth": "0.8", "arrowsize": "0.6", "weight": "1"}
    return {}


def _message(cluster: Cluster, span: Span) -> dict[str, str]:
    count = len(span.destinations)
    size = format_bytes(span.size_bytes / span.parts / count)
    amount = (f"{span.parts} × {size}" if span.parts > 1 else size) + (" each" if count > 1 else "")
    source, destination = cluster.devices[span.source].name, cluster.devices[span.destinations[0]].name
    what = f"{source} → {destination if count == 1 else f'{count} others'}"
    what = f"weight, {what}" if span.parameter else what
    return {
        "label": lines_label(f"<B>{escape_html(amount)}</B>", escape_html(what)),
        "style": "filled,rounded" + (",dashed" if span.parameter else ""),
        "fillcolor": palette.fill((span.source, span.destinations[0]) if count == 1 else (span.source,)),
        "color": palette.border(span.source),
        "penwidth": "2.2",
        "fontsize": "10",
        "height": "0.3",
        "margin": "0.08,0.05",
        "tooltip": ", ".join(span.values[:12]),
    }


def collective_style(exchange: DrawnCollective) -> dict[str, str]:
    """Attributes of a collective's node: its kind, its bytes in one step, and a square for each device."""
    size = format_bytes(exchange.size_bytes / exchange.parts)
    amount = f"{exchange.parts} × {size}" if exchange.parts > 1 else size
    what = f"weight{'s' if len(exchange.values) > 1 else ''}, {amount}" if exchange.parameter else amount
    return {
        "label": lines_label(f"<B>{exchange.kind}</B>", what, rows=palette.swatches(exchange.devices)),
        "style": "filled,rounded" + (",dashed" if exchange.parameter else ""),
        "fillcolor": "white",
        "color": palette.NEUTRAL,
        "peripheries": "2",
        "fontsize": "10",
        "height": "0.3",
        "margin": "0.1,0.04",
        "tooltip": ", ".join(exchange.values[:12]),
    }
