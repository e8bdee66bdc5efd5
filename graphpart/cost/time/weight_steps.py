"""Steps of a segment whose backward can leave the gradient of a weight for later."""

from __future__ import annotations

from collections.abc import Collection

from graphpart.ir.graph import refs
from graphpart.ir.program import Segment, Step
from graphpart.rules.weights import carried, deferrable


def weight_steps(segment: Segment, weights: Collection[str]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Steps that leave gradients of weights for later, and those that pass weights on to them, cast or in part.

    Args:
        segment: what runs.
        weights: those of its inputs whose gradient is made apart.
    """
    if not weights:
        return (), ()
    steps, locals_ = segment.steps, carried(segment.steps, weights)
    passing = tuple(step for step in steps if any(name in locals_ for name in step.results))
    return tuple(steps[i] for i in deferrable(steps, locals_)), passing


def read_by(step: Step) -> set[str]:
    """The locals that a step reads."""
    # What a part of a bridge reads comes first; behind it there may be runs, which hold none.
    return {ref.name for ref in refs(step.args[:1] if step.is_bridge else (step.args, dict(step.kwargs)))}
