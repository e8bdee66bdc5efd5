"""One list scheduler for every policy: an idle device takes the best task that is ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.task_index import Column, TaskIndex
from graphpart.ir.workload import Workload

Durations = Mapping[Task, float]
"""Seconds a task; where there are none, every task takes one unit of time."""

Keys = Sequence[NDArray[Any]]
"""What a device prefers of the tasks that are ready: the least by the first of these, of equals by the next, and so on.
Each has a number for every task, in the order of :attr:`Workload.index`."""


@dataclass(frozen=True, eq=False)
class Policy:
    """What a device prefers, and how much it may begin.

    Attributes:
        keys: of tasks that are ready, the one with the least keys goes first; of equals, the first of the workload.
        unit: per task, what its device keeps from a forward for its backward, by a number from 0 up: a microbatch, or
            one stage of it; -1 if that isn't counted.
        caps: from the kinds of tasks that end a unit (``B``, or ``BW``) to how many units each device may have begun
            and not ended. A unit begins with its first forward task.
    """

    keys: Keys
    unit: Column | None = None
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
    return Schedule(name, tuple(map(tuple, _Engine(workload, policy, durations).run())))


@dataclass(frozen=True, slots=True)
class _Cap:
    """A bound on the units that a device has begun and not ended.

    Attributes:
        ends: per task, whether it is one of those that end its unit.
        num_left: per unit, how many of those are yet to be taken.
        num_open: per device, its units that have begun and not ended.
        most: per device, the bound on them.
    """

    ends: Sequence[bool]
    num_left: list[int]
    num_open: list[int]
    most: list[float]


class _Engine:
    """The state of all devices at one point in time. Tasks go by their number in the workload.

    Where a device looks for the best task, they go by their rank in what it prefers.
    """

    def __init__(self, workload: Workload, policy: Policy, durations: Durations | None) -> None:
        index, num_devices = workload.index, workload.program.num_devices
        self.index, self.num_devices = index, num_devices
        self.device, self.after, self.seconds = index.device.tolist(), index.after, index.seconds(durations)
        is_update = index.kind == "U"
        self.updates = np.flatnonzero(is_update).tolist()
        self.missing = (index.num_before + is_update).tolist()  # an update never is ready: it comes when all is done
        waits = (index.microbatch >= 0) | (index.kind == "W")  # what a step runs once goes first
        by_rank = np.lexsort((*reversed(policy.keys), waits))
        self.by_rank = by_rank.tolist()
        self.rank = np.argsort(by_rank).tolist()
        unit = _units(workload, policy.unit)
        self.unit = unit.tolist()
        self.begun = [False] * (int(unit.max(initial=-1)) + 1)
        self.may_begin = ((index.kind == "F") & (unit >= 0)).tolist()  # per task, whether it may begin a unit
        self.caps = [_cap(index, unit, kinds, most) for kinds, most in policy.caps.items()]
        # Ranks of ready tasks per device: of those it may take, and of forward tasks that would begin a unit.
        self.ready: list[list[int]] = [[] for _ in range(num_devices)]
        self.fresh: list[list[int]] = [[] for _ in range(num_devices)]
        self.fresh_of: dict[int, list[int]] = {}  # per unit
        self.idle = [True] * num_devices
        self.running: list[tuple[float, int]] = []  # a heap of (end, number)
        self.lines: list[list[Task]] = [[] for _ in range(num_devices)]

    def run(self) -> list[list[Task]]:
        """Per device, its tasks in the order in which it takes them."""
        for number, missing in enumerate(self.missing):
            if not missing:
                self._offer(number)
        now_s, touched = 0.0, list(range(self.num_devices))
        while touched:
            for device in touched:
                self._start(device, now_s)
            if self.running:
                now_s = self.running[0][0]
                touched = self._end(now_s)
            else:
                touched = self._lift()
        if left := len(self.index) - len(self.updates) - sum(map(len, self.lines)):
            raise ScheduleError(f"{left} tasks of the program wait for one another")
        for number in self.updates:
            self.lines[self.device[number]].append(self.index.tasks[number])
        return self.lines

    def _offer(self, number: int) -> None:
        """A task is ready: put it where its device looks for it."""
        device, rank = self.device[number], self.rank[number]
        if self.may_begin[number] and not self.begun[unit := self.unit[number]]:
            heappush(self.fresh[device], rank)
            self.fresh_of.setdefault(unit, []).append(rank)
        else:
            heappush(self.ready[device], rank)

    def _start(self, device: int, now_s: float) -> None:
        """Let a device take the best task that it may, if it is idle."""
        if not self.idle[device]:
            return
        ready, fresh = self.ready[device], self.fresh[device]
        while fresh and self.begun[self.unit[self.by_rank[fresh[0]]]]:  # it has moved to the others
            heappop(fresh)
        if fresh and (not ready or fresh[0] < ready[0]) and all(c.num_open[device] < c.most[device] for c in self.caps):
            number = self.by_rank[heappop(fresh)]
            self._begin(number)
        elif ready:
            number = self.by_rank[heappop(ready)]
        else:
            return
        for cap in self.caps:  # a device that takes the last task of a unit has it no more when it can begin another
            if cap.ends[number]:
                unit = self.unit[number]
                cap.num_left[unit] -= 1
                cap.num_open[device] -= not cap.num_left[unit]
        self.lines[device].append(self.index.tasks[number])
        self.idle[device] = False
        heappush(self.running, (now_s + self.seconds[number], number))

    def _begin(self, number: int) -> None:
        """A task begins a unit: the others of the unit may follow."""
        device, unit = self.device[number], self.unit[number]
        self.begun[unit] = True
        for cap in self.caps:
            cap.num_open[device] += cap.num_left[unit] > 0
        for rank in self.fresh_of.pop(unit):
            if rank != self.rank[number]:
                heappush(self.ready[device], rank)

    def _end(self, now_s: float) -> list[int]:
        """End all tasks that end now; gives the devices that have something new to look at."""
        running, missing, device_of = self.running, self.missing, self.device
        touched = []
        while running and running[0][0] == now_s:
            number = heappop(running)[1]
            self.idle[device_of[number]] = True
            touched.append(device_of[number])
            for follower in self.after[number]:
                missing[follower] -= 1
                if not missing[follower]:
                    self._offer(follower)
                    touched.append(device_of[follower])
        return touched

    def _lift(self) -> list[int]:
        """Nothing runs: lift the caps of the devices that pass over a ready task; gives these devices."""
        blocked = [device for device, fresh in enumerate(self.fresh) if fresh]
        for cap in self.caps:
            for device in blocked:
                cap.most[device] = float("inf")
        return blocked


def _units(workload: Workload, unit: Column | None) -> Column:
    """Per task, its device's unit, numbered anew for all devices; -1 where the segment keeps nothing for a backward."""
    index, works = workload.index, workload.backward.segments if workload.backward is not None else {}
    if unit is None or not works:
        return np.full(len(index), -1)
    is_kept = np.zeros(len(index), bool)
    is_kept[: len(index.segments)] = [segment.name in works for segment in index.segments]
    return np.where(is_kept & (unit >= 0), index.device * (unit.max() + 1) + unit, -1)


def _cap(index: TaskIndex, unit: Column, kinds: str, most: Sequence[int]) -> _Cap:
    ends = np.isin(index.kind, list(kinds)) & (unit >= 0)
    num_left = np.bincount(unit[ends], minlength=int(unit.max(initial=-1)) + 1)
    return _Cap(ends.tolist(), num_left.tolist(), [0] * len(most), list(most))
