"""The choice between strategies: build a plan with each, forecast them, keep the fastest and the whole table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms
from graphpart.strategies.registry import STRATEGIES, Strategy


@dataclass(frozen=True, slots=True)
class Candidate:
    """One strategy that was considered.

    Attributes:
        strategy: its name.
        step_s: forecast time of a step in seconds, or None where it has no plan.
        reason: why it has none; empty where it has one.
    """

    strategy: str
    step_s: float | None
    reason: str = ""


def auto(
    graph: Graph,
    cluster: Cluster,
    forecast: Callable[[Placement], float],
    terms: Terms = DEFAULT_TERMS,
    *,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> tuple[str, Placement, tuple[Candidate, ...]]:
    """Compare all strategies and take the one with the least forecast time of a step.

    Args:
        graph: the traced model.
        cluster: the devices.
        forecast: seconds a step of a placement; it may raise a ``PlacementError`` where the placement can't run.
        terms: what to count with.
        strategies: by name; of equals the first is taken.

    Returns:
        The name of the best strategy, its placement, and the table of all candidates.

    Raises:
        OutOfMemoryError: if no strategy has a plan and one failed for want of memory; it gives every reason.
        PlacementError: if no strategy has a plan otherwise.
    """
    candidates: list[Candidate] = []
    best: tuple[float, str, Placement] | None = None
    errors: list[PlacementError] = []
    for name, strategy in strategies.items():
        try:
            placement = strategy(graph, cluster, terms)
            step_s = forecast(placement)
        except PlacementError as error:
            errors.append(error)
            candidates.append(Candidate(name, None, str(error)))
            continue
        candidates.append(Candidate(name, step_s))
        if best is None or step_s < best[0]:
            best = (step_s, name, placement)
    if best is None:
        kind = OutOfMemoryError if any(isinstance(e, OutOfMemoryError) for e in errors) else PlacementError
        # The first reason in full; of the others, the sentence that says what is wrong.
        texts = [c.reason if i == 0 else c.reason.split(". ")[0] for i, c in enumerate(candidates)]
        reasons = "".join(f"\n  {c.strategy}: {text}" for c, text in zip(candidates, texts, strict=True))
        raise kind(f"no strategy has a plan for {graph.name} on {_devices(cluster)}:{reasons}")
    return best[1], best[2], tuple(candidates)


def _devices(cluster: Cluster) -> str:
    return f"{len(cluster)} devices" if len(cluster) > 1 else f"device {cluster.devices[0].name!r}"
