"""Runs the backward of partitioned models in two parts, behind their usual face."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order import dry_run, gpipe
from graphpart.runtime.executor import Launch, LaunchBackward, StepRun
from graphpart.runtime.local import LocalExecutor

Order = Callable[[Workload], Schedule]


def weights_at_random(rng: random.Random) -> Order:
    """GPipe's order with every task of weights anywhere after the backward of its inputs."""

    def order(workload: Workload) -> Schedule:
        lines = []
        for line in gpipe(workload).tasks:
            kept = [task for task in line if task.kind != "W"]
            late = [task for task in line if task.kind == "W"]
            rng.shuffle(late)
            for task in late:
                first = kept.index(Task("B", task.segment)) + 1
                kept.insert(rng.randint(first, len(kept)), task)
            lines.append(tuple(kept))
        return Schedule("weights at random", tuple(lines))

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

    def backward_split(self: Launch, live: frozenset[str]) -> LaunchBackward:
        whole = backward(self, live)
        workload = Workload(self.program, whole.backward, split=True)
        schedule = order(workload)
        dry_run(workload, schedule)
        ran.extend(task for line in schedule.tasks for task in line if task.kind == "W")
        return replace(whole, schedule=schedule)

    with (
        mock.patch.object(LocalExecutor, "start", start_split),
        mock.patch.object(Launch, "backward", backward_split),
    ):
        yield ran
