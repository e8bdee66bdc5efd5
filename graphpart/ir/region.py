"""Parts of index space: sets of runs on one axis, and their products over the axes of a tensor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from graphpart.errors import PlacementError

Run = tuple[int, int]

MAX_RUNS = 2_000_000
"""Runs of one set of indices: each takes memory, however short its description is."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """A finite set of non-negative integers, kept as sorted, disjoint, non-touching half-open runs.

    Build one with :meth:`full`, :meth:`span` or :meth:`of`; the constructor trusts its argument to be
    in normal form.
    """

    runs: tuple[Run, ...] = ()

    @classmethod
    def full(cls, extent: int) -> Intervals:
        """All of ``0 .. extent - 1``."""
        return _full(extent)

    @classmethod
    def span(cls, start: int, stop: int) -> Intervals:
        """The half-open run ``[start, stop)``; empty where ``stop <= start``."""
        return cls(((start, stop),) if stop > start else ())

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Intervals:
        """Normal form of any runs: sorted, overlaps and neighbours merged, empty runs dropped."""
        merged: list[Run] = []
        for start, stop in sorted(runs):
            if stop <= start:
                continue
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(tuple(merged))

    @classmethod
    def indices(cls, indices: Iterable[int]) -> Intervals:
        """The set of single indices."""
        return cls.of((i, i + 1) for i in indices)

    def __len__(self) -> int:
        return sum([stop - start for start, stop in self.runs])

    def __bool__(self) -> bool:
        return bool(self.runs)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.runs:
            yield from range(start, stop)

    def __contains__(self, index: int) -> bool:
        at = bisect_right(self.runs, (index + 1,)) - 1  # the last run that begins at the index or before
        return at >= 0 and index < self.runs[at][1]

    def __and__(self, other: Intervals) -> Intervals:
        if self.runs == other.runs:  # what most dimensions of two parts of a value are
            return self
        found: list[Run] = []
        i = j = 0
        while i < len(self.runs) and j < len(other.runs):
            start = max(self.runs[i][0], other.runs[j][0])
            stop = min(self.runs[i][1], other.runs[j][1])
            if start < stop:
                found.append((start, stop))
            if self.runs[i][1] < other.runs[j][1]:
                i += 1
            else:
                j += 1
        return Intervals(tuple(found))

    def __or__(self, other: Intervals) -> Intervals:
        return self if self.runs == other.runs else Intervals.of(self.runs + other.runs)

    def __sub__(self, other: Intervals) -> Intervals:
        if self.runs == other.runs:
            return _NONE
        left: list[Run] = []
        for start, stop in self.runs:
            for low, high in other.runs:
                if high <= start:
                    continue
                if low >= stop:
                    break
                if start < low:
                    left.append((start, low))
                start = max(start, high)
            if start < stop:
                left.append((start, stop))
        return Intervals(tuple(left))

    def __le__(self, other: Intervals) -> bool:
        return self.runs == other.runs or (self & other).runs == self.runs

    def nest(self, inner: Intervals, inner_extent: int) -> Intervals:
        """Indices of a merged axis: ``{o * inner_extent + i}`` for ``o`` in self and ``i`` in ``inner``."""
        if self.runs == _ONE:
            return inner
        if inner_extent and inner.runs == ((0, inner_extent),):
            return Intervals(tuple((a * inner_extent, b * inner_extent) for a, b in self.runs))
        num_runs = sum(stop - start for start, stop in self.runs) * len(inner.runs)
        if num_runs > MAX_RUNS:
            raise PlacementError(
                f"a cut inside of a merged axis makes {num_runs} separate runs of indices; {MAX_RUNS} are the most. "
                "Cut along the outermost of the axes that are merged"
            )
        return Intervals.of((o * inner_extent + a, o * inner_extent + b) for o in self for a, b in inner.runs)

    def within(self, base: Intervals) -> Intervals:
        """Positions of this set's indices when ``base``'s indices are numbered from 0 up.

        Raises:
            ValueError: if the set is not a subset of ``base``.
        """
        starts = [start for start, _ in base.runs]
        offsets, total = [], 0
        for start, stop in base.runs:
            offsets.append(total - start)
            total += stop - start
        found: list[Run] = []
        for start, stop in self.runs:
            at = bisect_right(starts, start) - 1
            if at < 0 or stop > base.runs[at][1]:
                raise ValueError(f"{self} is not inside {base}")
            found.append((start + offsets[at], stop + offsets[at]))
        return Intervals.of(found)

    def at(self, positions: Intervals) -> Intervals:
        """The indices at some positions, when this set's indices are numbered from 0 up: what :meth:`within` undoes."""
        found: list[Run] = []
        first = 0
        for start, stop in self.runs:
            here = positions & Intervals.span(first, first + stop - start)
            found += [(a - first + start, b - first + start) for a, b in here.runs]
            first += stop - start
        return Intervals(tuple(found))

    def listed(self) -> tuple[int, ...]:
        """Each index, where an order of single ones is needed.

        Raises:
            PlacementError: if they are too many to be listed.
        """
        if len(self) > MAX_RUNS:
            raise PlacementError(
                f"tiles interleave along a dimension of {len(self)} indices, which have to be put in order one by one; "
                f"{MAX_RUNS} are the most. Give each tile one run of indices"
            )
        return tuple(self)

    def __str__(self) -> str:
        return ",".join(f"{a}" if b == a + 1 else f"{a}:{b}" for a, b in self.runs) or "∅"


