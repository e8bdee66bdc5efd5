"""How much of the work each device should take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graphpart.cost.time.roofline import operator_works, roofline_s
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph


def speeds(graph: Graph, cluster: Cluster, devices: Sequence[int] | None = None) -> tuple[float, ...]:
    """Weights in proportion to how soon each device would run the whole model, 1 on average; all 1 where alike.

    Args:
        graph: the traced model.
        cluster: the devices.
        devices: indices of those that share the work; all by default.
    """
    chosen = [cluster.devices[d] for d in (range(len(cluster)) if devices is None else devices)]
    # Work of equal operators is looked at once.
    works = Counter(
        (w.flops_forward, w.bytes_forward, w.flops_backward, w.bytes_backward, w.dtype)
        for w in operator_works(graph).values()
    )
    times = [
        sum(
            count * (roofline_s(forward, read, dtype, device) + roofline_s(backward, moved, dtype, device))
            for (forward, read, backward, moved, dtype), count in works.items()
        )
        for device in chosen
    ]
    if len(set(times)) == 1:
        return (1.0,) * len(chosen)
    rates = [1 / time_s for time_s in times]
    return tuple(rate * len(rates) / sum(rates) for rate in rates)
