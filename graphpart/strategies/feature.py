"""Feature splits: every product with a weight is cut along the weight's axes, as Megatron-LM does."""

from __future__ import annotations

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import choose_cuts, domains
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import feature_seeds, weight_axes
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
    devices = range(len(cluster))
    geometry = Geometry(graph, speeds(graph, cluster))
    found = propagate(geometry, feature_seeds(geometry))
    weighted = {op.name for op, _ in weight_axes(graph)}
    if len(cluster) > 1 and not any(name in found for name in weighted):
        raise PlacementError(
            f"{graph.name} has no weight with an axis of at least {len(cluster)} that can be cut; use fewer devices, "
            "or strategy='batch' or 'layer'"
        )
    allowed = domains(graph, found, len(cluster), lambda op, cut: op.name in weighted)
    prices = Prices(geometry, cluster, devices, terms.num_microbatches, count_latency=False)
    choice = choose_cuts(prices, allowed, weigh_compute=False)
    return finish(graph, cluster, choice.tiles(graph), terms)
