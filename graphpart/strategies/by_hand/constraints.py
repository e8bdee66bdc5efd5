"""Constraints as values: what a user decides by hand about the parts of a model that a pattern names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphpart.errors import ArgumentError
from graphpart.ir.cluster import Cluster

DeviceName = int | str
"""A device by its index in the cluster or by its name."""

Shares = tuple[tuple[DeviceName, Any], ...]
"""Per device, its share: a number, or the indices that it takes."""


@dataclass(frozen=True)
class Pin:
    """Operators that run whole on one device.

    Attributes:
        pattern: over module paths and operator names; empty until it stands in a mapping.
        device: where.
    """

    pattern: str
    device: DeviceName

    def __str__(self) -> str:
        return f"pin({self.pattern!r}, {self.device!r})"


@dataclass(frozen=True)
class Split:
    """Operators that are cut along an axis.

    Attributes:
        pattern: over module paths and operator names; empty until it stands in a mapping.
        axis: an axis of the operators' rules by name, or a dimension of what the module makes by number.
        parts: per device, a share or the indices that it takes.
    """

    pattern: str
    axis: str | int
    parts: Shares

    def __str__(self) -> str:
        return f"split({self.pattern!r}, {self.axis!r}, {[device for device, _ in self.parts]})"


@dataclass(frozen=True)
class KeepWhole:
    """Operators that are not cut, nor run on several devices.

    Attributes:
        pattern: over module paths and operator names; empty until it stands in a mapping.
    """

    pattern: str

    def __str__(self) -> str:
        return f"keep_whole({self.pattern!r})"


@dataclass(frozen=True)
class Colocate:
    """Operators that run whole on one and the same device.

    Attributes:
        patterns: over module paths and operator names.
    """

    patterns: tuple[str, ...]


Constraint = Pin | Split | KeepWhole | Colocate


def pin(*where: Any) -> Pin:
    """Run operators whole on one device.

    ``pin("encoder.*", 0)`` in a list, ``{"encoder.*": pin(0)}`` in a mapping, or just ``{"encoder.*": 0}``.

    Args:
        where: a pattern, unless it stands in a mapping, and a device by index or name.
    """
    pattern, (device,) = _pattern(where, 1, "pin('encoder.*', 0)")
    return Pin(pattern, device)


def split(*how: Any) -> Split:
    """Cut operators along an axis.

    ``split("mlp.up", "n", [0, 1])`` in a list, or ``{"mlp.up": split("n", [0, 1])}`` in a mapping. The devices may be
    a list for equal parts, ``{0: 3, 1: 1}`` for parts in these proportions, or ``{0: [0, 1, 2, 7], 1: range(3, 7)}``
    for the very indices. Of the operators that a pattern matches, those that have the axis are cut; the others follow.

    Args:
        how: a pattern, unless it stands in a mapping; an axis by its name in the operator's rule, or a dimension of
            the module's result by number; the devices.
    """
    pattern, (axis, devices) = _pattern(how, 2, "split('mlp.up', 'n', [0, 1])")
    if isinstance(axis, bool) or not isinstance(axis, (str, int)):
        raise ArgumentError(f"split(): the axis is {axis!r}; give the name of an axis or the number of a dimension")
    if isinstance(devices, Mapping):
        parts = tuple((device, _part(device, share)) for device, share in devices.items())
    elif isinstance(devices, Sequence) and not isinstance(devices, str):
        parts = tuple((device, 1) for device in devices)
    else:
        raise ArgumentError(f"split(): the devices are {devices!r}; give a list, or a mapping from device to share")
    if not parts:
        raise ArgumentError("split(): there are no devices; give at least one")
    if len({isinstance(part, tuple) for _, part in parts}) > 1:
        raise ArgumentError("split(): some devices have a share and some have indices; give all the same")
    return Split(pattern, axis, parts)


def keep_whole(pattern: str = "") -> KeepWhole:
    """Neither cut operators nor run them on several devices.

    ``keep_whole("head")`` in a list, or ``{"head": keep_whole()}`` in a mapping.
    """
    return KeepWhole(_text(pattern))


def colocate(*patterns: str) -> Colocate:
    """Run operators whole on one and the same device: ``colocate("embed", "head")`` in a list."""
    if not patterns:
        raise ArgumentError("colocate() needs patterns, as in colocate('embed', 'head')")
    return Colocate(tuple(map(_text, patterns)))


def constraints_of(strategy: Any, cluster: Cluster) -> tuple[Constraint, ...] | None:
    """What a user gave as a strategy, as constraints with device indices; None where it is something else.

    Args:
        strategy: a mapping from patterns to devices or constraints, a constraint, or a list of constraints.
        cluster: the devices, to look up names.

    Raises:
        ArgumentError: if a part of it is no constraint, or a device doesn't exist.
    """
    if isinstance(strategy, Constraint):
        strategy = [strategy]
    if isinstance(strategy, Mapping):
        found = [_named(pattern, wish) for pattern, wish in strategy.items()]
    elif isinstance(strategy, (list, tuple)):
        found = [_own_pattern(wish) for wish in strategy]
    else:
        return None
    index = {device.name: i for i, device in enumerate(cluster.devices)}
    return tuple(_with_indices(constraint, index) for constraint in found)


def _pattern(given: tuple[Any, ...], num_others: int, example: str) -> tuple[str, tuple[Any, ...]]:
    if len(given) == num_others:
        return "", given
    if len(given) == num_others + 1 and isinstance(given[0], str):
        return given[0], given[1:]
    raise ArgumentError(f"{given!r} is not understood; write {example}")


def _text(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ArgumentError(f"{pattern!r} is no pattern; give the text of a module path, such as 'encoder.*'")
    return pattern


def _part(device: DeviceName, share: Any) -> Any:
    if isinstance(share, bool) or not isinstance(share, (int, float, Iterable)) or isinstance(share, str):
        raise ArgumentError(f"split(): device {device!r} gets {share!r}; give a share such as 3, or a list of indices")
    if isinstance(share, (int, float)):
        if not 0 < share < float("inf"):
            raise ArgumentError(f"split(): device {device!r} gets a share of {share!r}; give a number above 0")
        return share
    return tuple(share)


def _named(pattern: Any, wish: Any) -> Constraint:
    pattern = _text(pattern)
    if isinstance(wish, Colocate):
        raise ArgumentError(f"pattern {pattern!r}: colocate() names its own patterns; give it in a list of constraints")
    if isinstance(wish, (Pin, Split, KeepWhole)):
        if wish.pattern:
            raise ArgumentError(f"pattern {pattern!r}: the constraint names {wish.pattern!r} as well; leave out one")
        return replace(wish, pattern=pattern)
    return Pin(pattern, wish)


def _own_pattern(wish: Any) -> Constraint:
    if not isinstance(wish, Constraint):
        raise ArgumentError(f"{wish!r} is no constraint; give gp.pin, gp.split, gp.keep_whole or gp.colocate")
    if not isinstance(wish, Colocate) and not wish.pattern:
        raise ArgumentError(f"{wish!r} has no pattern; name what it is about first, as in gp.pin('encoder.*', 0)")
    return wish


def _with_indices(constraint: Constraint, index: Mapping[str, int]) -> Constraint:
    if isinstance(constraint, Pin):
        return replace(constraint, device=_index(constraint.pattern, constraint.device, index))
    if isinstance(constraint, Split):
        parts = tuple((_index(constraint.pattern, device, index), part) for device, part in constraint.parts)
        return replace(constraint, parts=parts)
    return constraint


def _index(pattern: str, device: Any, index: Mapping[str, int]) -> int:
    device = index.get(device, device) if isinstance(device, str) else device
    if isinstance(device, bool) or not isinstance(device, int) or not 0 <= device < len(index):
        known = f"0 to {len(index) - 1}, or {', '.join(map(repr, index))}" if len(index) > 1 else "0"
        raise ArgumentError(f"pattern {pattern!r}: {device!r} is no device index; there are {len(index)}: {known}")
    return device
