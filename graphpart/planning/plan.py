"""A plan: the decision, its forecast and its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from graphpart.cost import MemoryForecast, forecast_memory, forecast_together
from graphpart.cost.memory.curve import MemoryCurve, memory_over_time
from graphpart.cost.memory.rerun_report import rerun_costs
from graphpart.draw.picture.dot import plan_dot
from graphpart.draw.picture.render import render
from graphpart.draw.words.table import WIDTH, explain
from graphpart.ir.cluster import Cluster
from graphpart.ir.degrees import Degrees
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import DEFAULT_DEADLINE_S, Backward, Program
from graphpart.ir.timeline import Timeline
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, live_outputs, lower, trained_outputs
from graphpart.order import gpipe
from graphpart.planning.choices import AUTO, DEFAULT_CHOICES, Choices, ScheduleChoice
from graphpart.planning.fused_step import FusedStep, FusedSteps
from graphpart.simulator import simulate_workload
from graphpart.strategies import Candidate, degrees_of


@dataclass(frozen=True)
class Plan:
    """Where everything of a model lives and runs, and what that is expected to cost.

    Attributes:
        graph: the traced model.
        cluster: the devices.
        placement: the decision.
        strategy: what made it: the name of a strategy or of a function, or ``by hand``.
        choices: what the user decided.
        candidates: what was compared, if anything was.
        notes: what a user should know.
    """

    graph: Graph
    cluster: Cluster
    placement: Placement
    strategy: str
    choices: Choices = DEFAULT_CHOICES
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_microbatches(self) -> int:
        """Parts of the batch, in time."""
        return self.choices.num_microbatches

    @property
    def schedule(self) -> ScheduleChoice | None:
        """The order of a fused step; None: as plain calls run, which is then what :attr:`timeline` forecasts."""
        return self.choices.schedule

    @property
    def degrees(self) -> Degrees | None:
        """The degrees that the plan was made to; None where it was made otherwise."""
        return degrees_of(self.choices.strategy)

    @property
    def deadline_s(self) -> float:
        """How long a device waits for one message, in seconds."""
        return DEFAULT_DEADLINE_S if self.choices.deadline_s is None else self.choices.deadline_s

    @cached_property
    def program(self) -> Program:
        """The lowered program: segments and bridges."""
        program = lower(
            self.graph,
            self.placement,
            len(self.cluster),
            num_microbatches=self.num_microbatches,
            batch_norm=self.choices.batch_norm,
            deadline_s=self.deadline_s,
            wire_dtype=self.choices.wire_dtype,
        )
        return replace(program, offload=self.choices.offload)

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
        return simulate_workload(workload, gpipe(workload), self.cluster)

    @cached_property
    def training(self) -> FusedStep:
        """The fused training step: its tasks, their order and its forecast.

        Raises:
            OutOfMemoryError: if a strategy placed the model, and the step does not fit. Other placements are their
                authors' decision.
        """
        step = self.trainer.step(self.schedule or AUTO)
        if isinstance(self.choices.strategy, str):
            self.trainer.check(step)
        return step

    @cached_property
    def trainer(self) -> FusedSteps:
        """What makes and compares fused steps of this plan."""
        return FusedSteps(
            self.graph,
            self.cluster,
            self.placement,
            self.program,
            self.all_in_flight,
            trained_outputs(self.program),
            self.choices,
        )

    @cached_property
    def memory(self) -> MemoryForecast:
        """The forecast of memory per device: when it is fullest by :attr:`schedule`; without one, all in flight."""
        if self.schedule is None:
            return self.all_in_flight
        peaks = tuple(curve.peak.memory for curve in self.training.memory)
        return MemoryForecast(peaks, self.choices.optimizer_bytes_per_element)

    @cached_property
    def all_in_flight(self) -> MemoryForecast:
        """The forecast of memory per device with all microbatches in flight, as plain calls have them."""
        return forecast_memory(
            self.graph,
            self.placement,
            len(self.cluster),
            num_microbatches=self.num_microbatches,
            optimizer_bytes_per_element=self.choices.optimizer_bytes_per_element,
        )

    @cached_property
    def memory_over_time(self) -> tuple[MemoryCurve, ...]:
        """The forecast of memory per device over one training step."""
        if self.schedule is not None:
            return self.training.memory
        return memory_over_time(
            self.graph, self.placement, self.program, self.backward, self.timeline, self.all_in_flight
        )

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
                optimizer_bytes_per_element=self.choices.optimizer_bytes_per_element,
                in_flight=None if self.schedule is None else self.trainer.in_flight(self.training),
            ),
            schedule="" if self.schedule is None else self.training.explain(WIDTH),
            degrees=self.degrees,
        )

    def dot(self, *, max_boxes: int = 60, bridges: bool | None = None, title: str = "") -> str:
        """Graphviz source of the plan's picture, see :func:`graphpart.draw.picture.dot.plan_dot`."""
        return plan_dot(
            self.graph,
            self.placement,
            self.cluster,
            self.program,
            max_boxes=max_boxes,
            bridges=bridges,
            title=title,
            degrees=self.degrees,
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
        from graphpart.planning.file import save_plan

        return save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote; needs neither the model nor torch.

        Raises:
            PlanError: if the file is no plan, or of a later version.
        """
        from graphpart.planning.file import load_plan

        return load_plan(path)

    def __str__(self) -> str:
        return self.explain()


def memory_together(plans: Sequence[Plan]) -> MemoryForecast:
    """The memory per device of plans that run one after the other, and all wait for backward.

    Args:
        plans: at least one, for the same devices.
    """
    return forecast_together([(plan.graph, plan.placement, plan.all_in_flight) for plan in plans])
