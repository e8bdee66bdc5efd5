"""Steps of a segment whose backward can leave the gradient of a weight for later."""

from __future__ import annotations

from collections.abc import Collection

from graphpart.ir.graph import refs
from graphpart.ir.program import Segment, Step


def weight_steps(segment: Segment, weights: Collection[str]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Steps that read weights beside other values, and those that read weights alone, and pass them on.

    Args:
        segment: what runs.
        weights: those of its inputs whose gradient is made apart.
    """
    carried, reading, passing = set(weights), [], []
    for step in segment.steps if weights else ():
        names = read_by(step)
        if names and names <= carried:
            carried.update(step.results)
            passing.append(step)
        elif names & carried:
            reading.append(step)
    return tuple(reading), tuple(passing)


def read_by(step: Step) -> set[str]:
    """The locals that a step reads."""
    return {ref.name for ref in refs((step.args, dict(step.kwargs)))}
