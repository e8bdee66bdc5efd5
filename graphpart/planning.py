"""A plan: the decision, its forecast and its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from graphpart.cost import MemoryForecast, forecast_memory
from graphpart.cost.memory import ADAMW_BYTES_PER_ELEMENT, trains
from graphpart.cost.memory_curve import MemoryCurve, memory_over_time
from graphpart.cost.recompute import recomputed
from graphpart.cost.rerun import rerun_costs
from graphpart.draw.dot import plan_dot
from graphpart.draw.render import render
from graphpart.draw.table import WIDTH, explain
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import DEFAULT_DEADLINE_S, Backward, Program
from graphpart.ir.timeline import Timeline
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, live_outputs, lower, trained_outputs
from graphpart.order import gpipe
from graphpart.scheduling import AUTO, ScheduleChoice, Trainer, Training
from graphpart.simulator import simulate as simulate_program
from graphpart.strategies import (
    STRATEGIES,
    Candidate,
    Masks,
    Recompute,
    Strategy,
    auto,
    by_hand,
    carry,
    check_options,
    constraints_of,
    fitted,
    groups_of,
    recomputing,
    settled,
)


@dataclass(frozen=True)
class Plan:
    """Where everything of a model lives and runs, and what that is expected to cost.

    Attributes:
        graph: the traced model.
        cluster: the devices.
        placement: the decision.
        strategy: what made it.
        num_microbatches: parts of the batch, in time.
        batch_norm: ``barrier`` or ``microbatch``, see :func:`graphpart.lower.lower`.
        deadline_s: how long a device waits for one message.
        candidates: what was compared, if anything was.
        notes: what a user should know.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW's by default.
        wire_dtype: what float32 activations are cast to between devices, see :func:`graphpart.lower.lower`.
        recompute: what was asked to run again for its backward: ``auto``, ``none``, or patterns.
        offload: whether what such groups read waits in host memory, on GPUs.
        schedule: order of the tasks of :meth:`~graphpart.runtime.module.PartitionedModule.train_step`: a name in
            :data:`graphpart.order.SCHEDULES`, ``auto``, ``async`` or an :class:`~graphpart.order.Async`. None: as plain
            calls and ``loss.backward()`` run (GPipe, no update), which is then what :attr:`timeline` forecasts, while
            ``train_step`` takes ``auto``.
    """

    graph: Graph
    cluster: Cluster
    placement: Placement
    strategy: str
    num_microbatches: int = 1
    batch_norm: str = "barrier"
    deadline_s: float = DEFAULT_DEADLINE_S
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    optimizer_bytes_per_element: float = ADAMW_BYTES_PER_ELEMENT
    wire_dtype: str | None = None
    recompute: str | tuple[str, ...] = "auto"
    offload: bool = False
    schedule: ScheduleChoice | None = None

    @cached_property
    def program(self) -> Program:
        """The lowered program: segments and bridges."""
        program = lower(
            self.graph,
            self.placement,
            len(self.cluster),
            num_microbatches=self.num_microbatches,
            batch_norm=self.batch_norm,
            deadline_s=self.deadline_s,
            wire_dtype=self.wire_dtype,
        )
        return replace(program, offload=self.offload)

    @cached_property
    def backward(self) -> Backward:
        """The backward pass when every differentiable output gets a gradient; with a loss among them, only that."""
        return backward_of(self.program, live_outputs(self.program))

    @cached_property
    def timeline(self) -> Timeline:
        """The forecast of one training step, by :attr:`schedule`."""
        if self.schedule is not None:
            return self.training.timeline
        workload = Workload(self.program, self.backward)
        return simulate_program(workload, gpipe(workload), self.cluster, self.graph)

    @cached_property
    def training(self) -> Training:
        """The fused training step: its tasks, their order and its forecast."""
        outputs = trained_outputs(self.program)
        trainer = Trainer(
            self.graph,
            self.cluster,
            self.placement,
            self.program,
            self.memory,
            outputs,
            self.optimizer_bytes_per_element,
        )
        training = trainer.training(self.schedule or AUTO)
        if self.strategy and self.strategy != "by hand":  # a placement by hand is its author's decision
            trainer.check(training)
        return training

    @cached_property
    def memory(self) -> MemoryForecast:
        """The forecast of memory per device."""
        return forecast_memory(
            self.graph,
            self.placement,
            len(self.cluster),
            num_microbatches=self.num_microbatches,
            optimizer_bytes_per_element=self.optimizer_bytes_per_element,
        )

    @cached_property
    def memory_over_time(self) -> tuple[MemoryCurve, ...]:
        """The forecast of memory per device over one training step."""
        if self.schedule is not None:
            return self.training.memory
        return memory_over_time(self.graph, self.placement, self.program, self.backward, self.timeline, self.memory)

    def explain(self) -> str:
        """The plan in words: devices, bridges, candidates, and operators that have to stay whole."""
        memory = dict(enumerate(self.memory.devices))
        return explain(
            self.graph,
            self.placement,
            self.cluster,
            self.program,
            memory,
            self.candidates,
            self.timeline,
            self.notes,
            backward=self.backward,
            reruns=rerun_costs(
                self.graph,
                self.placement,
                self.cluster,
                num_microbatches=self.num_microbatches,
                optimizer_bytes_per_element=self.optimizer_bytes_per_element,
            ),
            schedule="" if self.schedule is None else self.training.explain(WIDTH),
        )

    def dot(self, *, max_boxes: int = 60, bridges: bool | None = None, title: str = "") -> str:
        """Graphviz source of the plan's picture, see :func:`graphpart.draw.dot.plan_dot`."""
        return plan_dot(
            self.graph,
            self.placement,
            self.cluster,
            self.program,
            max_boxes=max_boxes,
            bridges=bridges,
            title=title,
        )

    def draw(self, path: str | Path, *, max_boxes: int = 60, bridges: bool | None = None, title: str = "") -> Path:
        """Draw the plan to ``.svg``, ``.png``, ``.pdf`` or ``.dot``.

        Args:
            path: where to; the suffix says what.
            max_boxes: most boxes; operators fold until they are no more.
            bridges: whether to draw every slice, concat, sum, send and receive, each device's in a frame of its own;
                by default where operators are cut and the whole program is small enough.
            title: heading; the model's name if empty.

        Raises:
            DrawError: if Graphviz isn't installed (the DOT source is written), the suffix is unknown, or bridges
                cannot be drawn in so few boxes.
        """
        return render(self.dot(max_boxes=max_boxes, bridges=bridges, title=title), path)

    def save(self, path: str | Path) -> Path:
        """Write the plan, its graph and its cluster as JSON."""
        from graphpart.plan_file import save_plan

        return save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote; needs neither the model nor torch.

        Raises:
            PlanError: if the file is no plan, or of a later version.
        """
        from graphpart.plan_file import load_plan

        return load_plan(path)

    def __str__(self) -> str:
        return self.explain()


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
        schedule: order of a fused training step, see :class:`Plan`.
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
    )
    options: dict[str, Any] = {
        "num_microbatches": num_microbatches,
        "memory_reserve": memory_reserve,
        "optimizer_bytes_per_element": optimizer_bytes_per_element,
    }
    strategies = _aware_of(masks)
    check_options(strategy, strategy_options, strategies)
    if isinstance(strategy, str) and strategy == "auto":
        return _settled(_fastest(base, strategies, groups, options), groups, options)
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
    return _settled(replace(base, placement=placement, strategy=strategy), groups, options)


def _fastest(
    base: Plan, strategies: Mapping[str, Strategy], groups: Mapping[str, str], options: Mapping[str, Any]
) -> Plan:
    """The plan with the least forecast time; if none fits, of those with more that runs again."""
    tried: list[Plan] = []

    def forecast_s(placement: Placement) -> float:
        tried.append(replace(base, placement=placement))
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
    lowered = next(plan for plan in tried if plan.placement is placement)
    chosen = replace(lowered, strategy=name, candidates=candidates)
    # Cached properties: they depend on the placement alone.
    for known in ("program", "backward", "timeline"):
        chosen.__dict__[known] = getattr(lowered, known)
    return chosen


def _settled(plan: Plan, groups: Mapping[str, str], options: Mapping[str, Any]) -> Plan:
    """The plan, with so much run again by choice that every moment of the forecast step fits."""

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
    return _with_memory_note(replace(plan, placement=found or placement), options["memory_reserve"])


def _aware_of(masks: Masks | None) -> Mapping[str, Strategy]:
    """All strategies; the one that groups neurons knows the masks."""
    return {**STRATEGIES, "free": partial(STRATEGIES["free"], masks=masks)} if masks else STRATEGIES


def _with_memory_note(plan: Plan, memory_reserve: float) -> Plan:
    """The plan, with a note where a placement by hand is forecast not to fit: the decision is its author's."""
    plan.placement.check(plan.graph, len(plan.cluster))
    try:
        plan.memory.check(plan.graph, plan.placement, plan.cluster, memory_reserve)
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
