"""One list scheduler for every policy: an idle device takes the best task that is ready."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload

Durations = Mapping[Task, float]
"""Seconds a task; where there are none, every task takes one unit of time."""

Key = Callable[[Task], tuple[Any, ...]]
"""What a device prefers of the tasks that are ready: the one with the least key."""

Unit = tuple[int, Hashable]
"""A device, and what it keeps from a forward for its backward: a microbatch, or one stage of it."""


@dataclass(frozen=True)
class Policy:
    """What a device prefers, and how much it may begin.

    Attributes:
        key: of tasks that are ready, the one with the least key goes first; of equals, the first of the workload.
        unit: what a device keeps from a task's forward for its backward; None if that isn't counted.
        caps: from the kinds of tasks that end a unit (``B``, or ``BW``) to how many units each device may have begun
            and not ended. A unit begins with its first forward task.
    """

    key: Key
    unit: Callable[[Task], Hashable | None] = lambda task: None
    caps: Mapping[str, Sequence[int]] = field(default_factory=dict)


def list_tasks(name: str, workload: Workload, policy: Policy, durations: Durations | None = None) -> Schedule:
    """Let time pass, and note what each device takes when it is idle.

    Segments that a step runs once come as soon as they are ready. A forward task that would begin one unit too many
    for its device is passed over. Where nothing runs and all that is ready is passed over (a barrier waits for every
    microbatch), the caps of the devices concerned are lifted. A device updates its parameters when all else is done.
    The time is O(n log n) for n tasks and the dependencies between them.

    Args:
        name: of the schedule.
        workload: the tasks of the step.
        policy: what to prefer.
        durations: seconds of each task; one unit each if None.

    Raises:
        ScheduleError: if the workload's tasks wait for one another.
    """
    lines = _Engine(workload, policy, durations).run()
    for task in workload.waits_for:
        if task.kind == "U":
            lines[workload.device_of[task]].append(task)
    return Schedule(name, tuple(map(tuple, lines)))


class _Engine:
    """The state of all devices at one point in time. Tasks go by their number in the workload."""

    def __init__(self, workload: Workload, policy: Policy, durations: Durations | None) -> None:
        self.policy = policy
        self.tasks = [task for task in workload.waits_for if task.kind != "U"]
        number = {task: i for i, task in enumerate(self.tasks)}
        self.duration = [1.0 if durations is None else durations[task] for task in self.tasks]
        self.device = [workload.device_of[task] for task in self.tasks]
        self.microbatch = [workload.microbatch_of(task) for task in self.tasks]
        self.missing = [len(workload.waits_for[task]) for task in self.tasks]
        self.followers: list[list[int]] = [[] for _ in self.tasks]
        for task in self.tasks:
            for other in workload.waits_for[task]:
                self.followers[number[other]].append(number[task])
        self.unit = self._units(workload)
        self.ends_left = {
            kinds: Counter(u for u, t in zip(self.unit, self.tasks, strict=True) if u and t.kind in kinds)
            for kinds in policy.caps
        }
        self.num_open = {kinds: [0] * workload.program.num_devices for kinds in policy.caps}
        self.caps: dict[str, list[float]] = {kinds: list(caps) for kinds, caps in policy.caps.items()}
        self.begun: set[Unit] = set()
        # Ready tasks per device as (rank, number): those it may take, and forward tasks that would begin a unit.
        self.ready: list[list[tuple[Any, int]]] = [[] for _ in range(workload.program.num_devices)]
        self.fresh: list[list[tuple[Any, int]]] = [[] for _ in range(workload.program.num_devices)]
        self.fresh_of: defaultdict[Unit, list[tuple[Any, int]]] = defaultdict(list)
        self.idle = [True] * workload.program.num_devices
        self.running: list[tuple[float, int]] = []  # a heap of (end, number)
        self.lines: list[list[Task]] = [[] for _ in range(workload.program.num_devices)]

    def _units(self, workload: Workload) -> list[Unit | None]:
        """Per task, its unit; None where the segment has no backward, and so keeps nothing."""
        kept = workload.backward.segments if workload.backward is not None else {}
        units = (self.policy.unit(task) if task.segment in kept else None for task in self.tasks)
        return [None if unit is None else (at, unit) for at, unit in zip(self.device, units, strict=True)]

    def run(self) -> list[list[Task]]:
        """Per device, its tasks in the order in which it takes them."""
        for number, missing in enumerate(self.missing):
            if not missing:
                self._offer(number)
        now_s = 0.0
        touched: Iterable[int] = range(len(self.idle))
        while True:
            for device in touched:
                self._start(device, now_s)
            if self.running:
                now_s = self.running[0][0]
                touched = sorted(set(self._end(now_s)))
            elif not (touched := self._lift()):
                break
        if left := len(self.tasks) - sum(map(len, self.lines)):
            raise ScheduleError(f"{left} tasks of the program wait for one another")
        return self.lines

    def _offer(self, number: int) -> None:
        """A task is ready: put it where its device looks for it."""
        task, device, unit = self.tasks[number], self.device[number], self.unit[number]
        once = self.microbatch[number] is None and task.kind != "W"
        entry = ((not once, *self.policy.key(task)), number)
        if task.kind == "F" and unit is not None and unit not in self.begun:
            heapq.heappush(self.fresh[device], entry)
            self.fresh_of[unit].append(entry)
        else:
            heapq.heappush(self.ready[device], entry)

    def _start(self, device: int, now_s: float) -> None:
        """Let an idle device take the best task that it may."""
        ready, fresh = self.ready[device], self.fresh[device]
        while fresh and self.unit[fresh[0][1]] in self.begun:  # it has moved to the others
            heapq.heappop(fresh)
        if not self.idle[device]:
            return
        may_begin = fresh and all(self.num_open[kinds][device] < caps[device] for kinds, caps in self.caps.items())
        if may_begin and (not ready or fresh[0] < ready[0]):
            number = heapq.heappop(fresh)[1]
            self._begin(number)
        elif ready:
            number = heapq.heappop(ready)[1]
        else:
            return
        self._count_end(number)
        self.lines[device].append(self.tasks[number])
        self.idle[device] = False
        heapq.heappush(self.running, (now_s + self.duration[number], number))

    def _begin(self, number: int) -> None:
        """A task begins a unit: the others of the unit may follow."""
        device, unit = self.device[number], self.unit[number]
        assert unit is not None
        self.begun.add(unit)
        for kinds, left in self.ends_left.items():
            self.num_open[kinds][device] += left[unit] > 0
        for entry in self.fresh_of.pop(unit):
            if entry[1] != number:
                heapq.heappush(self.ready[device], entry)

    def _count_end(self, number: int) -> None:
        """A device that takes the last task of a unit has it no more by the time it can begin another."""
        unit = self.unit[number]
        for kinds, left in self.ends_left.items():
            if unit is not None and self.tasks[number].kind in kinds:
                left[unit] -= 1
                self.num_open[kinds][self.device[number]] -= left[unit] == 0

    def _end(self, now_s: float) -> Iterator[int]:
        """End all tasks that end now; gives the devices that have something new to look at."""
        while self.running and self.running[0][0] == now_s:
            number = heapq.heappop(self.running)[1]
            self.idle[self.device[number]] = True
            yield self.device[number]
            for follower in self.followers[number]:
                self.missing[follower] -= 1
                if not self.missing[follower]:
                    self._offer(follower)
                    yield self.device[follower]

    def _lift(self) -> list[int]:
        """Nothing runs: lift the caps of the devices that pass over a ready task; gives these devices."""
        blocked = [device for device, fresh in enumerate(self.fresh) if fresh]
        for caps in self.caps.values():
            for device in blocked:
                caps[device] = float("inf")
        return blocked
