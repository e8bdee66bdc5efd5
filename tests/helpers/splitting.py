"""Runs the backward of partitioned models in two parts, behind their usual face."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from graphpart.ir.schedule import Schedule, Task, is_ready
from graphpart.ir.workload import Workload
from graphpart.order import gpipe
from graphpart.runtime.executors.launch import Launch, LaunchTasks, StepRun
from graphpart.runtime.executors.threads import LocalExecutor

Order = Callable[[Workload], Schedule]


def weights_at_random(rng: random.Random) -> Order:
    """GPipe's order with every task of weights anywhere between what it waits for and what waits for it."""

    def order(workload: Workload) -> Schedule:
        left = [[task for task in line if task.kind != "W"] for line in gpipe(workload).tasks]
        late = [task for task in workload.waits_for if task.kind == "W"]
        done = {task for task in workload.waits_for if task.kind == "F"}
        lines: list[list[Task]] = [[task for task in line if task in done] for line in left]
        left = [[task for task in line if task not in done] for line in left]
        while late or any(left):
            may_run = [t for t in (*late, *(line[0] for line in left if line)) if is_ready(t, done, workload.waits_for)]
            task = rng.choice(may_run)
            (late if task.kind == "W" else left[workload.device_of[task]]).remove(task)
            lines[workload.device_of[task]].append(task)
            done.add(task)
        return Schedule("weights at random", tuple(map(tuple, lines)))

    return order


@contextmanager
def split_backward(order: Order = gpipe) -> Iterator[list[Task]]:
    """Inside, every backward is in two parts, in this order; gives the tasks of weights of each backward that ran."""
    start, backward = LocalExecutor.start, Launch.backward
    ran: list[Task] = []

    def start_split(self: LocalExecutor, *args: Any, **kwargs: Any) -> StepRun:
        step = start(self, *args, **kwargs)
        for run in step.runs.values():
            run.split = True
        return step

    def backward_split(self: Launch, live: frozenset[str]) -> LaunchTasks:
        whole = backward(self, live)
        workload = Workload(self.program, whole.backward, split=True)
        schedule = order(workload)
        ran.extend(task for line in schedule.tasks for task in line if task.kind == "W")
        return LaunchTasks.prepare(workload, schedule, self.code)

    with (
        mock.patch.object(LocalExecutor, "start", start_split),
        mock.patch.object(Launch, "backward", backward_split),
    ):
        yield ran
