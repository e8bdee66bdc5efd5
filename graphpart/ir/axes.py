"""The axis rule of an operator: which named axes its operands and results share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType

from graphpart.ir.region import Intervals, Region


@dataclass(frozen=True, slots=True)
class Window:
    """An operand's dimension that an axis of the result looks at through a moving window.

    Index ``i`` of the axis reads ``[i * stride + start, i * stride + start + size)``, as far as that lies inside the
    dimension: a convolution's halo (``start`` is minus the padding), a slice (``size`` 1), one operand of a
    concatenation (``start`` is minus its offset).

    Attributes:
        axis: the result's axis.
        extent: extent of the operand's dimension.
        stride: how far the window moves from one index to the next.
        start: where the window of index 0 begins; may be negative.
        size: how many indices it spans.
    """

    axis: str
    extent: int
    stride: int = 1
    start: int = 0
    size: int = 1

    def unclipped(self, start: int, stop: int) -> tuple[int, int]:
        """What the run ``[start, stop)`` of the axis reads, also where that lies outside the dimension."""
        return start * self.stride + self.start, (stop - 1) * self.stride + self.start + self.size

    def reads(self, indices: Intervals) -> Intervals:
        """What a set of the axis's indices reads: per run, all from the first window to the last."""
        clipped = []
        for run in indices.runs:
            low, high = self.unclipped(*run)
            clipped.append((max(low, 0), min(high, self.extent)))
        return Intervals.of(clipped)

    @property
    def is_shift(self) -> bool:
        """Whether it only shifts indices, so that any set of them can be taken alone."""
        return self.stride == 1 and self.size == 1

    def __str__(self) -> str:
        scale = "" if self.stride == 1 else f"{self.stride}"
        offset = f"{self.start:+d}" if self.start else ""
        return f"{scale}{self.axis}{offset}" + (f"..{self.size}" if self.size > 1 else "")


Dim = tuple[str, ...]
"""One dimension as a product of axes, outermost first. ``()`` is a dimension of extent 1 (broadcast)."""

OperandDim = Dim | Window
"""One dimension of an operand."""

_MOST_REGIONS = 1 << 14  # that a rule remembers


@dataclass(frozen=True)
class AxisRule:
    """How a tile of an operator's iteration space maps to regions of its operands and results.

    ``linear`` reads ``b s k, n k -> b s n`` with ``sums={"k"}``: tiles of ``k`` give partial results that
    add up; every other axis cuts the result.

    Attributes:
        extents: extent of every axis.
        operands: per tensor operand (order of ``Operator.operands``), its dimensions.
        results: per result, its dimensions; these have no windows.
        sums: axes absent from the results whose partial results add up.
        whole: axes that cannot be cut (a softmax's own axis), or only by the help of ``rewritten``.
        linear: groups of operand positions in which the operator is jointly linear, the others fixed:
            ``((0, 1),)`` for an addition, ``((0,), (1,))`` for a product.
        shape_argument: position of the positional argument that holds the result's shape and must
            follow the tile (``view``, ``expand``, ``zeros``), if there is one.
        rewritten: axes that a placement may cut because lowering then rewrites the operator into several that can
            be cut there (the samples of a mean, the contracted axis of a product with a bias, the classes of a
            cross-entropy).
    """

    extents: Mapping[str, int]
    operands: tuple[tuple[OperandDim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    sums: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    shape_argument: int | None = None
    rewritten: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "extents", MappingProxyType(dict(self.extents)))
        for name in ("sums", "whole", "rewritten"):  # set algebra with keys of mappings gives sets that can change
            object.__setattr__(self, name, frozenset(getattr(self, name)))

    def __hash__(self) -> int:
        return hash((tuple(self.extents.items()), self.operands, self.results, self.sums, self.whole))

    def can_cut(self, axis: str) -> bool:
        """Whether tiles of ``axis`` give exact results (as parts, or as partial sums) as the operator stands."""
        if axis in self.whole:
            return False
        return axis in self.sums or all(any(axis in d for d in dims) for dims in self.results)

    @property
    def cuttable(self) -> tuple[str, ...]:
        """Axes longer than 1 that a placement may cut, in the order of ``extents``."""
        return tuple(a for a, n in self.extents.items() if n > 1 and (a in self.rewritten or self.can_cut(a)))

    def needs_runs(self, axis: str) -> bool:
        """Whether tiles of an axis have to be single runs, because windows along it overlap or leave gaps."""
        return any(
            isinstance(dim, Window) and dim.axis == axis and not dim.is_shift for dims in self.operands for dim in dims
        )

    def region(self, dims: tuple[OperandDim, ...], tile: Mapping[str, Intervals]) -> Region:
        """The region of a tensor with these dimensions that a tile touches.

        Args:
            dims: the tensor's dimensions, from ``operands`` or ``results``.
            tile: index set per cut axis; axes not named are whole.
        """
        if dims not in self._axes:
            self._axes[dims] = _axes_of(dims)
        there = self._axes[dims]
        key = (dims, tuple([item for item in tile.items() if item[0] in there]))
        found = self._regions.get(key)
        if found is None:
            if len(self._regions) >= _MOST_REGIONS:
                self._regions.clear()
            found = self._regions[key] = Region(tuple([self._dim(dim, tile) for dim in dims]))
        return found

    @cached_property
    def _regions(self) -> dict[object, Region]:
        """What was asked for, since operators of repeated blocks, which share their rule, and replicas ask again."""
        return {}

    @cached_property
    def _axes(self) -> dict[tuple[OperandDim, ...], frozenset[str]]:
        """The axes of tensors that were asked for."""
        return {}

    def _dim(self, dim: OperandDim, tile: Mapping[str, Intervals]) -> Intervals:
        if isinstance(dim, Window):
            return dim.reads(tile[dim.axis]) if dim.axis in tile else Intervals.full(dim.extent)
        if not any(axis in tile for axis in dim):
            return Intervals.full(prod([self.extents[axis] for axis in dim]))
        found = Intervals.full(1)
        for axis in dim:
            extent = self.extents[axis]
            found = found.nest(tile[axis] if axis in tile else Intervals.full(extent), extent)
        return found

    def shape(self, dims: tuple[OperandDim, ...]) -> tuple[int, ...]:
        """Whole shape of a tensor with these dimensions."""
        return tuple(d.extent if isinstance(d, Window) else prod(self.extents[a] for a in d) for d in dims)

    def __str__(self) -> str:
        def one(dim: OperandDim) -> str:
            if isinstance(dim, Window):
                return f"[{dim}]"
            return dim[0] if len(dim) == 1 else "(" + " ".join(dim) + ")" if dim else "1"

        def side(tensors: Sequence[tuple[OperandDim, ...]]) -> str:
            return ", ".join(" ".join(map(one, dims)) for dims in tensors)

        return f"{side(self.operands)} -> {side(self.results)}"


def _axes_of(dims: tuple[OperandDim, ...]) -> frozenset[str]:
    """The axes that a tensor of these dimensions depends on."""
    return frozenset(axis for dim in dims for axis in ((dim.axis,) if isinstance(dim, Window) else dim))
