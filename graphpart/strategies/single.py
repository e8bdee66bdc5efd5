"""Everything on one device: the plan that every split has to beat."""

from __future__ import annotations

from graphpart.cost.time.roofline import operator_works, step_time
from graphpart.errors import OutOfMemoryError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, default_homes
from graphpart.strategies.memory.check import check_memory
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms


def single(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
) -> Placement:
    """Everything on the device that runs a step soonest, of those with memory enough.

    Args:
        graph: the traced model.
        cluster: the devices.
        terms: what to count with.

    Raises:
        OutOfMemoryError: if no device fits the model; it names the device with most memory.
    """
    works = operator_works(graph).values()
    times_s = [sum(step_time(w, device, terms.num_microbatches).total_s for w in works) for device in cluster.devices]
    errors: dict[int, OutOfMemoryError] = {}
    tried: set[int] = set()
    for index in sorted(range(len(cluster)), key=lambda i: times_s[i]):
        if cluster.devices[index].memory_bytes in tried:  # it would hold the same, and fail the same
            continue
        tried.add(cluster.devices[index].memory_bytes)
        placement = _all_on(graph, index)
        try:
            check_memory(graph, placement, cluster, terms)
        except OutOfMemoryError as error:
            errors[index] = error
        else:
            return placement
    raise errors[max(errors, key=lambda i: cluster.devices[i].memory_bytes)]


def _all_on(graph: Graph, index: int) -> Placement:
    device_of = {op.name: index for op in graph.operators}
    # What nothing reads has its default home on device 0; here it joins the rest.
    homes = dict.fromkeys(default_homes(graph, device_of), index)
    return Placement(Placement.whole(graph, device_of).tiles, homes)
