"""Which links a step keeps busiest, in words."""

from __future__ import annotations

import re

from graphpart.draw.words.text import shorten, table
from graphpart.ir.quantities import format_bytes, format_time
from graphpart.ir.timeline import LinkUse, Timeline

MOST_ROWS = 6
"""Kinds of links beyond this number are left out; those that are busiest come first."""

_NUMBER = re.compile(r"\d+")


def links(timeline: Timeline | None) -> str:
    """A row for every kind of link, with the busiest of its kind; empty where nothing is sent.

    Links are of one kind whose names differ by numbers alone.
    """
    if timeline is None or not timeline.links or not timeline.makespan_s:
        return ""
    kinds: dict[str, list[LinkUse]] = {}
    for link in timeline.links:  # the busiest first
        kinds.setdefault(_NUMBER.sub("0", link.name), []).append(link)
    rows = []
    for busiest, *others in list(kinds.values())[:MOST_ROWS]:
        part = 100 * busiest.busy_s / timeline.makespan_s
        alike = f"{len(others)}, down to {format_time(others[-1].busy_s)}" if others else "–"
        size, busy = format_bytes(int(busiest.size_bytes)), format_time(busiest.busy_s)
        rows.append([shorten(busiest.name, 44), size, busy, f"{part:.0f} %", alike])
    first, work_s = timeline.links[0], max(timeline.busy_s)
    limit = f"{shorten(first.name, 44)} limits, busier than any device"
    if first.busy_s <= work_s:
        limit = f"none limits, a device works {format_time(work_s)}"
    return f"Links: {limit}\n" + table(["link", "bytes", "busy", "of step", "others like it"], rows, "lrrrl")
