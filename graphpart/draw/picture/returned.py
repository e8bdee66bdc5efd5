"""Which messages bring the model's outputs together, for no operator to read."""

from __future__ import annotations

from graphpart.ir.graph import refs
from graphpart.ir.program import Bridge, Program, Step


def returned_tags(program: Program) -> frozenset[int]:
    """Tags of the forward messages that serve outputs only: what is received is at most sliced, joined or summed."""
    readers: dict[tuple[int, str], list[Step]] = {}
    for segment in program.segments:
        for step in segment.steps:
            for ref in refs((step.args, dict(step.kwargs))):
                readers.setdefault((segment.device, ref.name), []).append(step)
    outputs = set(program.outputs)

    def is_returned(bridge: Bridge) -> bool:
        names, found = [bridge.wire], False
        for name in names:
            found |= name in outputs
            for step in readers.get((bridge.destination, name), ()):
                if not step.is_bridge:
                    return False
                names += [result for result in step.results if result and result not in names]
        return found

    return frozenset(bridge.tag for bridge in program.bridges if is_returned(bridge))
