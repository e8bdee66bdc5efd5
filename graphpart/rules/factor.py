"""Common factors of two shapes with the same number of elements: the axes of a reshape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from graphpart.errors import GraphError
from graphpart.rules.call import Dims


@dataclass(frozen=True, slots=True)
class Factors:
    """Two shapes as products of axes.

    Attributes:
        extents: extent of every axis.
        source: the first shape's dimensions.
        target: the second's.
        whole: axes that only one side has, because the shapes share no factor there.
    """

    extents: Mapping[str, int]
    source: Dims
    target: Dims
    whole: frozenset[str]


class _Side:
    """One shape while factors are taken off: per dimension, what is left and the axes found on either end."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.left = list(shape)
        self.outer: list[list[str]] = [[] for _ in shape]
        self.inner: list[list[str]] = [[] for _ in shape]

    def dims(self) -> Dims:
        return tuple((*outer, *reversed(inner)) for outer, inner in zip(self.outer, self.inner, strict=True))


@lru_cache(maxsize=4096)
def factor(source: tuple[int, ...], target: tuple[int, ...]) -> Factors:
    """Factor two shapes of equally many elements, in row-major order, greedily from both ends.

    ``(6, 4)`` and ``(3, 8)`` give ``(d0 d1) d2`` and ``d0 (d1 d2)`` with extents 3, 2, 4. Where neither end
    shares a factor, as between ``(2, 3)`` and ``(3, 2)``, each side gets whole axes of its own.

    Args:
        source: the shape before.
        target: the shape after.

    Raises:
        GraphError: if the numbers of elements differ.
    """
    if prod(source) != prod(target):
        raise GraphError(f"{source} and {target} do not have equally many elements")
    before, after = _Side(source), _Side(target)
    extents: dict[str, int] = {}
    whole: list[str] = []
    if prod(source):
        for left, right in _groups(source, target):
            _take(before, after, left, right, extents, outermost=True)
            _take(before, after, left[::-1], right[::-1], extents, outermost=False)
    for side in (before, after):
        for dim, extent in enumerate(side.left):
            if extent != 1:
                axis = f"d{len(extents)}"
                extents[axis] = extent
                whole.append(axis)
                side.outer[dim].append(axis)
    return Factors(extents, before.dims(), after.dims(), frozenset(whole))


def _groups(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of dimensions with equal products; dimensions of extent 1 are left out."""
    found: list[tuple[list[int], list[int]]] = []
    left, right = ([i for i, n in enumerate(s) if n != 1] for s in (source, target))
    while left or right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while (a := prod(source[i] for i in ours)) != (b := prod(target[i] for i in theirs)):
            (ours if a < b else theirs).append((left if a < b else right).pop(0))
        found.append((ours, theirs))
    return found


def _take(
    before: _Side, after: _Side, left: list[int], right: list[int], extents: dict[str, int], *, outermost: bool
) -> None:
    """Take common factors off one end of a group until the dimensions that meet there share none."""
    left = [i for i in left if before.left[i] != 1]
    right = [i for i in right if after.left[i] != 1]
    while left and right:
        common = gcd(before.left[left[0]], after.left[right[0]])
        if common == 1:
            return
        axis = f"d{len(extents)}"
        extents[axis] = common
        for side, queue in ((before, left), (after, right)):
            (side.outer if outermost else side.inner)[queue[0]].append(axis)
            side.left[queue[0]] //= common
            if side.left[queue[0]] == 1:
                queue.pop(0)
