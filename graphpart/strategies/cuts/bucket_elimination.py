"""The exact choice: least sum of tables over variables with few values each, by eliminating one variable at a time.

Bucket elimination (R. Dechter, "Bucket elimination: a unifying framework for reasoning", Artificial Intelligence 113,
1999). The graphs of layered models have a small treewidth, so the tables stay small. Where one would not, it is
bounded from below by parts (mini-buckets, R. Dechter and I. Rish, JACM 50(2), 2003), and the gap is reported.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

MAX_CELLS = 2_000_000
"""Cells of the largest table that is made."""

MAX_SWEEPS = 100
"""Passes over all variables that improve a choice which is not proved best; each costs less than the one before."""


@dataclass(frozen=True)
class Factor:
    """A cost for every combination of values of some variables.

    Attributes:
        scope: the variables, ascending.
        table: one axis per variable of the scope.
    """

    scope: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Choice:
    """A value per variable.

    Attributes:
        values: the values.
        cost: their cost.
        bound: no choice costs less; equal to the cost where the choice is proved best.
    """

    values: tuple[int, ...]
    cost: float
    bound: float


def choose(sizes: Sequence[int], factors: Sequence[Factor], *, max_cells: int = MAX_CELLS) -> Choice:
    """Find the values with the least sum of all factors.

    Args:
        sizes: number of values per variable.
        factors: costs; infinite where a combination is not allowed.
        max_cells: cells of the largest table to make.
    """
    of: list[dict[int, Factor]] = [{} for _ in sizes]
    serial = 0
    bound = 0.0
    for factor in factors:
        serial += 1
        for variable in factor.scope:
            of[variable][serial] = factor
        if not factor.scope:
            bound += float(factor.table)
    buckets: list[tuple[int, list[Factor]]] = []
    gone = [False] * len(sizes)

    def cells(variable: int) -> int:
        return prod(sizes[other] for other in _union(of[variable].values()))

    heap = [(cells(v), v) for v in range(len(sizes))]
    heapq.heapify(heap)
    while heap:
        size, variable = heapq.heappop(heap)
        if gone[variable]:
            continue
        now = cells(variable)
        if now != size:
            heapq.heappush(heap, (now, variable))
            continue
        gone[variable] = True
        bucket = list(of[variable].values())
        buckets.append((variable, bucket))
        touched: set[int] = set()
        for key, factor in list(of[variable].items()):
            for other in factor.scope:
                of[other].pop(key, None)
                touched.add(other)
        for part in _parts(bucket, sizes, max_cells):
            left = _minimum(part, variable, sizes)
            if left.scope:
                serial += 1
                for other in left.scope:
                    of[other][serial] = left
            else:
                bound += float(left.table)
        for other in sorted(touched - {variable}):
            heapq.heappush(heap, (cells(other), other))
    values = _decode(sizes, buckets)
    values = _improve(values, sizes, factors, bound)
    return Choice(tuple(values), _cost(values, factors), bound)


def _union(factors: Iterable[Factor]) -> tuple[int, ...]:
    found: set[int] = set()
    for factor in factors:
        found.update(factor.scope)
    return tuple(sorted(found))


def _parts(bucket: Sequence[Factor], sizes: Sequence[int], max_cells: int) -> list[list[Factor]]:
    """The factors in groups whose joint tables stay small: one group where that is exact."""
    groups: list[tuple[set[int], list[Factor]]] = []
    for factor in sorted(bucket, key=lambda f: -f.table.size):
        for scope, members in groups:
            if prod(sizes[v] for v in scope | set(factor.scope)) <= max_cells:
                scope |= set(factor.scope)
                members.append(factor)
                break
        else:
            groups.append((set(factor.scope), [factor]))
    return [members for _, members in groups]


def _minimum(factors: Sequence[Factor], variable: int, sizes: Sequence[int]) -> Factor:
    """The sum of factors, least over one variable."""
    scope = _union(factors)
    total = np.zeros([sizes[v] for v in scope])
    for factor in factors:
        shape = [sizes[v] if v in factor.scope else 1 for v in scope]
        total += factor.table.reshape(shape)
    at = scope.index(variable)
    return Factor((*scope[:at], *scope[at + 1 :]), total.min(axis=at))


def _decode(sizes: Sequence[int], buckets: Sequence[tuple[int, list[Factor]]]) -> list[int]:
    """Values in the reverse order of elimination, each the best given those before; ties go to the first."""
    values = [0] * len(sizes)
    for variable, bucket in reversed(buckets):
        total = np.zeros(sizes[variable])
        for factor in bucket:
            total += factor.table[tuple(slice(None) if v == variable else values[v] for v in factor.scope)]
        values[variable] = _first_least(total)
    return values


def _first_least(costs: Table) -> int:
    """The first value within rounding of the least: sums of the same terms in another order must not decide."""
    least = costs.min()
    return int(np.flatnonzero(costs <= least + 1e-12 * abs(least))[0]) if np.isfinite(least) else 0


def _improve(values: list[int], sizes: Sequence[int], factors: Sequence[Factor], bound: float) -> list[int]:
    """Change one variable at a time while that helps; does nothing where the choice is proved best."""
    cost = _cost(values, factors)
    if cost <= bound + 1e-9 * abs(bound):
        return values
    of: list[list[Factor]] = [[] for _ in sizes]
    for factor in factors:
        for variable in factor.scope:
            of[variable].append(factor)
    for _ in range(MAX_SWEEPS):
        better = False
        for variable, mine in enumerate(of):
            total = np.zeros(sizes[variable])
            for factor in mine:
                total += factor.table[tuple(slice(None) if v == variable else values[v] for v in factor.scope)]
            best = int(total.argmin())
            if total[best] < total[values[variable]] * (1 - 1e-12):
                values[variable] = best
                better = True
        if not better:
            break
    return values


def _cost(values: Sequence[int], factors: Sequence[Factor]) -> float:
    return float(sum(factor.table[tuple(values[v] for v in factor.scope)] for factor in factors))
