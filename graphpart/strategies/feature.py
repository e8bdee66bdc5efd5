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
from graphpart.strategies.memory.in_flight import Holding


def feature(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    optimizer_bytes_per_element: float = 8,
    memory_reserve: float = 0.0,
    holding: Holding | None = None,
) -> Placement:
    """Cut every product with a weight along the weight's axes, with the least traffic.

    A linear layer before a pointwise one and another linear layer comes out cut by columns, then by rows, with one
    all-reduce forward and one backward and nothing between (M. Shoeybi et al., "Megatron-LM", arXiv:1909.08053,
    section 3); attention by heads; an embedding and a cross-entropy by vocabulary; convolutions by channels. What has
    no weight is whole on every device where that saves traffic.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get parts in proportion to their speed.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW by default.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.
        holding: what the step's schedule lets devices hold; all microbatches if None.

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
    prices = Prices(geometry, cluster, devices, num_microbatches, count_latency=False)
    tiling = choose_cuts(prices, allowed, weigh_compute=False)
    return finish(
        graph,
        cluster,
        tiling.tiles(graph),
        num_microbatches=num_microbatches,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        memory_reserve=memory_reserve,
        holding=holding,
    )
