"""Which order a fused training step runs in: a schedule by name, or the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from graphpart.cost.memory.curve import MemoryCurve, memory_over_time
from graphpart.cost.memory.forecast import MemoryForecast, forecast_memory, usable_bytes
from graphpart.cost.time.task_times import task_times
from graphpart.draw.timeline.compare import WORK_NAMES
from graphpart.errors import OutOfMemoryError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import Backward, Program
from graphpart.ir.quantities import format_bytes
from graphpart.ir.schedule import Schedule
from graphpart.ir.timeline import Timeline
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, parts_of, terms_of
from graphpart.order import SCHEDULES, Async, asynchronous, dry_run, in_flight, make_schedule, staircase
from graphpart.planning.choices import ASYNC, AUTO, Choices, ScheduleChoice, check_schedule
from graphpart.simulator import simulate_workload

MOST_STAIRCASE_ROWS = 16
"""A staircase of more devices is not shown."""


@dataclass(frozen=True)
class FusedStep:
    """A fused training step as planned, run dry: whoever has one may launch it.

    Attributes:
        workload: its tasks.
        schedule: their order on each device.
        timeline: the forecast.
        memory: the forecast of memory per device, over the step.

    Raises:
        ScheduleError: if the schedule would wait for ever, or does not fit the workload.
    """

    workload: Workload
    schedule: Schedule
    timeline: Timeline
    memory: tuple[MemoryCurve, ...]

    def __post_init__(self) -> None:
        dry_run(self.workload, self.schedule)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per device, the most memory in use."""
        return tuple(curve.peak.memory.total_bytes for curve in self.memory)

    def explain(self, num_columns: int) -> str:
        """The order in words, with its staircase where that fits: a row a device, a column a unit of time.

        Args:
            num_columns: of the terminal.
        """
        most = max(in_flight(self.workload, self.schedule))
        tasks = max(map(len, self.schedule.tasks))
        title = f"Schedule {self.schedule.name}: up to {tasks} tasks a device, {most} microbatches in flight"
        if tasks * len("0F0") > num_columns:  # far too long to be worth drawing
            return title
        drawing = staircase(self.workload, self.schedule)
        if max(map(len, drawing.splitlines())) > num_columns or len(self.schedule.tasks) > MOST_STAIRCASE_ROWS:
            return title
        kinds = {task.kind for line in self.schedule.tasks for task in line}
        legend = ", ".join(f"{kind} {word}" for kind, word in WORK_NAMES.items() if kind in kinds)
        return f"{title}\n{legend}; after its stage, before its microbatch\n{drawing}"


