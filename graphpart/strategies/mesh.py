"""Meshes: stages of layers on groups of devices, each cut along several axes, in degrees that a user says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.mesh_cuts import mesh_costs, tile_mesh
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms
from graphpart.strategies.stages.among_groups import Tiling, divide_among
from graphpart.strategies.stages.blocks import MAX_BLOCK_CUTS, into_blocks, operator_order
from graphpart.strategies.stages.interval_costs import measure


def mesh(graph: Graph, cluster: Cluster, terms: Terms = DEFAULT_TERMS, *, degrees: Degrees) -> Placement:
    """Divide layers among ``pp`` groups of devices, cut by samples (``dp``), positions (``cp``), features (``tp``).

    Three-dimensional parallelism of Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters",
    SC 2021, with its order of devices: those that share features are neighbours. Positions are cut as the context
    parallelism of the Llama 3 report (2024, section 3.3.2) cuts them: keys and values are gathered.

    Args:
        graph: the traced model.
        cluster: the devices.
        terms: what to count with.
        degrees: how many parts of each kind.

    Raises:
        ArgumentError: if the degrees are for another number of devices.
        PlacementError: if the model cannot be cut into so many parts.
        OutOfMemoryError: if the split does not fit.
    """
    degrees.check(len(cluster))
    order = into_blocks(graph, operator_order(graph), cluster.devices[0], MAX_BLOCK_CUTS)
    if order.num_blocks < degrees.pp * degrees.vp:
        raise PlacementError(
            f"{graph.name} has {order.num_blocks} operators to cut between, too few for the {degrees.pp * degrees.vp} "
            f"intervals of layers that {str(degrees)!r} asks for"
        )
    costs = measure(graph, order, num_microbatches=terms.num_microbatches)

    def tile(devices: Sequence[int]) -> Tiling:
        shape = (degrees.dp, degrees.cp, degrees.tp)
        found = tile_mesh(graph, cluster, np.reshape(devices, shape), terms.num_microbatches, sequence=degrees.sp)
        return found.choice, mesh_costs(graph, cluster, found, terms.num_microbatches)

    by_node = np.array(cluster.topology.neighbours_first())
    groups = by_node[degrees.stages()].reshape(degrees.pp, -1).tolist()
    grouping = divide_among(graph, cluster, groups, tile, costs, rounds=degrees.vp)
    return finish(graph, cluster, grouping.tiles, terms, pieces=True if degrees.zero else None)
