"""How operators are cut, in words short enough for a picture: ``n 0:64``, ``Σk 0:32``, ``replica``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals

MOST_LINES = 3
"""Different cuts that are told of one box; the costliest operators' come first."""

MOST_RUNS = 2
"""Index sets of more runs than this are told by their first run and a count."""

LITTLE = 0.02
"""Operators with less than this part of the box's largest work don't speak for it."""

WHOLE, REPLICA = "whole", "replica"


def is_cut(placement: Placement, operators: Iterable[str]) -> bool:
    """Whether one of these operators has several tiles."""
    return any(len(placement.tiles[name]) > 1 for name in operators)


def tile_text(operator: Operator, placement: Placement, device: int) -> str:
    """What a device computes of an operator; empty if nothing.

    Index ranges by axis; ``Σ`` before an axis whose tiles give partial results; ``replica`` where another device
    computes the same; and what a group of neurons reads where a mask leaves the rest out.
    """
    tiles = placement.tiles[operator.name]
    own = [tile for tile in tiles if tile.device == device]
    if not own:
        return ""
    axes = _united(own)
    if axes is None:
        return f"{len(own)} tiles"
    sums = operator.rule.sums if operator.rule else frozenset[str]()
    parts = [f"{'Σ' if axis in sums else ''}{axis} {runs_text(part)}" for axis, part in axes.items()]
    if any(tile.device != device and dict(tile.axes) in [dict(t.axes) for t in own] for tile in tiles):
        parts.append(REPLICA)
    if len(own) == 1:
        parts += [f"reads {axis} {runs_text(part)}" for axis, part in own[0].reads.items()]
    return ", ".join(parts) or WHOLE


def runs_text(part: Intervals) -> str:
    """``0:64``; ``0:64 +2 runs`` where there are too many runs to tell."""
    if len(part.runs) <= MOST_RUNS:
        return str(part)
    return f"{Intervals(part.runs[:1])} +{len(part.runs) - 1} runs"


def _united(tiles: Sequence[Tile]) -> Mapping[str, Intervals] | None:
    """Several tiles on one device as one, if together they are a product of index sets."""
    first = tiles[0].axes
    if any(tile.axes.keys() != first.keys() for tile in tiles):
        return None
    united = dict(first)
    for tile in tiles[1:]:
        united = {axis: part | tile.axes[axis] for axis, part in united.items()}
    distinct = {tuple(tile.axes.items()) for tile in tiles}
    covered = sum(prod(len(part) for _, part in axes) for axes in distinct)
    return united if covered == prod(len(part) for part in united.values()) else None


def cut_lines(graph: Graph, placement: Placement, operators: Sequence[str], device: int) -> tuple[str, ...]:
    """What a device computes of a box: the different cuts of its costly operators, in topological order.

    Operators without work (views) speak for a box only if it has no others.

    Args:
        graph: the traced model.
        placement: where its operators run.
        operators: names of the box's operators, in topological order.
        device: index of the device.
    """
    return _leading(graph, operators, lambda op: tile_text(op, placement, device))


def drawn_axes(graph: Graph, placement: Placement, operators: Sequence[str]) -> tuple[str, ...]:
    """How a box is cut over many devices: ``n in 8``, a line an axis, as :func:`cut_lines` chooses operators."""
    return _leading(graph, operators, lambda op: _counts_text(op, placement.tiles[op.name]))


def _counts_text(operator: Operator, tiles: Sequence[Tile]) -> str:
    if len(tiles) < 2:
        return ""
    sums = operator.rule.sums if operator.rule else frozenset[str]()
    counts = {axis: len({tile.axes[axis] for tile in tiles}) for axis in tiles[0].axes}
    return ", ".join(f"{'Σ' if axis in sums else ''}{axis} in {count}" for axis, count in counts.items()) or REPLICA


def _leading(graph: Graph, operators: Sequence[str], text_of: Callable[[Operator], str]) -> tuple[str, ...]:
    """The different texts of the operators that cost most, in the operators' order; real cuts before others."""
    work = {name: graph.operator[name].flops_forward + graph.operator[name].flops_backward for name in operators}
    least = LITTLE * max(work.values(), default=0.0)
    found: dict[str, float] = {}
    for name in operators:
        text = text_of(graph.operator[name])
        if text and graph.operator[name].operands and work[name] >= least:
            found[text] = max(found.get(text, 0.0), work[name])
    cuts = [text for text in found if text not in (WHOLE, REPLICA)] or list(found)
    best = sorted(cuts, key=lambda text: -found[text])[:MOST_LINES]
    return tuple(text for text in cuts if text in best)