_ONE = ((0, 1),)
_NONE = Intervals()


@lru_cache(maxsize=4096)
def _full(extent: int) -> Intervals:
    return Intervals.span(0, extent)


@dataclass(frozen=True, slots=True)
class Region:
    """A part of one tensor: the product of one index set per dimension.

    Attributes:
        dims: one :class:`Intervals` per dimension; a scalar has none and is never empty.
    """

    dims: tuple[Intervals, ...]
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __hash__(self) -> int:
        if not self._hash:  # look-ups by region are many
            object.__setattr__(self, "_hash", hash(self.dims))
        return self._hash

    @classmethod
    def full(cls, shape: Iterable[int]) -> Region:
        """The whole of a tensor of this shape."""
        return cls(tuple(Intervals.full(n) for n in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds just this region."""
        return tuple([len(d) for d in self.dims])

    @property
    def num_elements(self) -> int:
        """Number of elements in the region."""
        return prod([len(dim) for dim in self.dims])

    def __bool__(self) -> bool:
        return all(self.dims)

    def __and__(self, other: Region) -> Region:
        return Region(tuple([a & b for a, b in zip(self.dims, other.dims, strict=True)]))

    def __or__(self, other: Region) -> Region:
        """The smallest product that holds both (equal to their union where that is a product)."""
        if not self:
            return other
        return Region(tuple([a | b for a, b in zip(self.dims, other.dims, strict=True)])) if other else self

    def __le__(self, other: Region) -> bool:
        return all(a <= b for a, b in zip(self.dims, other.dims, strict=True))

    def within(self, base: Region) -> Region:
        """This region in the numbering of the tensor that holds ``base``."""
        return Region(tuple(a.within(b) for a, b in zip(self.dims, base.dims, strict=True)))

    def with_dim(self, dim: int, indices: Intervals) -> Region:
        """This region with other indices along one dimension."""
        return Region((*self.dims[:dim], indices, *self.dims[dim + 1 :]))

    def minus(self, other: Region) -> tuple[Region, ...]:
        """What is left after taking ``other`` away, as disjoint products (at most one per dimension)."""
        common = self & other
        if not common:
            return (self,) if self else ()
        left = []
        for i, dim in enumerate(self.dims):
            rest = dim - common.dims[i]
            if rest:
                left.append(Region((*common.dims[:i], rest, *self.dims[i + 1 :])))
        return tuple(left)

    def __str__(self) -> str:
        return "[" + ", ".join(map(str, self.dims)) + "]"
