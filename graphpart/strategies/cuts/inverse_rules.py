"""Axis rules read backwards: from a region of a tensor to the tile that makes or reads just that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from graphpart.ir.axes import AxisRule, Dim, OperandDim, Window
from graphpart.ir.placement import Tile
from graphpart.ir.region import Intervals, Region

Axes = tuple[tuple[str, Intervals], ...]
"""The cut axes of one tile, sorted by name; ``()`` is the whole operator."""

Cut = tuple[Axes | None, ...]
"""A cut of one operator: the tile of each device of a group, in the group's order; None where it has none."""


def axes_of(found: Mapping[str, Intervals]) -> Axes:
    """A tile's axes in normal form."""
    return tuple(sorted(found.items()))


def tiles_on(cut: Cut, devices: Sequence[int]) -> tuple[Tile, ...]:
    """The tiles of a cut, on the devices of a group."""
    return tuple(Tile(device, dict(axes)) for device, axes in zip(devices, cut, strict=True) if axes is not None)


def shares_of(extent: int, weights: Sequence[float]) -> tuple[Intervals, ...] | None:
    """Contiguous parts of ``0 .. extent - 1`` in proportion to weights, by largest remainder, none of them empty.

    Returns:
        A run per weight, or None where there are fewer indices than weights.
    """
    count = len(weights)
    if extent < count:
        return None
    quotas = [extent * weight / sum(weights) for weight in weights]
    sizes = [max(1, int(quota)) for quota in quotas]
    by_remainder = sorted(range(count), key=lambda i: (int(quotas[i]) - quotas[i], i))
    while sum(sizes) < extent:
        for i in by_remainder[: extent - sum(sizes)]:
            sizes[i] += 1
    while sum(sizes) > extent:  # the ones that small weights were rounded up to
        sizes[max(range(count), key=lambda i: (sizes[i], -i))] -= 1
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    return tuple(Intervals.span(end - size, end) for size, end in zip(sizes, ends, strict=True))


def even_cut(rule: AxisRule, axis: str, weights: Sequence[float]) -> Cut | None:
    """An operator cut along one axis in proportion to weights, or None where the axis is too short.

    Where the axis joins several operands end to end (``cat``), each of these is cut so: device 0 takes the first part
    of every one.
    """
    joined = [dim for dims in rule.operands for dim in dims if isinstance(dim, Window) and dim.axis == axis]
    extent = rule.extents[axis]
    if len(joined) > 1 and sum(dim.extent for dim in joined) == extent and all(dim.is_shift for dim in joined):
        parts = [shares_of(dim.extent, weights) for dim in joined]
        if all(part is not None for part in parts):
            shifted = [
                Intervals.of(
                    (a - dim.start, b - dim.start)
                    for dim, part in zip(joined, parts, strict=True)
                    for a, b in part[i].runs  # type: ignore[index]
                )
                for i in range(len(weights))
            ]
            return tuple(((axis, part),) for part in shifted)
    found = shares_of(extent, weights)
    return None if found is None else tuple(((axis, part),) for part in found)


def is_legal(rule: AxisRule, cut: Cut) -> bool:
    """Whether the tiles of a cut, none of them whole, are disjoint and cover the operator along axes it can be cut."""
    cuttable = set(rule.cuttable)
    spaces = []
    for axes in cut:
        if axes is None:
            continue
        if not axes:
            return False
        for axis, part in axes:
            if axis not in cuttable or not part or (len(part.runs) > 1 and rule.needs_runs(axis)):
                return False
        spaces.append(dict(axes))
    for i, one in enumerate(spaces):
        if any(all(one[a] & other[a] for a in one.keys() & other.keys()) for other in spaces[:i]):
            return False
    extents = rule.extents
    used = {axis for space in spaces for axis in space}
    volume = sum(prod(len(space[a]) if a in space else extents[a] for a in used) for space in spaces)
    return volume == prod(extents[a] for a in used)


