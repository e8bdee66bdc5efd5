"""Constraints as values: what a user decides by hand about the parts of a model that a pattern names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
    """Operators that are cut along an axis, or along several at once.

    Attributes:
        pattern: over module paths and operator names; empty until it stands in a mapping.
        axes: each an axis of the operators' rules by name, or a dimension of what the module makes by number.
        parts: per device, a share or the indices that it takes; of several axes, a share of 1 for each device of the
            mesh, its last axis first to vary.
        sizes: into how many parts each axis is cut; empty for a single one.
    """

    pattern: str
    axes: tuple[str | int, ...]
    parts: Shares
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        devices: Any = np.array([device for device, _ in self.parts], dtype=object)
        if not self.sizes:
            return f"split({self.pattern!r}, {self.axes[0]!r}, {devices.tolist()})"
        return f"split({self.pattern!r}, {self.axes!r}, {devices.reshape(self.sizes).tolist()})"


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
    """Cut operators along an axis, or along several at once.

    ``split("mlp.up", "n", [0, 1])`` in a list, or ``{"mlp.up": split("n", [0, 1])}`` in a mapping. The devices may be
    a list for equal parts, ``{0: 3, 1: 1}`` for parts in these proportions, or ``{0: [0, 1, 2, 7], 1: range(3, 7)}``
    for the very indices. Several axes take a mesh of devices, a list in lists, and cut each axis into equal parts:
    ``split("mlp.up", (0, "n"), [[0, 1], [2, 3]])`` has devices 0 and 1 share the first half of dimension 0. Of the
    operators that a pattern matches, those that have all of the axes are cut; the others follow.

    Args:
        how: a pattern, unless it stands in a mapping; an axis by its name in the operator's rule, or a dimension of
            the module's result by number, or a tuple of these; the devices.

    Raises:
        ArgumentError: if that is no split.
    """
    pattern, (axis, devices) = _pattern(how, 2, "split('mlp.up', 'n', [0, 1])")
    if isinstance(axis, (tuple, list)):
        return _split_of_several(pattern, tuple(axis), devices)
    _check_axis(axis)
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
    return Split(pattern, (axis,), parts)


def _split_of_several(pattern: str, axes: tuple[Any, ...], devices: Any) -> Split:
    for axis in axes:
        _check_axis(axis)
    mesh = np.array(devices, dtype=object)
    listed = mesh.ravel().tolist()
    if len(set(axes)) < len(axes) or not axes:
        raise ArgumentError(f"split(): the axes are {axes!r}; give each once, and at least one")
    if mesh.ndim != len(axes) or not listed or not all(isinstance(device, (int, str)) for device in listed):
        raise ArgumentError(
            f"split(): the devices are {devices!r}, for {len(axes)} axes; give lists in lists, a level for each, as in "
            "split('mlp.up', (0, 'n'), [[0, 1], [2, 3]])"
        )
    if len(set(listed)) < len(listed):
        twice = next(device for device in listed if listed.count(device) > 1)
        raise ArgumentError(f"split(): the mesh {devices!r} has device {twice!r} twice; give each device once")
    return Split(pattern, axes, tuple((device, 1) for device in listed), mesh.shape)


def _check_axis(axis: Any) -> None:
    if isinstance(axis, bool) or not isinstance(axis, (str, int)):
        raise ArgumentError(f"split(): the axis is {axis!r}; give the name of an axis or the number of a dimension")


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
