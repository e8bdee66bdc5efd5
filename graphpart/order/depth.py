"""How far each device is from the end of the pipeline."""

from __future__ import annotations

import networkx as nx

from graphpart.ir.program import Program


def depths(program: Program) -> tuple[int, ...]:
    """Per device, the devices on the longest way from it to the end, itself included.

    Devices are linked by the messages that the forward passes of microbatches send. Those that feed each other both
    ways, directly or by others, are one group, and a way through a group counts all of it. A chain of K devices has
    K, K - 1, …, 1.

    Args:
        program: the lowered program.
    """
    links = nx.DiGraph()
    links.add_nodes_from(range(program.num_devices))
    makers = ((bridge, program.wire[bridge.wire]) for bridge in program.bridges)
    sent = [(b.source, b.destination) for b, wire in makers if wire.segment and wire.microbatch is not None]
    links.add_edges_from(dict.fromkeys(sent))
    groups = nx.condensation(links)
    depth: dict[int, int] = {}
    for group in reversed(list(nx.topological_sort(groups))):
        size = len(groups.nodes[group]["members"])
        depth[group] = size + max((depth[after] for after in groups.successors(group)), default=0)
    return tuple(depth[groups.graph["mapping"][device]] for device in range(program.num_devices))
