"""How far each device is from the end of the pipeline."""

from __future__ import annotations

import networkx as nx

from graphpart.ir.program import Program
from graphpart.order.units import units


def depths(program: Program) -> tuple[int, ...]:
    """Per device, the units on the longest way from it to the end, its own included.

    A unit is a device, or several that split operators among them (:func:`graphpart.order.units.units`). Units are
    linked by the messages that the forward passes of microbatches send. Those that feed each other both ways, directly
    or by others, are one group, and a way through a group counts all of it. A chain of K devices has K, K - 1, …, 1.

    Args:
        program: the lowered program.
    """
    unit = units(program)
    links = nx.DiGraph()
    links.add_nodes_from(unit)
    makers = ((bridge, program.wire[bridge.wire]) for bridge in program.bridges)
    sent = [(unit[b.source], unit[b.destination]) for b, wire in makers if wire.segment and wire.microbatch is not None]
    links.add_edges_from((a, b) for a, b in dict.fromkeys(sent) if a != b)
    groups = nx.condensation(links)
    depth: dict[int, int] = {}
    for group in reversed(list(nx.topological_sort(groups))):
        size = len(groups.nodes[group]["members"])
        depth[group] = size + max((depth[after] for after in groups.successors(group)), default=0)
    return tuple(depth[groups.graph["mapping"][number]] for number in unit)
