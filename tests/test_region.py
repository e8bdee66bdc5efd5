"""Interval sets and regions, compared with Python's own sets."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpart.ir.axes import AxisRule
from graphpart.ir.region import Intervals, Region

TOP = 12
sets = st.sets(st.integers(0, TOP - 1))
shapes = st.lists(st.integers(1, 5), max_size=3)


@st.composite
def regions(draw: st.DrawFn, count: int = 2) -> list[Region]:
    """Several regions of one tensor."""
    shape = draw(shapes)
    return [Region(tuple(Intervals.indices(draw(st.sets(st.integers(0, n - 1)))) for n in shape)) for _ in range(count)]


def elements(region: Region) -> set[tuple[int, ...]]:
    return set(product(*region.dims))


def assert_normal(found: Intervals) -> None:
    """Sorted, not empty, neither overlapping nor touching."""
    assert all(start < stop for start, stop in found.runs)
    assert all(a[1] < b[0] for a, b in pairwise(found.runs))


@given(sets)
def test_indices_keep_their_set(a: set[int]) -> None:
    found = Intervals.indices(a)
    assert_normal(found)
    assert list(found) == sorted(a)
    assert len(found) == len(a) and bool(found) == bool(a)


@given(st.lists(st.tuples(st.integers(0, TOP), st.integers(0, TOP))))
def test_any_runs_become_normal(runs: list[tuple[int, int]]) -> None:
    found = Intervals.of(runs)
    assert_normal(found)
    assert set(found) == {i for start, stop in runs for i in range(start, stop)}


@given(sets, sets)
def test_operations_are_those_of_sets(a: set[int], b: set[int]) -> None:
    left, right = Intervals.indices(a), Intervals.indices(b)
    for found, expected in ((left & right, a & b), (left | right, a | b), (left - right, a - b)):
        assert_normal(found)
        assert set(found) == expected
    assert (left <= right) == (a <= b)
    assert (left == right) == (a == b)


@given(sets, st.integers(1, 5), st.data())
def test_nest_is_the_product(outer: set[int], extent: int, data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(0, extent - 1)))
    found = Intervals.indices(outer).nest(Intervals.indices(inner), extent)
    assert set(found) == {o * extent + i for o in outer for i in inner}
    assert_normal(found)


@given(sets, sets)
def test_within_counts_positions(a: set[int], more: set[int]) -> None:
    base = sorted(a | more)
    found = Intervals.indices(a).within(Intervals.indices(base))
    assert_normal(found)
    assert list(found) == [base.index(i) for i in sorted(a)]


@given(sets, sets)
def test_within_refuses_what_is_outside(a: set[int], b: set[int]) -> None:
    if a <= b:
        return
    with pytest.raises(ValueError, match="not inside"):
        Intervals.indices(a).within(Intervals.indices(b))


@given(regions())
def test_regions_meet_join_and_part(pair: list[Region]) -> None:
    left, right = pair
    ours, theirs = elements(left), elements(right)
    assert elements(left & right) == ours & theirs
    assert elements(left | right) >= ours | theirs
    assert bool(left) == bool(ours) and left.num_elements == len(ours)
    if left:
        assert (left <= right) == (ours <= theirs)
    pieces = left.minus(right)
    assert len(pieces) <= max(1, len(left.dims))
    covered = [e for piece in pieces for e in elements(piece)]
    assert len(covered) == len(set(covered)), "the pieces overlap"
    assert set(covered) == ours - theirs


@given(regions())
def test_region_within_region(pair: list[Region]) -> None:
    small, base = pair[0] & pair[1], pair[1]
    order = sorted(elements(base))
    local = sorted(elements(Region.full(base.shape)))
    found = {order[local.index(e)] for e in elements(small.within(base))} if small else set()
    assert found == elements(small)


@given(st.sets(st.integers(0, 2), min_size=1), st.sets(st.integers(0, 3), min_size=1))
def test_a_merged_dimension_takes_both_tiles(outer: set[int], inner: set[int]) -> None:
    rule = AxisRule({"o": 3, "i": 4}, ((("o", "i"),),), ((("o",), ("i",)),))
    tile = {"o": Intervals.indices(outer), "i": Intervals.indices(inner)}
    assert set(rule.region(rule.operands[0], tile).dims[0]) == {4 * o + i for o in outer for i in inner}
    assert rule.region(rule.results[0], tile).shape == (len(outer), len(inner))
