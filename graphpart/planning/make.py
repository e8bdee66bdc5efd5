"""Planning: which strategy places a model, what runs again, and whether that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from graphpart.cost.memory.forecast import trains
from graphpart.cost.memory.fused_attention import with_fused_attention
from graphpart.cost.memory.recompute import recomputed
from graphpart.errors import MicrobatchError, OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, default_homes
from graphpart.planning.choices import DEFAULT_CHOICES, Choices
from graphpart.planning.plan import Plan
from graphpart.planning.trials import Trials
from graphpart.strategies import (
    STRATEGIES,
    Candidate,
    Masks,
    Strategy,
    Terms,
    auto,
    by_hand,
    constraints_of,
    fitted,
    groups_of,
    recomputing,
    settled,
    strategy_named,
)

_KNOWN = ("program", "backward", "timeline", "training")
"""Expensive cached properties that do not depend on the strategy's name."""


@no_collection()
def make_plan(
    graph: Graph, cluster: Cluster, choices: Choices = DEFAULT_CHOICES, *, masks: Masks | None = None
) -> Plan:
    """Decide where everything lives and runs.

    Args:
        graph: the traced model.
        cluster: the devices.
        choices: what the user decided.
        masks: per buffer that masks a weight, where it is not zero; ``free`` groups neurons by it.

    Raises:
        MicrobatchError: if the batch is empty.
        PlacementError: if the strategy has no placement, or its placement doesn't fit.
        ArgumentError: if ``recompute`` names no module.
        OutOfMemoryError: if nothing fits.
    """
    check_batch(graph)
    graph = with_fused_attention(graph, cluster)
    groups = groups_of(graph, choices.recompute)
    # While it is tried, a placement is its author's decision: trials do not refuse what they find.
    trials = Trials(Plan(graph, cluster, Placement({}), "", _decided(choices, Placement({}))))
    terms = Terms(
        choices.num_microbatches,
        choices.optimizer_bytes_per_element,
        choices.memory_reserve,
        trials.in_flight(groups),
        masks,
    )
    strategy, options = choices.strategy, choices.strategy_options or {}
    if isinstance(strategy, Placement):
        return _given(trials.base, strategy, groups, terms)
    constraints = constraints_of(strategy, cluster)
    if constraints is not None:
        placement = by_hand(recomputed(graph, groups), cluster, constraints, num_microbatches=terms.num_microbatches)
        return _given(trials.base, placement, groups, terms)
    if callable(strategy):
        name = getattr(strategy, "__name__", "custom")
        own = recomputing(_told_by_keywords(strategy), {}, choices.recompute == "auto")
        placement = own(recomputed(graph, groups), cluster, terms, **options)
        if not isinstance(placement, Placement):
            raise PlacementError(f"the strategy {name} gave a {type(placement).__name__}, not a graphpart.Placement")
        return _given(trials.base, placement, groups, terms, name)
    if strategy == "auto":
        return _settled(_fastest(trials, choices, groups, terms), groups, terms)
    placement = recomputing(strategy_named(strategy), groups, choices.recompute == "auto")(
        graph, cluster, terms, **options
    )
    return _settled(_named(trials.plan(placement), choices, strategy), groups, terms)


def check_batch(graph: Graph) -> None:
    """Refuse to plan for no samples at all.

    Raises:
        MicrobatchError: naming the input.
    """
    for source in graph.inputs:
        dim = graph.sample_dims.get(source.value.name)
        if dim is not None and source.value.shape[dim] == 0:
            raise MicrobatchError(
                f"the input {source.names[0]!r} is {list(source.value.shape)}: cannot plan with an empty batch; give "
                "plan() or the first call at least one sample"
            )


def _decided(choices: Choices, placement: Placement) -> Choices:
    """The choices of a plan by its author's decision: the strategy is that placement."""
    return replace(choices, strategy=placement, strategy_options=None)


def _told_by_keywords(strategy: Callable[..., Any]) -> Strategy:
    """A user's own strategy, which is told the terms as keywords."""
    return lambda graph, cluster, terms, **options: strategy(graph, cluster, **terms.keywords, **options)


def _fastest(trials: Trials, choices: Choices, groups: Mapping[str, str], terms: Terms) -> Plan:
    """The plan with the least forecast time; if none fits, of those with more that runs again."""
    base, tried = trials.base, list[Plan]()

    def forecast_s(placement: Placement) -> float:
        tried.append(trials.plan(placement))
        return tried[-1].timeline.makespan_s

    def compare(automatic: bool) -> tuple[str, Placement, tuple[Candidate, ...]]:
        able = {name: recomputing(strategy, groups, automatic) for name, strategy in STRATEGIES.items()}
        return auto(base.graph, base.cluster, forecast_s, terms, strategies=able)

    try:
        name, placement, candidates = compare(False)
    except OutOfMemoryError:
        if choices.recompute != "auto" or not trains(base.graph):
            raise
        name, placement, candidates = compare(True)
    return _named(next(plan for plan in tried if plan.placement == placement), choices, name, candidates)


def _named(plan: Plan, choices: Choices, strategy: str, candidates: tuple[Candidate, ...] = ()) -> Plan:
    """A trial as the plan that a strategy made; what is known of it stays known, since it depends on the placement.

    Raises:
        OutOfMemoryError: if its schedule does not fit after all.
    """
    named = replace(plan, strategy=strategy, choices=choices, candidates=candidates)
    if plan.schedule is not None:
        plan.trainer.check(plan.training)
    named.__dict__.update((name, plan.__dict__[name]) for name in _KNOWN if name in plan.__dict__)
    return named


def _settled(plan: Plan, groups: Mapping[str, str], terms: Terms) -> Plan:
    """The plan, with so much run again by choice that every moment of the forecast step fits.

    With a schedule, the strategy has already ensured this.
    """
    if plan.schedule is not None:
        return plan

    def peak_bytes(placement: Placement) -> list[int]:
        curves = replace(plan, placement=placement).memory_over_time
        return [curve.peak.memory.total_bytes for curve in curves]

    found = settled(plan.graph, plan.placement, plan.cluster, groups, peak_bytes, terms)
    return plan if found is plan.placement else replace(plan, placement=found)


def _given(base: Plan, placement: Placement, groups: Mapping[str, str], terms: Terms, name: str = "by hand") -> Plan:
    """A placement by its author's decision; a note says where it is forecast not to fit, whatever runs again."""
    graph, cluster, recompute = base.graph, base.cluster, base.choices.recompute
    placement.check(graph, len(cluster))
    first = default_homes(graph, {name: tiles[0].device for name, tiles in placement.tiles.items()})
    homes = {name: home for name, home in first.items() if name not in placement.shards}
    placement = replace(placement, homes={**homes, **placement.homes})
    again = {} if recompute == "none" else {**groups, **placement.recompute}
    placement = replace(placement, recompute=again)
    if recompute == "auto":
        placement = fitted(graph, placement, cluster, terms) or placement
    plan = replace(base, placement=placement, strategy=name, choices=_decided(base.choices, placement))
    try:
        plan.memory.check(graph, placement, cluster, terms.memory_reserve)
    except OutOfMemoryError as error:
        return replace(plan, notes=(*plan.notes, str(error)))
    return plan
