"""A user's split of one operator, turned into a cut, or refused with the nearest legal choice."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from math import prod

from graphpart.errors import PlacementError
from graphpart.ir.axes import AxisRule, Window
from graphpart.ir.graph import Operator
from graphpart.ir.placement import check_tiles
from graphpart.ir.region import Intervals
from graphpart.strategies.by_hand.constraints import Split
from graphpart.strategies.cuts.inverse_rules import Cut, shares_of, tiles_on
from graphpart.strategies.cuts.mesh_cuts import product


def cuts_for(split: Split, matched: Sequence[Operator], devices: Sequence[int]) -> dict[str, Cut]:
    """The cut of each matched operator that has the axis.

    Args:
        split: the wish.
        matched: operators that its pattern matches.
        devices: the group, which holds all devices of the wish.

    Raises:
        PlacementError: if none of them can be cut so; it names the operator, the axis and the nearest legal choice.
    """
    found: dict[str, Cut] = {}
    for op in _last_of_each(matched) if any(isinstance(axis, int) for axis in split.axes) else matched:
        axes = [axis for wish in split.axes if (axis := _axis(wish, op)) is not None]
        if len(axes) == len(split.axes):
            cut = _along_several(split, op, axes, devices) if split.sizes else _along_one(split, op, axes[0], devices)
            check_tiles(op, tiles_on(cut, devices), max(devices) + 1)
            found[op.name] = cut
    if not found:
        raise PlacementError(_nothing_to_cut(split, matched))
    return found


def _along_one(split: Split, op: Operator, axis: str, devices: Sequence[int]) -> Cut:
    assert op.rule is not None
    parts = _parts(split, op, axis, op.rule.extents[axis])
    if len(parts) == 1:
        return tuple(() if device in parts else None for device in devices)
    return tuple(((axis, parts[device]),) if device in parts else None for device in devices)


def _along_several(split: Split, op: Operator, axes: Sequence[str], devices: Sequence[int]) -> Cut:
    """Each axis in equal parts, and a device where a part of each meets."""
    assert op.rule is not None
    cut: Cut = ((),)
    for axis, size in zip(axes, split.sizes, strict=True):
        runs = _even(split, op, axis, op.rule.extents[axis], [1] * size)
        cut = product(cut, tuple(((axis, run),) for run in runs) if size > 1 else ((),))
    of = dict(zip([int(device) for device, _ in split.parts], cut, strict=True))
    return tuple(of.get(device) for device in devices)


def describe_axes(op: Operator) -> str:
    """The axes along which an operator can be cut, with their extents and what they are."""
    if op.rule is None:
        return f"none ({op.note or 'it has no axis rule'})"
    return ", ".join(f"{axis!r} ({_meaning(op.rule, axis)})" for axis in op.rule.cuttable) or "none"


def _meaning(rule: AxisRule, axis: str) -> str:
    extent = rule.extents[axis]
    for i, dims in enumerate(rule.results):
        for d, dim in enumerate(dims):
            if axis in dim:
                of = f" of result {i}" if len(rule.results) > 1 else " of its result"
                return f"{extent} in dimension {d}{of}"
    for i, operand in enumerate(rule.operands):
        for d, names in enumerate(operand):
            if not isinstance(names, Window) and axis in names:
                return f"{extent} in dimension {d} of operand {i}, summed"
    return str(extent)


def _last_of_each(matched: Sequence[Operator]) -> list[Operator]:
    """The last operator of each module: the one that makes the module's result."""
    return list({op.module_path or op.name: op for op in matched}.values())


def _axis(wish: str | int, op: Operator) -> str | None:
    """The axis of an operator that a wish means, if it can be cut."""
    if op.rule is None:
        return None
    if isinstance(wish, str):
        return wish if wish in op.rule.cuttable else None
    dims = op.rule.results[0]
    if not -len(dims) <= wish < len(dims):
        return None
    return next((axis for axis in dims[wish] if axis in op.rule.cuttable), None)


def _parts(split: Split, op: Operator, axis: str, extent: int) -> dict[int, Intervals]:
    """Per device, its indices."""
    devices = [int(device) for device, _ in split.parts]
    shares = [share for _, share in split.parts]
    if isinstance(shares[0], tuple):
        return _explicit(split, op, axis, extent, dict(zip(devices, shares, strict=True)))
    found: dict[int, Intervals] = {}
    for device, run in zip(devices, _even(split, op, axis, extent, shares), strict=True):
        found[device] = found[device] | run if device in found else run
    return found


def _even(split: Split, op: Operator, axis: str, extent: int, shares: Sequence[float]) -> Sequence[Intervals]:
    """Indices in proportion to shares."""
    runs = shares_of(extent, shares)
    if runs is None:
        raise PlacementError(
            f"pattern {split.pattern!r}: axis {axis!r} of operator {op} has {extent} indices, too few for "
            f"{len(shares)} parts; give at most {extent} devices. It can be cut along {describe_axes(op)}"
        )
    return runs


def _explicit(
    split: Split, op: Operator, axis: str, extent: int, given: dict[int, tuple[int, ...]]
) -> dict[int, Intervals]:
    where = f"pattern {split.pattern!r}: axis {axis!r} of operator {op}"
    taken: dict[int, int] = {}
    for device, indices in given.items():
        for index in indices:
            if not isinstance(index, int) or not 0 <= index < extent:
                raise PlacementError(f"{where} has no index {index!r}; give indices from 0 to {extent - 1}")
            if taken.setdefault(index, device) != device:
                raise PlacementError(
                    f"{where}: index {index} goes to device {taken[index]} and to {device}; give it once"
                )
    left = Intervals.full(extent) - Intervals.indices(taken)
    if left:
        raise PlacementError(f"{where}: nobody gets {left} of its {extent} indices; give them to a device")
    return {device: Intervals.indices(indices) for device, indices in given.items() if indices}


def _nothing_to_cut(split: Split, matched: Sequence[Operator]) -> str:
    axis = next((axis for axis in split.axes if all(_axis(axis, op) is None for op in matched)), None)
    if axis is None:
        axes = " and ".join(repr(axis) for axis in split.axes)
        op = max(matched, key=_size)
        return f"pattern {split.pattern!r}: no operator has all of {axes}. {op} can be cut along {describe_axes(op)}"
    holders = [op for op in matched if op.rule is not None and isinstance(axis, str) and axis in op.rule.extents]
    if holders:
        op = holders[0]
        assert op.rule is not None
        why = "it has extent 1" if op.rule.extents[str(axis)] == 1 else "every index of it is needed at once"
        text = f"operator {op} cannot be cut along {axis!r}: {why}"
    else:
        op = max(matched, key=_size)
        what = f"axis {axis!r}" if isinstance(axis, str) else f"dimension {axis} that can be cut"
        text = f"operator {op} has no {what}"
    names = op.rule.cuttable if op.rule is not None else ()
    near = get_close_matches(str(axis), names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}" if near and near[0] != axis else ""
    return f"pattern {split.pattern!r}: {text}{hint}. It can be cut along {describe_axes(op)}"


def _size(op: Operator) -> tuple[float, int]:
    """Products first, then large iteration spaces: what a user most likely means."""
    return (op.flops_forward, prod(op.rule.extents.values()) if op.rule is not None else 0)
