"""Tables of plain text, and text made safe for where it goes: a terminal, DOT, HTML-like labels, SVG."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """Text without control characters, on one line."""
    return "".join(" " if c in "\n\r\t" else c for c in text if c in "\n\r\t" or unicodedata.category(c)[0] != "C")


def plain_lines(text: str) -> str:
    """Text without control characters, on as many lines as it has: what is safe to print."""
    return "\n".join(map(plain, text.split("\n")))


def shorten(text: str, width: int) -> str:
    """Text on one line of at most ``width`` columns, cut in the middle with ``…``."""
    text = plain(text)
    if display_width(text) <= width:
        return text
    room = max(width - 1, 0)
    head, tail = room - room // 2, room // 2
    return text[:head] + "…" + (text[-tail:] if tail else "")


def escape_xml(text: str) -> str:
    """Text for SVG, between tags or in an attribute, on as many lines as it has."""
    return html.escape(plain_lines(text), quote=True)


def escape_html(text: str, width: int = 44) -> str:
    """Text for an HTML-like label of DOT, shortened."""
    return escape_xml(shorten(text, width)).replace("\\", r"\\")


def quote(text: str) -> str:
    """A quoted DOT string that shows exactly this text."""
    return '"' + plain(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def display_width(text: str) -> int:
    """Columns that text fills in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """Columns of plain text under a ruled header.

    Args:
        headers: one per column.
        rows: cells, shown with ``str``; a cell may have several lines.
        align: a letter a column, ``l`` or ``r``; columns not named are left-aligned.

    Returns:
        Lines without trailing blanks or a last newline.
    """
    align = align.ljust(len(headers), "l")
    cells = [[[plain(line) for line in str(cell).split("\n")] for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table has {len(headers)} columns")
    widths = [
        max(display_width(line) for line in (header, *(line for row in cells for line in row[i])))
        for i, header in enumerate(headers)
    ]

    def show(parts: Sequence[str]) -> str:
        padded = (_pad(part, width, side) for part, width, side in zip(parts, widths, align, strict=False))
        return "  ".join(padded).rstrip()

    lines = [show(headers), "  ".join("─" * width for width in widths)]
    for row in cells:
        height = max((len(cell) for cell in row), default=0)
        lines += [show([cell[i] if i < len(cell) else "" for cell in row]) for i in range(height)]
    return "\n".join(lines)


def _pad(text: str, width: int, side: str) -> str:
    blank = " " * (width - display_width(text))
    return blank + text if side == "r" else text + blank
