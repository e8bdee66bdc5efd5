"""A program made ready to run, its steps, and what runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.program import Backward, Program
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.timeline import Event, Timeline
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of
from graphpart.order import dry_run, gpipe
from graphpart.runtime.device.device_code import BackwardCode, DeviceCode
from graphpart.runtime.device.mailbox import Counters
from graphpart.runtime.device.step_work import Collector, StepWork
from graphpart.runtime.device.worker import DeviceRun
from graphpart.runtime.executors.fingerprint import Claim

T = TypeVar("T")
StepT = TypeVar("StepT", bound="StepRun")


@dataclass
class Launch:
    """A program made ready to run: compiled per device, its schedules checked.

    Attributes:
        program: what runs.
        graph: where it comes from.
        cluster: the devices.
        devices: torch device per index.
        code: compiled code per device index; only those that this process runs.
    """

    program: Program
    graph: Graph
    cluster: Cluster
    devices: tuple[torch.device, ...]
    code: Mapping[int, DeviceCode]
    _backwards: dict[frozenset[str], LaunchTasks] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        program: Program,
        graph: Graph,
        cluster: Cluster,
        devices: tuple[torch.device, ...],
        own: tuple[int, ...],
        forecast_bytes: Sequence[float],
    ) -> Launch:
        """Compile a program for the devices of this process, and run it dry.

        Args:
            program: what is to run.
            graph: where it comes from.
            cluster: the devices as the plan knows them.
            devices: torch device per index.
            own: devices whose work this process does.
            forecast_bytes: memory that the plan expects each device to take, for errors.

        Raises:
            ScheduleError: if the schedule would wait for ever.
            UnsupportedOperatorError: if an operator cannot run here.
        """
        code = {i: DeviceCode.build(program, graph, i, devices[i], cluster.devices[i], forecast_bytes[i]) for i in own}
        launch = cls(program, graph, cluster, devices, code)
        dry_run(Workload(program), launch.forward_schedule)
        return launch

    @cached_property
    def forward_schedule(self) -> Schedule:
        """The order of forward tasks."""
        return gpipe(Workload(self.program))

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Devices that run a segment or keep something that others read."""
        busy = {s.device for s in self.program.segments} | {b.source for b in self.program.bridges}
        return tuple(sorted(busy)) or (0,)

    def backward(self, live: frozenset[str]) -> LaunchTasks:
        """The backward pass for one set of outputs that got a gradient; made once for each set."""
        if live not in self._backwards:
            workload = Workload(self.program, backward_of(self.program, live))
            self._backwards[live] = LaunchTasks.prepare(workload, gpipe(workload), self.code)
        return self._backwards[live]


@dataclass(frozen=True)
class LaunchTasks:
    """A workload with a backward pass, made ready to run.

    Attributes:
        workload: its tasks.
        schedule: their order, checked.
        code: per device of this process, its part of the backward pass.
    """

    workload: Workload
    schedule: Schedule
    code: Mapping[int, BackwardCode]

    @classmethod
    def prepare(cls, workload: Workload, schedule: Schedule, own: Iterable[int]) -> LaunchTasks:
        """Check the order, and pick the parts of some devices.

        Raises:
            ScheduleError: if the schedule would wait for ever, or does not fit the workload.
        """
        dry_run(workload, schedule)
        return cls.of(workload, schedule, own)

    @classmethod
    def of(cls, workload: Workload, schedule: Schedule, own: Iterable[int]) -> LaunchTasks:
        """Pick the parts of some devices, in an order that has been checked."""
        backward = workload.backward
        assert backward is not None
        return cls(workload, schedule, {i: BackwardCode.build(workload.program, backward, i) for i in own})

    @property
    def backward(self) -> Backward:
        """The backward pass."""
        assert self.workload.backward is not None
        return self.workload.backward


