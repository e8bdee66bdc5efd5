"""Spatial splits: the height or the width of images is cut; convolutions read a halo of their neighbours' part."""

from __future__ import annotations

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import choose_cuts, domains, is_plain
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import image_dims, spatial_starts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.in_flight import Holding


def spatial(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    optimizer_bytes_per_element: float = 8,
    memory_reserve: float = 0.0,
    holding: Holding | None = None,
) -> Placement:
    """Cut images along their height, width or depth, as DistBelief does (Dean et al., NIPS 2012, section 3).

    What has no positions is whole on every device.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get parts in proportion to their speed.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW by default.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.
        holding: what the step's schedule lets devices hold; all microbatches if None.

    Raises:
        PlacementError: if no input is an image, or none is high or wide enough.
        OutOfMemoryError: if the split does not fit.
    """
    num_devices = len(cluster)
    geometry = Geometry(graph, speeds(graph, cluster))
    images = image_dims(graph)
    if not images:
        raise PlacementError(
            f"{graph.name} has no image among its inputs (floating point, four or five dimensions); use "
            "strategy='batch', 'feature' or 'layer'"
        )
    found = propagate(geometry, starts=spatial_starts(geometry))
    if num_devices > 1 and not any(is_plain(graph.operator[name], cut) for name, cuts in found.items() for cut in cuts):
        longest = max(graph.values[name].shape[dim] for name, dim in images)
        raise PlacementError(
            f"no operator of {graph.name} can be cut along positions into {num_devices} parts (images are up to "
            f"{longest} long); use fewer devices or strategy='batch'"
        )
    allowed = domains(graph, found, num_devices, is_plain)
    tiling = choose_cuts(Prices(geometry, cluster, range(num_devices), num_microbatches), allowed)
    return finish(
        graph,
        cluster,
        tiling.tiles(graph),
        num_microbatches=num_microbatches,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        memory_reserve=memory_reserve,
        holding=holding,
    )
