"""Feature splits: every product with a weight is cut along the weight's axes, as Megatron-LM does."""

from __future__ import annotations

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.kinds import feature_cuts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms


def feature(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Cut every product with a weight along the weight's axes, with the least traffic.

    A linear layer before a pointwise one and another linear layer comes out cut by columns, then by rows, with one
    all-reduce forward and one backward and nothing between (M. Shoeybi et al., "Megatron-LM", arXiv:1909.08053,
    section 3); attention by heads; an embedding and a cross-entropy by vocabulary; convolutions by channels. What has
    no weight is whole on every device where that saves traffic.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get parts in proportion to their speed.
        terms: what to count with.

    Raises:
        PlacementError: if no product of the model can be cut into so many parts.
        OutOfMemoryError: if the split does not fit.
    """
    choice = feature_cuts(graph, cluster, range(len(cluster)), speeds(graph, cluster), terms.num_microbatches)
    return finish(graph, cluster, choice.tiles(graph), terms)