@dataclass
class StepRun:
    """One forward, and the backward that may follow it.

    Attributes:
        launch: what runs.
        runs: per device index, that device's state.
        counters: messages sent by this process, forward and backward.
    """

    launch: Launch
    runs: Mapping[int, DeviceRun]
    counters: Mapping[int, Counters]

    @property
    def staleness(self) -> Counter[int]:
        """Per number of updates between a task's forward and its backward, how many tasks had so many."""
        found: Counter[int] = Counter()
        for run in self.runs.values():
            found.update(run.versions.staleness if run.versions is not None else ())
        return found

    def recorded(self) -> Recorded:
        """What was noted, if recording was on, without the step's values."""
        return Recorded(
            tuple(event for run in self.runs.values() for event in run.events),
            tuple(device.name for device in self.launch.cluster.devices[: self.launch.program.num_devices]),
            sum(c.num_messages for c in self.counters.values()),
            sum(c.message_bytes for c in self.counters.values()),
        )


@dataclass(frozen=True)
class Recorded:
    """What workers noted of a step.

    Attributes:
        events: by the clock of the process.
        device_names: per device.
        num_messages: messages sent.
        message_bytes: bytes sent.
    """

    events: tuple[Event, ...]
    device_names: tuple[str, ...]
    num_messages: int
    message_bytes: int

    def timeline(self) -> Timeline:
        """The events in the order of their start, from the step's start; a message knows who reads it first."""
        events = sorted(self.events, key=lambda e: e.start_s)
        start_s = events[0].start_s if events else 0.0
        readers: dict[tuple[str, int | None, int | None], Task | None] = {
            (e.name, e.peer, e.device): e.reader for e in events if e.kind == "wait"
        }
        moved = tuple(
            event._replace(
                start_s=event.start_s - start_s,
                end_s=event.end_s - start_s,
                reader=event.reader or readers.get((event.name, event.device, event.peer)),
            )
            for event in events
        )
        return Timeline(
            len(self.device_names),
            moved,
            self.num_messages,
            self.message_bytes,
            device_names=self.device_names,
        )


class Executor(Protocol[StepT]):
    """Runs launches; the steps that it is given are those that it started.

    Attributes:
        own: indices of the devices whose work this process does.
        distributed: whether each device has a process of its own.
        num_compared: how many claims it has compared over processes.
    """

    own: tuple[int, ...]
    distributed: bool
    num_compared: int

    def start(
        self,
        launch: Launch,
        read_source: Callable[[int, str], Tensor],
        *,
        grad: bool,
        seed: int,
        dropout_off: bool,
        record: bool,
    ) -> StepT:
        """A new step's state on the devices of this process."""

    def one_at_a_time(self) -> AbstractContextManager[None]:
        """Within, only one device computes at any time in a fused step: each task's own time can be measured.

        Raises:
            GraphpartError: if devices cannot take turns.
        """

    def check_same(self, claim: Claim) -> int:
        """Raise where processes are about to do different things; returns the seed that all use: the first one's."""

    def gather(self, part: T) -> list[T]:
        """What each process gives, by rank; any value that can be pickled."""

    def add_over_devices(self, gradients: Sequence[Tensor]) -> Tensor:
        """A gradient summed over devices in their order, from the terms of those of this process; all are settled."""

    def forward(self, step: StepT) -> dict[str, Tensor]:
        """Run the forward; returns output and update wires as this process is to see them."""

    def train(
        self, step: StepT, launched: LaunchTasks, seeds: Mapping[str, Tensor], work: StepWork
    ) -> dict[str, Tensor]:
        """Run a fused step: forward, backward and updates; returns as :meth:`forward` does."""

    def on_each_device(self, step: StepT, work: Callable[[int], None]) -> None:
        """Do something for each device of this process, at once."""

    def backward(
        self, step: StepT, launched: LaunchTasks, seeds: Mapping[str, Tensor], collector: Collector
    ) -> dict[int, dict[str, Tensor]]:
        """Run the backward: parameters' gradients go to the collector, those of inputs are returned per device."""
