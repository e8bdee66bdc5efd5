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
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms


def spatial(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Cut images along their height, width or depth, as DistBelief does (Dean et al., NIPS 2012, section 3).

    What has no positions is whole on every device.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get parts in proportion to their speed.
        terms: what to count with.

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
    choice = choose_cuts(Prices(geometry, cluster, range(num_devices), terms.num_microbatches), allowed)
    return finish(graph, cluster, choice.tiles(graph), terms)
