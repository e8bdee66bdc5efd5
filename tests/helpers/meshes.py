"""Random meshes: stages of devices, operators cut along several axes at once within each."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from unittest import mock

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement
from graphpart.ir.region import Intervals
from graphpart.lower import bridges
from graphpart.strategies.cuts.inverse_rules import Axes, Cut, shares_of, tiles_on
from graphpart.strategies.cuts.mesh_cuts import product
from graphpart.strategies.memory.homes import homes_for
from graphpart.strategies.memory.terms import Terms
from graphpart.strategies.mesh import mesh

SIZES = (2, 3, 4, 4, 6, 8, 8)
"""Devices that meshes are drawn for."""


def factors(number: int, count: int, rng: random.Random) -> list[int]:
    """A number as a product of so many."""
    found = [1] * count
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            found[rng.randrange(count)] *= prime
            number //= prime
    return found


def random_mesh(graph: Graph, cluster: Cluster, rng: random.Random, num_microbatches: int) -> Placement:
    """The library's own mesh by random degrees, or where it has none, and half of the time, one at random."""
    dp, tp, pp, cp = factors(len(cluster), 4, rng)
    degrees = Degrees(
        dp,
        tp,
        pp,
        cp,
        vp=rng.choice([1, 2]) if pp > 1 else 1,
        sp=tp > 1 and rng.random() < 0.4,
        zero=int(dp > 1 and rng.random() < 0.4),
    )
    if rng.random() < 0.6:
        with contextlib.suppress(PlacementError):
            return mesh(graph, cluster, Terms(num_microbatches), degrees=degrees)
    return any_mesh(graph, len(cluster), rng)


def any_mesh(graph: Graph, num_devices: int, rng: random.Random) -> Placement:
    """Stages, and in each every operator cut along up to three of its axes, or repeated, as the mesh's sizes say."""
    num_stages, *sizes = factors(num_devices, rng.choice([3, 4]), rng)
    size = num_devices // num_stages
    bounds = sorted(rng.randint(0, len(graph.operators)) for _ in range(num_stages - 1))
    tiles = {}
    for i, op in enumerate(graph.operators):
        stage = sum(bound <= i for bound in bounds)
        devices = range(stage * size, (stage + 1) * size)
        cut: Cut = ((),)
        for length in sizes:
            cut = product(cut, random_cut(op, length, rng))
        if op.rule is None:  # it may keep a state of its own that only one device has
            cut = tuple(() if place == 0 else None for place in range(size))
        tiles[op.name] = tiles_on(cut, devices)
    return homes_for(graph, tiles, is_worth=lambda devices, size_bytes: rng.random() < 0.6)


def random_cut(op: Operator, length: int, rng: random.Random) -> Cut:
    """An operator on so many devices: the whole on each, or one of its axes in even or uneven parts."""
    axes = [axis for axis in (op.rule.cuttable if op.rule else ()) if op.rule and op.rule.extents[axis] >= length]
    if length == 1 or not axes or rng.random() < 0.2:
        return ((),) * length
    axis = rng.choice(axes)
    assert op.rule is not None
    extent = op.rule.extents[axis]
    parts: Sequence[Intervals] | None = shares_of(extent, [rng.choice([1.0, 1.0, 2.0]) for _ in range(length)])
    assert parts is not None
    if not op.rule.needs_runs(axis) and rng.random() < 0.3:
        indices = list(range(extent))
        rng.shuffle(indices)
        parts = [Intervals.indices(indices[i::length]) for i in range(length)]
    found: list[Axes] = [((axis, part),) for part in parts]
    return tuple(found)


@contextlib.contextmanager
def in_rounds(seed: int) -> Iterator[None]:
    """Half of the seeds send values of any size in rounds."""
    smallest = 1 if seed % 2 else bridges.SMALLEST_IN_ROUNDS
    with mock.patch.object(bridges, "SMALLEST_IN_ROUNDS", smallest):
        yield
