"""What running groups again costs and saves on each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphpart.cost.memory.forecast import forecast_memory
from graphpart.cost.memory.recompute import members, rerun_s
from graphpart.cost.time.roofline import operator_works
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement


@dataclass(frozen=True, slots=True)
class RerunCost:
    """What running groups again costs and saves on one device.

    Attributes:
        device: its index.
        groups: what runs again there.
        time_s: seconds a step that it takes.
        saved_bytes: memory that the device needs less.
        without_bytes: memory that the device would need if nothing ran again.
    """

    device: int
    groups: tuple[str, ...]
    time_s: float
    saved_bytes: int
    without_bytes: int


def rerun_costs(
    graph: Graph,
    placement: Placement,
    cluster: Cluster,
    *,
    num_microbatches: int,
    optimizer_bytes_per_element: float,
    in_flight: Sequence[float] | None = None,
) -> tuple[RerunCost, ...]:
    """What the groups of a placement cost and save, by device; devices that run none again are left out.

    Args:
        graph: the traced model.
        placement: where everything runs, and what runs again.
        cluster: the devices.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
        in_flight: microbatches whose activations each device keeps at once; all by default.
    """
    groups = members(graph, placement.recompute)
    if not groups:
        return ()
    without, with_it = (
        forecast_memory(
            graph,
            one,
            len(cluster),
            num_microbatches=num_microbatches,
            in_flight=in_flight,
            optimizer_bytes_per_element=optimizer_bytes_per_element,
        )
        for one in (replace(placement, recompute={}), placement)
    )
    works = operator_works(graph)
    times = {name: rerun_s(ops, placement, cluster, works, num_microbatches) for name, ops in groups.items()}
    found = []
    for device in range(len(cluster)):
        own = tuple(name for name, by_device in times.items() if device in by_device)
        if own:
            more_s = sum(times[name][device] for name in own)
            needed_bytes = without.devices[device].total_bytes
            saved_bytes = needed_bytes - with_it.devices[device].total_bytes
            found.append(RerunCost(device, own, more_s, saved_bytes, needed_bytes))
    return tuple(found)
