"""Which operators are cut, along what, and the collectives that follow, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphpart.draw.words.groups import DeviceGroups
from graphpart.draw.words.text import shorten, table
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.program import Backward, Collective, Program
from graphpart.ir.quantities import format_bytes

MOST_ROWS = 12
"""Kinds of cuts beyond this number are only counted; those with most work come first."""


def cuts(graph: Graph, placement: Placement, cluster: Cluster, groups: DeviceGroups | None = None) -> str:
    """A row for every kind of operator, axis and devices, or groups of these; empty where nothing is cut."""
    number: Counter[tuple[str, str, str]] = Counter()
    work: Counter[tuple[str, str, str]] = Counter()
    for op in graph.operators:
        tiles = placement.tiles[op.name]
        if len(tiles) > 1:
            called = op.target.split(".")[1] if "." in op.target else op.target
            row = (called, _along(op, tiles), _devices(tiles, cluster, groups))
            number[row] += 1
            work[row] += int(op.flops_forward + op.flops_backward)
    if not any(along for _, along, _ in number if along != "replica"):
        return ""
    rows = sorted(number, key=lambda row: (-work[row], row))
    shown = [
        [shorten(what, 36), str(number[what, along, where]), along, where] for what, along, where in rows[:MOST_ROWS]
    ]
    if len(rows) > MOST_ROWS:
        shown.append([f"… {len(rows) - MOST_ROWS} more", str(sum(number[row] for row in rows[MOST_ROWS:])), "", ""])
    return "Cut, or computed on several devices\n" + table(["operator", "ops", "along", "devices"], shown, "lrll")


def collectives(program: Program | None, backward: Backward | None) -> str:
    """A row for every kind of collective; empty where there is none."""
    forward = _by_kind(program.collectives if program is not None else ())
    behind = _by_kind(backward.collectives if backward is not None else ())
    rows = []
    for kind in sorted(forward.keys() | behind.keys()):
        (there, sent), (back, returned) = forward.get(kind, (0, 0)), behind.get(kind, (0, 0))
        rows.append([kind, str(there), format_bytes(sent), str(back), format_bytes(returned)])
    if not rows:
        return ""
    heads = ["collective", "forward", "bytes", "backward", "bytes"]
    return "Of these messages, per step\n" + table(heads, rows, "lrrrr")


def _by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[int, int]] = {}
    for collective in found:
        number, size_bytes = kinds.get(collective.kind, (0, 0))
        kinds[collective.kind] = (number + 1, size_bytes + collective.size_bytes)
    return kinds


def _along(op: Operator, tiles: Sequence[Tile]) -> str:
    axes = dict.fromkeys(axis for tile in tiles for axis in tile.axes)
    if op.rule is None or not axes:
        return "replica"
    return ", ".join(_axis(op, tiles, axis) for axis in axes)


def _axis(op: Operator, tiles: Sequence[Tile], axis: str) -> str:
    """``n 384 + 384``: the axis and how many indices each part has; ``Σ`` before a contracted one."""
    assert op.rule is not None
    sizes = [len(part) for part in dict.fromkeys(tile.axes[axis] for tile in tiles if axis in tile.axes)]
    parts = (
        " + ".join(map(str, sizes))
        if len(sizes) <= 4
        else f"{len(sizes)} × {min(sizes)}" + (f"–{max(sizes)}" if max(sizes) > min(sizes) else "")
    )
    return ("Σ" if axis in op.rule.sums else "") + f"{axis} {parts}"


def _devices(tiles: Sequence[Tile], cluster: Cluster, groups: DeviceGroups | None) -> str:
    shown, of = (groups.cluster, groups.of) if groups is not None else (cluster, {})
    names = list(dict.fromkeys(shown.devices[of.get(tile.device, tile.device)].name for tile in tiles))
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]} ({len(names)})"