def solve(rule: AxisRule, dims: Sequence[OperandDim], region: Region) -> Axes | None:
    """The tile whose region of a tensor is a given one, as far as windows allow.

    Exact for plain and merged dimensions. Through a window the tile takes the indices whose window is centred in the
    region, so that neighbours read a little of each other's part.

    Args:
        rule: the operator's rule.
        dims: the tensor's dimensions in it.
        region: the part of the tensor.

    Returns:
        The tile's axes, or None where no tile along axes that can be cut has this region.
    """
    found: dict[str, Intervals] = {}
    for dim, part in zip(dims, region.dims, strict=True):
        if part == Intervals.full(_extent(rule, dim)):
            continue
        if isinstance(dim, Window):
            projected = _centred(rule, dim, part)
        else:
            projected = _project(rule, dim, part)
        if projected is None:
            return None
        for axis, indices in projected.items():
            if not indices or axis not in rule.cuttable or found.setdefault(axis, indices) != indices:
                return None
    return axes_of(found)


def owned(rule: AxisRule, dims: Sequence[OperandDim], axes: Axes) -> Region:
    """The region of an operand that a tile should find at hand: what it reads, without the overlap of windows."""
    tile = dict(axes)
    parts = []
    for dim, read in zip(dims, rule.region(tuple(dims), tile).dims, strict=True):
        if isinstance(dim, Window) and dim.axis in tile and not dim.is_shift:
            last = rule.extents[dim.axis]
            runs = []
            for a, b in tile[dim.axis].runs:
                low = 0 if a == 0 else min(max(_anchor(dim, a), 0), dim.extent)
                high = dim.extent if b == last else min(max(_anchor(dim, b), 0), dim.extent)
                runs.append((low, high))
            parts.append(Intervals.of(runs))
        else:
            parts.append(read)
    return Region(tuple(parts))


def cut_axes(rule: AxisRule, dims: Sequence[OperandDim], regions: Sequence[Region]) -> list[str]:
    """The axes, among those that can be cut, in dimensions along which regions differ."""
    found: dict[str, None] = {}
    for i, dim in enumerate(dims):
        if any(region.dims[i] != regions[0].dims[i] for region in regions):
            found.update(dict.fromkeys([dim.axis] if isinstance(dim, Window) else dim))
    return [axis for axis in found if axis in rule.cuttable]


def _extent(rule: AxisRule, dim: OperandDim) -> int:
    return dim.extent if isinstance(dim, Window) else prod(rule.extents[axis] for axis in dim)


def _anchor(window: Window, index: int) -> int:
    """Where the stretch begins that belongs to an index: as long as the stride, in the middle of its window."""
    return index * window.stride + window.start + (window.size - window.stride + 1) // 2


def _centred(rule: AxisRule, window: Window, part: Intervals) -> dict[str, Intervals] | None:
    """The indices of a window's axis that belong to a part of its operand."""
    extent = rule.extents[window.axis]
    beside = sum(isinstance(dim, Window) and dim.axis == window.axis for dims in rule.operands for dim in dims) > 1
    at = np.arange(extent) * window.stride + window.start + (window.size - window.stride + 1) // 2
    if beside and (at.min(initial=0) < 0 or at.max(initial=0) >= window.extent):
        return None  # this operand is only a piece of the axis
    held = np.zeros(window.extent, bool)
    for a, b in part.runs:
        held[a:b] = True
    inside = held[np.clip(at, 0, window.extent - 1)] if window.extent else held[:0]
    return {window.axis: _intervals(np.flatnonzero(inside))}


def _project(rule: AxisRule, dim: Dim, part: Intervals) -> dict[str, Intervals] | None:
    """An index set of a merged dimension as a product of index sets of its axes, or None where it is none."""
    if len(dim) == 1:
        return {dim[0]: part}
    indices = np.concatenate([np.arange(a, b) for a, b in part.runs]) if part else np.empty(0, int)
    found: dict[str, Intervals] = {}
    inner = 1
    for axis in reversed(dim):
        extent = rule.extents[axis]
        projected = _intervals(np.unique(indices // inner % extent))
        inner *= extent
        if projected != Intervals.full(extent):
            found[axis] = projected
    size = prod(len(found[axis]) if axis in found else rule.extents[axis] for axis in dim)
    return found if size == len(part) else None


def _intervals(indices: np.ndarray) -> Intervals:
    """The set of sorted, distinct indices."""
    if not len(indices):
        return Intervals()
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate(([0], breaks + 1))]
    stops = indices[np.concatenate((breaks, [len(indices) - 1]))] + 1
    return Intervals(tuple(zip(starts.tolist(), stops.tolist(), strict=True)))
