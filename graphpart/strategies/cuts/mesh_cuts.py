"""Meshes: a group of devices cut along several kinds of axes at once, as the product of one cut for each kind.

Cuts of an operator divide its iteration space, or repeat it whole. Where each part of one cut meets each part of
another, the space is divided by both: so any two cuts have a product, whatever their axes, and a product is a cut. What
tiles need, make, and sum follows from it as from any cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.strategies.cuts.choose_cuts import CutChoice, operator_costs
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.inverse_rules import Axes, Cut, axes_of
from graphpart.strategies.cuts.kinds import feature_cuts, position_cuts, sample_cuts
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
    """A group of devices cut along samples, positions and features.

    Attributes:
        devices: their indices, ``[replicas, blocks of positions, parts of features]``.
        choice: the product of a cut for each, on all devices.
    """

    devices: np.ndarray
    choice: CutChoice


def tile_mesh(
    graph: Graph,
    cluster: Cluster,
    devices: np.ndarray,
    num_microbatches: int,
    *,
    sequence: bool = False,
) -> Mesh:
    """Cut every operator along samples, positions and features at once.

    Where devices are unlike, a replica's share of samples, and a block's of positions, is as its slowest device can
    keep up with, and devices in one place of their rows share features as those of all rows together would.

    Args:
        graph: the traced model.
        cluster: the devices.
        devices: indices, ``[replicas, blocks of positions, parts of features]``.
        num_microbatches: parts of the batch.
        sequence: see :func:`feature_cuts`.

    Raises:
        PlacementError: if the model cannot be cut into so many parts.
    """
    group = devices.ravel().tolist()
    speed = np.array(speeds(graph, cluster, group)).reshape(devices.shape)
    of_part = speed.mean(axis=(0, 1))
    rows = (speed / of_part).min(axis=2)
    of_block = rows.mean(axis=0)
    of_replica = (rows / of_block).min(axis=1)
    samples = sample_cuts(graph, cluster, devices[:, 0, 0].tolist(), _shares(of_replica), num_microbatches)
    features = feature_cuts(
        graph, cluster, devices[0, 0].tolist(), _shares(of_part), num_microbatches, sequence=sequence
    )
    kinds = [samples, features]
    if devices.shape[1] > 1:
        blocks = devices[0, :, 0].tolist()
        kinds.insert(1, position_cuts(graph, cluster, blocks, _shares(of_block), num_microbatches))
    cuts = {name: reduce(product, (kind.cuts[name] for kind in kinds)) for name in samples.cuts}
    cost_s, bound_s = sum(kind.cost_s for kind in kinds), sum(kind.bound_s for kind in kinds)
    return Mesh(devices, CutChoice(tuple(group), cuts, cost_s, bound_s))


def _shares(speed: np.ndarray) -> tuple[float, ...]:
    return tuple((speed / speed.mean()).tolist())


def mesh_costs(graph: Graph, cluster: Cluster, mesh: Mesh, num_microbatches: int) -> dict[str, float]:
    """What every operator costs, in seconds a step: work and traffic in a replica, and parameters between them."""
    columns = mesh.devices.reshape(len(mesh.devices), -1).T.tolist()
    replica = [column[0] for column in columns]
    row = {name: cut[: len(replica)] for name, cut in mesh.choice.cuts.items()}
    column = {name: cut[:: len(replica)] for name, cut in mesh.choice.cuts.items()}
    there = Prices(Geometry(graph, [1.0] * len(replica)), cluster, replica, num_microbatches)
    across = Prices(Geometry(graph, [1.0] * len(columns[0])), cluster, columns[0], num_microbatches, beside=columns[1:])
    found = operator_costs(there, CutChoice(tuple(replica), row, 0.0, 0.0))
    for name, cut in column.items():
        op = graph.operator[name]
        for i, operand in enumerate(op.operands):
            if operand in graph.source and graph.source[operand].kind != "input":
                found[name] += across.spread_s(operand, across.geometry.needed(op, i, cut))
    return found
