"""Planning: which strategy places a model, what runs again, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from graphpart.cost.memory.forecast import trains
from graphpart.cost.memory.recompute import recomputed
from graphpart.cost.storage import ADAMW_BYTES_PER_ELEMENT
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import DEFAULT_DEADLINE_S
from graphpart.planning.fused_step import ScheduleChoice
from graphpart.planning.plan import Plan
from graphpart.planning.replan import carry
from graphpart.planning.trials import Looks
from graphpart.strategies import (
    STRATEGIES,
    Candidate,
    Masks,
    Recompute,
    Strategy,
    auto,
    by_hand,
    check_options,
    constraints_of,
    fitted,
    groups_of,
    recomputing,
    settled,
)


def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    strategy: Any = "auto",
    strategy_options: Mapping[str, Any] | None = None,
    num_microbatches: int = 1,
    batch_norm: str = "barrier",
    deadline_s: float = DEFAULT_DEADLINE_S,
    wire_dtype: str | None = None,
    schedule: ScheduleChoice | None = None,
    memory_reserve: float = 0.0,
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT,
    masks: Masks | None = None,
    recompute: Recompute = "auto",
    offload: bool = False,
) -> Plan:
    """Decide where everything lives and runs.

    Args:
        graph: the traced model.
        cluster: the devices.
        strategy: a name (``auto``, ``layer``, ``batch``, …), a placement by hand as a mapping from patterns over module
            paths to devices or constraints, or as a list of constraints (``pin``, ``split``, ``keep_whole``,
            ``colocate``), a :class:`Placement`, or a function ``(graph, cluster, **options) -> Placement``.
        strategy_options: options of that one strategy, such as ``{"shard_parameters": True}`` for ``batch``.
        num_microbatches: parts of the batch, in time.
        batch_norm: ``barrier`` (exact) or ``microbatch``.
        deadline_s: how long a device waits for one message.
        wire_dtype: what float32 activations are cast to between devices; None sends them as they are.
        schedule: order of a fused training step, see :class:`Plan`. What it keeps in flight is what has to fit: the
            split, and what runs again, follow from it. None counts all microbatches.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element: 8 for AdamW, 4 for SGD with
            momentum, 0 for plain SGD.
        masks: per buffer that masks a weight, where it is not zero; ``free`` groups neurons by it.
        recompute: what runs again for its backward, to save memory: ``auto``, ``none``, or patterns over module paths,
            of which each module that matches is one group.
        offload: whether what such groups read waits in host memory, on GPUs; forecasts count it as if it stayed.

    Raises:
        PlacementError: if the strategy is unknown or its placement doesn't fit.
        PlanError: if ``recompute`` names no module.
        OutOfMemoryError: if nothing fits.
    """
    groups = groups_of(graph, recompute)
    base = Plan(
        graph,
        cluster,
        Placement({}),
        "",
        num_microbatches,
        batch_norm,
        deadline_s,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        wire_dtype=wire_dtype,
        recompute=recompute if isinstance(recompute, str) else tuple(recompute),
        offload=offload,
        schedule=schedule,
        memory_reserve=memory_reserve,
    )
    looks = Looks(base)
    options: dict[str, Any] = {
        "num_microbatches": num_microbatches,
        "memory_reserve": memory_reserve,
        "optimizer_bytes_per_element": optimizer_bytes_per_element,
    }
    if (holding := looks.holding(groups)) is not None:
        options["holding"] = holding
    strategies = _aware_of(masks)
    check_options(strategy, strategy_options, strategies)
    if isinstance(strategy, str) and strategy == "auto":
        return _settled(_fastest(looks, strategies, groups, options), groups, options)
    if isinstance(strategy, Placement):
        return _given(replace(base, placement=strategy), groups, options)
    constraints = constraints_of(strategy, cluster)
    if constraints is not None:
        placement = by_hand(recomputed(graph, groups), cluster, constraints, num_microbatches=num_microbatches)
        return _given(replace(base, placement=placement), groups, options)
    options.update(strategy_options or {})
    if callable(strategy):
        name = getattr(strategy, "__name__", "custom")
        placement = recomputing(strategy, {}, recompute == "auto")(recomputed(graph, groups), cluster, **options)
        if not isinstance(placement, Placement):
            raise PlacementError(f"the strategy {name} gave a {type(placement).__name__}, not a graphpart.Placement")
        placement.check(graph, len(cluster))
        return _given(replace(base, placement=placement), groups, options, name)
    if strategy not in strategies:
        known = ", ".join(repr(name) for name in ("auto", *strategies))
        raise PlacementError(f"there is no strategy {strategy!r}; give {known}, or a mapping from patterns to devices")
    placement = recomputing(strategies[strategy], groups, recompute == "auto")(graph, cluster, **options)
    return _settled(_named(looks.plan(placement), strategy), groups, options)


def _fastest(
    looks: Looks, strategies: Mapping[str, Strategy], groups: Mapping[str, str], options: Mapping[str, Any]
) -> Plan:
    """The plan with the least forecast time; if none fits, of those with more that runs again."""
    base, tried = looks.base, list[Plan]()

    def forecast_s(placement: Placement) -> float:
        tried.append(looks.plan(placement))
        return tried[-1].timeline.makespan_s

    def compare(automatic: bool) -> tuple[str, Placement, tuple[Candidate, ...]]:
        able = {name: recomputing(strategy, groups, automatic) for name, strategy in strategies.items()}
        return auto(base.graph, base.cluster, forecast_s, strategies=able, **options)

    try:
        name, placement, candidates = compare(False)
    except OutOfMemoryError:
        if base.recompute != "auto" or not trains(base.graph):
            raise
        name, placement, candidates = compare(True)
    return _named(next(plan for plan in tried if plan.placement == placement), name, candidates)


def _named(plan: Plan, strategy: str, candidates: tuple[Candidate, ...] = ()) -> Plan:
    """A plan under the name of its strategy; what is known of it stays known, since it depends on the placement.

    Raises:
        OutOfMemoryError: if its schedule does not fit after all.
    """
    named = replace(plan, strategy=strategy, candidates=candidates)
    if plan.schedule is not None:
        plan.trainer.check(plan.training)
    named.__dict__.update((name, plan.__dict__[name]) for name in _KNOWN if name in plan.__dict__)
    return named


_KNOWN = ("program", "backward", "timeline", "training")
"""Cached properties of a plan that are costly."""


def _settled(plan: Plan, groups: Mapping[str, str], options: Mapping[str, Any]) -> Plan:
    """The plan, with so much run again by choice that every moment of the forecast step fits.

    By a schedule, that was seen to while the strategy placed it.
    """
    if plan.schedule is not None:
        return plan

    def peak_bytes(placement: Placement) -> list[int]:
        curves = replace(plan, placement=placement).memory_over_time
        return [curve.peak.memory.total_bytes for curve in curves]

    found = settled(plan.graph, plan.placement, plan.cluster, groups, peak_bytes, **options)
    return plan if found is plan.placement else replace(plan, placement=found)


def _given(plan: Plan, groups: Mapping[str, str], options: Mapping[str, Any], name: str = "by hand") -> Plan:
    """A placement by its author's decision; a note says where it is forecast not to fit, whatever runs again."""
    plan.placement.check(plan.graph, len(plan.cluster))
    again = {} if plan.recompute == "none" else {**groups, **plan.placement.recompute}
    placement = replace(plan.placement, recompute=again)
    plan = replace(plan, placement=placement, strategy=name)
    found = fitted(plan.graph, placement, plan.cluster, **options) if plan.recompute == "auto" else None
    return _with_memory_note(replace(plan, placement=found or placement))


