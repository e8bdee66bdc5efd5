"""Batch splits: every device runs the whole model on its part of the samples."""

from __future__ import annotations

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.kinds import sample_cuts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms


def batch(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
    *,
    shard_parameters: bool = False,
) -> Placement:
    """Cut the samples; parameters are read whole by every device, and their gradients summed.

    What carries no samples, or mixes them, is cut, whole on every device, or on one, as takes least time.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get samples in proportion to their speed, by largest remainder.
        terms: what to count with.
        shard_parameters: keep a part of every parameter, its gradient and its optimizer state on each device (ZeRO-3,
            Rajbhandari et al., SC 2020; FSDP), instead of each parameter on one.

    Raises:
        PlacementError: if there are fewer samples than devices, or nothing carries samples.
        OutOfMemoryError: if the split does not fit.
    """
    weights = speeds(graph, cluster)
    choice = sample_cuts(graph, cluster, range(len(cluster)), weights, terms.num_microbatches)
    return finish(graph, cluster, choice.tiles(graph), terms, pieces=shard_parameters, weights=weights)
