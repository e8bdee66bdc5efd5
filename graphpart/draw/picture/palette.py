"""Colours of devices: light fills and dark borders that colour-blind readers can tell apart.

The hues are Okabe and Ito's ("Color Universal Design", 2008), darkened for borders and lightened for fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FILLS = ("#DAEAF6", "#FCE9C8", "#D5EEE4", "#F5DFEC", "#FADBCB", "#E3F4FC", "#FAF6C2", "#E4E4E8")
BORDERS = ("#0072B2", "#B97700", "#00785A", "#A84D82", "#BF4A00", "#2F8FC4", "#8F8400", "#55555F")
MOST_SWATCHES = 16
NEUTRAL = "#5A5A64"
FAINT = "#B4B4BE"
MODULE_FILLS = ("#FAFAFB", "#F3F3F5", "#ECECEF")
MODULE_BORDER = "#C8C8D0"


def border(device: int) -> str:
    """Dark colour of a device."""
    return BORDERS[device % len(BORDERS)]


def fill(devices: Sequence[int]) -> str:
    """Light colour of a device, or a DOT colour list that fades from one to the other."""
    return ":".join(FILLS[d % len(FILLS)] for d in devices)


def box_style(devices: Sequence[int]) -> dict[str, str]:
    """DOT attributes of a box on these devices: white for several; from the ninth device on, borders are dashed."""
    if len(devices) > 1:
        return {"style": "filled,rounded", "fillcolor": "white", "color": NEUTRAL}
    dashed = ",dashed" if devices[0] >= len(BORDERS) else ""
    return {"style": f"filled,rounded{dashed}", "fillcolor": fill(devices), "color": border(devices[0])}


def swatches(devices: Sequence[int]) -> str:
    """A row of an HTML-like table with a small square for each of several devices, or nothing for one."""
    if len(devices) < 2:
        return ""
    squares = " ".join(f'<FONT COLOR="{border(d)}">■</FONT>' for d in devices[:MOST_SWATCHES])
    more = f" +{len(devices) - MOST_SWATCHES}" if len(devices) > MOST_SWATCHES else ""
    return f'<TR><TD><FONT POINT-SIZE="14">{squares}{more}</FONT></TD></TR>'


def tile_cells(lines: Mapping[int, Sequence[str]]) -> str:
    """A row of an HTML-like table with a cell for each device, in its colours, with escaped lines in it."""
    cells = "".join(
        f'<TD BORDER="1" CELLPADDING="3" COLOR="{border(d)}" BGCOLOR="{fill((d,))}">'
        f'<FONT POINT-SIZE="8.5">{"<BR/>".join(texts) or "–"}</FONT></TD>'
        for d, texts in lines.items()
    )
    frame = 'BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="0"'
    return f"<TR><TD><TABLE {frame}><TR>{cells}</TR></TABLE></TD></TR>"