def _aware_of(masks: Masks | None) -> Mapping[str, Strategy]:
    """All strategies; the one that groups neurons knows the masks."""
    return {**STRATEGIES, "free": partial(STRATEGIES["free"], masks=masks)} if masks else STRATEGIES


def _with_memory_note(plan: Plan) -> Plan:
    """The plan, with a note where a placement by hand is forecast not to fit: the decision is its author's."""
    plan.placement.check(plan.graph, len(plan.cluster))
    try:
        plan.memory.check(plan.graph, plan.placement, plan.cluster, plan.memory_reserve)
    except OutOfMemoryError as error:
        return replace(plan, notes=(*plan.notes, str(error)))
    return plan


def carry_plan(plan: Plan, graph: Graph) -> Plan:
    """The same decision for another trace of the same model: other shapes, or eval mode.

    Parameters stay where they are. Where the batch has fewer samples than the plan has microbatches, each sample is
    its own microbatch.
    """
    placement = carry(plan.placement, plan.graph, graph)
    if plan.recompute == "auto":
        placement = replace(placement, recompute={**placement.recompute, **groups_of(graph, "auto")})
    sizes = [graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()]
    return replace(
        plan,
        graph=graph,
        placement=placement,
        num_microbatches=max(1, min([plan.num_microbatches, *sizes])),
        candidates=(),
    )
