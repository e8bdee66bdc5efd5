"""Devices that work on a microbatch at the same time: the members of a group that splits operators among them."""

from __future__ import annotations

import networkx as nx

from graphpart.ir.program import Program


def units(program: Program) -> tuple[int, ...]:
    """Per device, the number of its unit: devices that send each other parts of one value, both ways, are one.

    Those that only feed one another in rounds, a value there and another one back, take turns and are not.

    Args:
        program: the lowered program.
    """
    makers = ((bridge, program.wire[bridge.wire]) for bridge in program.bridges)
    sent = {
        (wire.value, wire.microbatch, b.source, b.destination)
        for b, wire in makers
        if wire.segment and wire.microbatch is not None
    }
    together = nx.Graph()
    together.add_nodes_from(range(program.num_devices))
    together.add_edges_from((a, b) for value, m, a, b in sent if a < b and (value, m, b, a) in sent)
    found = {device: i for i, unit in enumerate(nx.connected_components(together)) for device in unit}
    return tuple(found[device] for device in range(program.num_devices))
