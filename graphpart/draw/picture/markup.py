"""DOT attributes and HTML-like labels, and the type that all pictures are set in."""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.draw.picture import palette
from graphpart.draw.words.text import quote

FONT = "Helvetica,Arial,sans-serif"
GRAPH: Mapping[str, str] = {
    "rankdir": "TB", "labelloc": "t", "labeljust": "l", "fontname": FONT, "fontsize": "11", "nodesep": "0.28",
    "ranksep": "0.25", "pad": "0.25", "bgcolor": "white", "charset": "UTF-8",
}  # fmt: skip
NODE: Mapping[str, str] = {
    "shape": "box", "fontname": FONT, "fontsize": "11", "margin": "0.12,0.05", "height": "0.42", "penwidth": "1.3",
}  # fmt: skip
EDGE: Mapping[str, str] = {
    "fontname": FONT, "fontsize": "9", "color": palette.NEUTRAL, "arrowsize": "0.6", "penwidth": "1.0",
}  # fmt: skip


class Markup(str):
    """An HTML-like label, made here of escaped parts: all other text is quoted, whatever it looks like."""

    __slots__ = ()


def attributes(values: Mapping[str, str]) -> str:
    """What stands between the brackets of a node or an edge; labels that are :class:`Markup` come as they are."""
    return ", ".join(
        f"{key}={f'<{value}>' if isinstance(value, Markup) else quote(value)}" for key, value in values.items()
    )


def preamble(name: str, heading: str, **changed: str) -> list[str]:
    """First lines of a picture: its name, its heading (an HTML-like table), and the defaults."""
    return [
        f"digraph {name} {{",
        f"graph [{attributes({**GRAPH, **changed})}]",
        f"label=<{heading}>",
        f"node [{attributes(NODE)}]",
        f"edge [{attributes(EDGE)}]",
    ]


def lines_label(first: str, *small: str, rows: str = "") -> Markup:
    """An HTML-like label of escaped parts: a line in the box's own type, small grey ones, and further rows."""
    grey = "".join(
        f'<TR><TD><FONT POINT-SIZE="8.5" COLOR="{palette.NEUTRAL}">{line}</FONT></TD></TR>' for line in small if line
    )
    frame = 'BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"'
    return Markup(f"<TABLE {frame}><TR><TD>{first}</TD></TR>{grey}{rows}</TABLE>")
