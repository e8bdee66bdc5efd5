"""The axis rule of an operator: which named axes its operands and results share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from graphpart.ir.region import Intervals, Region

Dim = tuple[str, ...]
"""One dimension as a product of axes, outermost first. ``()`` is a dimension of extent 1 (broadcast)."""


@dataclass(frozen=True)
class AxisRule:
    """How a tile of an operator's iteration space maps to regions of its operands and results.

    ``linear`` reads ``b s k, n k -> b s n`` with ``sums={"k"}``: tiles of ``k`` give partial results that
    add up; every other axis cuts the result.

    Attributes:
        extents: extent of every axis.
        operands: per tensor operand (order of ``Operator.operands``), its dimensions.
        results: per result, its dimensions.
        sums: axes absent from the results whose partial results add up.
        whole: axes that cannot be cut (a softmax's own axis, a training BatchNorm's batch).
        linear: groups of operand positions in which the operator is jointly linear, the others fixed:
            ``((0, 1),)`` for an addition, ``((0,), (1,))`` for a product.
        shape_argument: position of the positional argument that holds the result's shape and must
            follow the tile (``view``, ``expand``, ``zeros``), if there is one.
    """

    extents: Mapping[str, int]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sums: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    shape_argument: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "extents", MappingProxyType(dict(self.extents)))

    def __hash__(self) -> int:
        return hash((tuple(self.extents.items()), self.operands, self.results, self.sums, self.whole))

    def can_cut(self, axis: str) -> bool:
        """Whether tiles of ``axis`` give exact results (as parts, or as partial sums)."""
        if axis in self.whole:
            return False
        return axis in self.sums or all(any(axis in d for d in dims) for dims in self.results)

    def region(self, dims: tuple[Dim, ...], tile: Mapping[str, Intervals]) -> Region:
        """The region of a tensor with these dimensions that a tile touches.

        Args:
            dims: the tensor's dimensions, from ``operands`` or ``results``.
            tile: index set per cut axis; axes not named are whole.
        """
        return Region(tuple(self._dim(dim, tile) for dim in dims))

    def _dim(self, dim: Dim, tile: Mapping[str, Intervals]) -> Intervals:
        if not any(axis in tile for axis in dim):
            return Intervals.full(prod([self.extents[axis] for axis in dim]))
        found = Intervals.full(1)
        for axis in dim:
            extent = self.extents[axis]
            found = found.nest(tile[axis] if axis in tile else Intervals.full(extent), extent)
        return found

    def shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        """Whole shape of a tensor with these dimensions."""
        return tuple(prod(self.extents[a] for a in dim) for dim in dims)

    def __str__(self) -> str:
        def side(tensors: tuple[tuple[Dim, ...], ...]) -> str:
            return ", ".join(
                " ".join(d[0] if len(d) == 1 else "(" + " ".join(d) + ")" if d else "1" for d in dims)
                for dims in tensors
            )

        return f"{side(self.operands)} -> {side(self.results)}"
