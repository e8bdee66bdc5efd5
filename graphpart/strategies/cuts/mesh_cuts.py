"""Meshes: a group of devices cut along several kinds of axes at once, as the product of one cut for each kind.

Cuts of an operator divide its iteration space, or repeat it whole. Where each part of one cut meets each part of
another, the space is divided by both: so any two cuts have a product, whatever their axes, and a product is a cut. What
tiles need, make, and sum follows from it as from any cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.strategies.cuts.choose_cuts import CutChoice, operator_costs
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.inverse_rules import Axes, Cut, axes_of
from graphpart.strategies.cuts.kinds import feature_cuts, sample_cuts
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices


def product(outer: Cut, inner: Cut) -> Cut:
    """The cut whose tiles are where a tile of one cut meets a tile of another; the inner one's are neighbours."""
    return tuple(_meet(one, other) for one in outer for other in inner)


def _meet(one: Axes | None, other: Axes | None) -> Axes | None:
    """The part of the space that two tiles have in common; None if there is none."""
    if one is None or other is None:
        return None
    found = dict(one)
    for axis, part in other:
        found[axis] = found[axis] & part if axis in found else part
        if not found[axis]:
            return None
    return axes_of(found)


@dataclass(frozen=True)
class Mesh:
    """A group of devices cut along samples and along features.

    Attributes:
        samples: cuts among replicas, by the first device of each.
        features: cuts among the devices of the first replica.
        choice: their product, on all devices.
    """

    samples: CutChoice
    features: CutChoice
    choice: CutChoice


def tile_mesh(
    graph: Graph,
    cluster: Cluster,
    rows: Sequence[Sequence[int]],
    num_microbatches: int,
    *,
    positions: bool = False,
) -> Mesh:
    """Cut every operator along its samples among rows of devices, and along features among those of each row.

    Where devices are unlike, a row's share of samples is as its slowest device can keep up with, and devices in one
    place of their rows share features as those of all rows together would.

    Args:
        graph: the traced model.
        cluster: the devices.
        rows: indices of devices, as many in each row.
        num_microbatches: parts of the batch.
        positions: see :func:`feature_cuts`.

    Raises:
        PlacementError: if the model cannot be cut into so many parts.
    """
    devices = [device for row in rows for device in row]
    speed = np.array(speeds(graph, cluster, devices)).reshape(len(rows), -1)
    of_column = speed.mean(axis=0)
    of_row = (speed / of_column).min(axis=1)
    samples = sample_cuts(graph, cluster, [row[0] for row in rows], _shares(of_row), num_microbatches)
    features = feature_cuts(graph, cluster, rows[0], _shares(of_column), num_microbatches, positions=positions)
    cuts = {name: product(cut, features.cuts[name]) for name, cut in samples.cuts.items()}
    cost_s, bound_s = samples.cost_s + features.cost_s, samples.bound_s + features.bound_s
    return Mesh(samples, features, CutChoice(tuple(devices), cuts, cost_s, bound_s))


def _shares(speed: np.ndarray) -> tuple[float, ...]:
    return tuple((speed / speed.mean()).tolist())


def mesh_costs(graph: Graph, cluster: Cluster, mesh: Mesh, num_microbatches: int) -> dict[str, float]:
    """What every operator costs, in seconds a step: work and traffic in the first row, and parameters between rows."""
    size = len(mesh.features.devices)
    row = {name: cut[:size] for name, cut in mesh.choice.cuts.items()}
    column = {name: cut[::size] for name, cut in mesh.choice.cuts.items()}
    there = Prices(Geometry(graph, [1.0] * size), cluster, mesh.features.devices, num_microbatches)
    columns = [mesh.choice.devices[i::size] for i in range(size)]
    across = Prices(Geometry(graph, [1.0] * len(columns[0])), cluster, columns[0], num_microbatches, beside=columns[1:])
    found = operator_costs(there, CutChoice(mesh.features.devices, row, 0.0, 0.0))
    for name, cut in column.items():
        op = graph.operator[name]
        for i, operand in enumerate(op.operands):
            if operand in graph.source and graph.source[operand].kind != "input":
                found[name] += across.spread_s(operand, across.geometry.needed(op, i, cut))
    return found