@dataclass(frozen=True)
class FusedSteps:
    """The fused steps that one plan may take, by schedule: made when asked for, and compared.

    Attributes:
        graph: the traced model, loss included.
        cluster: the devices.
        placement: where everything runs and lives.
        program: the lowered program.
        forecast: memory by device with all microbatches in flight.
        outputs: wires of the outputs that get a gradient.
        choices: what the user decided: optimizer state to count and memory to leave free.
    """

    graph: Graph
    cluster: Cluster
    placement: Placement
    program: Program
    forecast: MemoryForecast
    outputs: Sequence[str]
    choices: Choices

    def step(self, choice: ScheduleChoice) -> FusedStep:
        """The step by one schedule; ``auto`` takes the fastest that fits, and of equals the one with least memory.

        Only synchronous schedules are compared: asynchronous ones give other numbers, and have to be asked for.

        Raises:
            ArgumentError: if there is no schedule of this name.
        """
        if choice != AUTO:
            return self._by(choice)
        if self.program.num_microbatches == 1:  # no schedule has anything to choose
            return self._by("gpipe")
        found = [self._by(each) for each in SCHEDULES]
        return min(found, key=lambda t: (self._excess_bytes(t), round(t.timeline.makespan_s, 9), max(t.peak_bytes)))

    def thriftiest(self, choice: ScheduleChoice) -> FusedStep:
        """The step by one schedule; for ``auto``, which turns to it where memory is short, the one that fills least."""
        if choice != AUTO or self.program.num_microbatches == 1:
            return self.step(choice)
        return min((self._by(each) for each in SCHEDULES), key=self._fullness)

    def in_flight(self, step: FusedStep) -> tuple[float, ...]:
        """Per device, of how many microbatches it keeps activations when it keeps most.

        Not whole where it keeps only some of a microbatch's: those of one of its stages, or what late gradients of
        weights need.
        """
        num_microbatches = self.program.num_microbatches
        nothing = forecast_memory(
            self.graph, self.placement, len(self.cluster), num_microbatches=num_microbatches, in_flight=0
        )
        found = []
        for curve, none, whole in zip(step.memory, nothing.devices, self.forecast.devices, strict=True):
            most_bytes = max(moment.memory.saved_bytes for moment in curve.moments) - none.saved_bytes
            all_bytes = whole.saved_bytes - none.saved_bytes
            found.append(num_microbatches * min(max(most_bytes, 0) / all_bytes, 1.0) if all_bytes else 0.0)
        return tuple(found)

    @cached_property
    def backward(self) -> Backward:
        """The backward pass from the terms of the outputs, the same for every schedule.

        Where there is no loss yet, each microbatch's part of an output counts as one: a loss is to come.
        """
        wire = self.program.wire
        terms = [
            term
            for output in self.outputs
            for term in (terms_of if wire[output].shape == () else parts_of)(self.program, output)
        ]
        return backward_of(self.program, dict.fromkeys(terms))

    @cached_property
    def _made(self) -> dict[ScheduleChoice, FusedStep]:
        return {}

    def _by(self, choice: ScheduleChoice) -> FusedStep:
        check_schedule(choice)
        if choice not in self._made:
            self._made[choice] = self._make(choice)
        return self._made[choice]

    def _make(self, choice: ScheduleChoice) -> FusedStep:
        options = Async() if choice == ASYNC else choice
        make: Callable[..., Schedule]
        if isinstance(options, Async):
            every, stash = options.update_every, options.stash_weights
            workload = Workload(self.program, self.backward, updates=True, update_every=every, stash_weights=stash)
            make = partial(asynchronous, options=options)
        else:
            workload = Workload(self.program, self.backward, split=SCHEDULES[options].split, updates=True)
            make = partial(make_schedule, options)
        optimizer_bytes = self.choices.optimizer_bytes_per_element
        times = task_times(workload, self.cluster, optimizer_bytes_per_element=optimizer_bytes)
        schedule = make(workload, durations=times)
        timeline = simulate_workload(workload, schedule, self.cluster, times=times)
        memory = memory_over_time(self.graph, self.placement, self.program, self.backward, timeline, self.forecast)
        return FusedStep(workload, schedule, timeline, memory)

    def check(self, step: FusedStep) -> None:
        """Refuse a step whose microbatches in flight do not fit.

        Raises:
            OutOfMemoryError: naming the device, what it would hold and when, and a schedule that would fit.
        """
        if not self._excess_bytes(step):
            return
        index, curve = max(
            enumerate(step.memory), key=lambda pair: pair[1].peak.memory.total_bytes - self._memory_bytes(pair[0])
        )
        peak, flying = curve.peak, in_flight(step.workload, step.schedule)[index]
        others = [name for name in SCHEDULES if not self._excess_bytes(self._by(name))]
        remedy = f"schedule={others[0]!r} would fit" if others else "cut the batch into more microbatches, or recompute"
        raise OutOfMemoryError(
            f"by schedule {step.schedule.name!r}, device {index} ({self.cluster.devices[index].name}) would hold "
            f"{format_bytes(peak.memory.total_bytes)} of its {format_bytes(self._memory_bytes(index))}, "
            f"with {flying} of {self.program.num_microbatches} microbatches in flight; {remedy}"
        )

    def _memory_bytes(self, device: int) -> float:
        return usable_bytes(self.cluster.devices[device], self.choices.memory_reserve)

    def _fullness(self, step: FusedStep) -> float:
        """Part of its memory that the fullest device fills."""
        return max(peak / max(self._memory_bytes(device), 1) for device, peak in enumerate(step.peak_bytes))

    def _excess_bytes(self, step: FusedStep) -> float:
        """Bytes by which the fullest device is over its memory."""
        return max(0, *(peak - self._memory_bytes(device) for device, peak in enumerate(step.peak_bytes)))
