"""The heading of a picture: title, totals, and a table of devices."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.draw.picture import palette
from graphpart.draw.picture.tiles import is_cut
from graphpart.draw.words.share import device_flops, device_parameter_bytes
from graphpart.draw.words.text import escape_html
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.quantities import format_bytes, format_count, format_flops

TILES = "a cell is a tile: what its device computes, by axis · Σ: partial sums · replica: computed on each"


def heading(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    title: str = "",
    num_devices: int = 0,
    notes: Sequence[str] = (),
) -> str:
    """An HTML-like table: title, one line of totals, one row per device, and what the labels mean.

    Args:
        graph: the traced model.
        placement: where its operators run.
        cluster: the devices.
        title: first line; the model's name if empty.
        num_devices: devices in use, if the placement is one over groups of them.
        notes: further lines, escaped.
    """
    used = num_devices or len(placement.devices)
    totals = " · ".join(
        (
            f"{len(graph.operators)} operators",
            f"{format_count(graph.num_parameters)} parameters",
            f"{format_flops(graph.flops)} a step",
            f"{used} device{'s' if used > 1 else ''}",
        )
    )
    name = f'<FONT POINT-SIZE="15"><B>{escape_html(title or graph.name, 70)}</B></FONT>'
    small = (*notes, TILES) if is_cut(placement, placement.tiles) else notes
    rows = [
        name,
        f'<FONT COLOR="{palette.NEUTRAL}">{totals}</FONT>',
        _table("".join(_device_rows(graph, placement, cluster)), spacing=3),
        *(f'<FONT POINT-SIZE="8.5" COLOR="{palette.NEUTRAL}">{line}</FONT>' for line in small),
    ]
    return _table("".join(f'<TR><TD ALIGN="LEFT">{row}</TD></TR>' for row in rows), spacing=1)


def _table(rows: str, spacing: int) -> str:
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="{spacing}" CELLPADDING="2">{rows}</TABLE>'


def _device_rows(graph: Graph, placement: Placement, cluster: Cluster) -> list[str]:
    flops = device_flops(graph, placement, len(cluster))
    parameters = device_parameter_bytes(graph, placement, len(cluster))
    whole = sum(flops) or 1.0
    rows = []
    for i in placement.devices:
        device = cluster.devices[i]
        cells = (
            escape_html(device.name),
            escape_html(device.kind),
            f"{100 * flops[i] / whole:.0f} % of FLOPs",
            f"{format_bytes(parameters[i])} of parameters",
        )
        style = ' STYLE="dashed"' if i >= len(palette.BORDERS) else ""
        swatch = f'<TD BORDER="2" WIDTH="22" COLOR="{palette.border(i)}" BGCOLOR="{palette.fill((i,))}"{style}> </TD>'
        aligned = ("LEFT", "LEFT", "RIGHT", "RIGHT")
        shown = "".join(f'<TD ALIGN="{a}">{c}</TD>' for a, c in zip(aligned, cells, strict=True))
        rows.append(f"<TR>{swatch}{shown}</TR>")
    return rows
