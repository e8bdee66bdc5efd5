"""Numbers with units, tables of plain text, and text made safe for DOT."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def format_bytes(size_bytes: float) -> str:
    """Bytes in decimal units, three digits: ``1.57 MB``."""
    return _scaled(size_bytes, "B")


def format_flops(work_flops: float) -> str:
    """Floating-point operations in decimal units, three digits: ``3.4 GFLOP``."""
    return _scaled(work_flops, "FLOP")


def format_count(count: float) -> str:
    """A count in decimal units, three digits: ``124 M``."""
    return _scaled(count, "").rstrip()


def format_time(time_s: float) -> str:
    """Seconds in a unit that keeps three digits before or after the point: ``1.23 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(time_s) >= 0.9995 * scale:
            return f"{_digits(time_s / scale)} {unit}"
    return f"{_digits(time_s * 1e9)} ns" if time_s else "0 s"


def _scaled(amount: float, unit: str) -> str:
    power = 0
    while abs(amount) >= 999.5 and power < len(_DECIMAL) - 1:
        amount /= 1000
        power += 1
    return f"{_digits(amount)} {_DECIMAL[power]}{unit}"


def _digits(amount: float) -> str:
    if amount == int(amount) and abs(amount) < 1000:
        return str(int(amount))
    places = 2 if abs(amount) < 9.995 else 1 if abs(amount) < 99.95 else 0
    text = f"{amount:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def plain(text: str) -> str:
    """Text without control characters, on one line."""
    return "".join(" " if c in "\n\r\t" else c for c in text if c in "\n\r\t" or unicodedata.category(c)[0] != "C")


def shorten(text: str, width: int) -> str:
    """Text on one line of at most ``width`` columns, cut in the middle with ``…``."""
    text = plain(text)
    if display_width(text) <= width:
        return text
    room = max(width - 1, 0)
    head, tail = room - room // 2, room // 2
    return text[:head] + "…" + (text[-tail:] if tail else "")


def escape_html(text: str, width: int = 44) -> str:
    """Text for an HTML-like label of DOT, shortened."""
    return html.escape(shorten(text, width), quote=True).replace("\\", r"\\")


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
