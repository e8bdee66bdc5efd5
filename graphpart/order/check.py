"""Run a schedule dry: find a deadlock before anything is launched."""

from __future__ import annotations

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task, is_ready
from graphpart.ir.workload import Workload


def dry_run(workload: Workload, schedule: Schedule) -> None:
    """Let every device work through its tasks in order, without computing.

    Raises:
        ScheduleError: if a task is missing, repeated, on the wrong device, or if the devices end up waiting for
            one another; the message names what each of them waits for.
    """
    waits_for = workload.waits_for
    _check_tasks(workload, schedule)
    done: set[Task] = set()
    position = [0] * len(schedule.tasks)
    moved = True
    while moved:
        moved = False
        for device, tasks in enumerate(schedule.tasks):
            while position[device] < len(tasks) and is_ready(tasks[position[device]], done, waits_for):
                done.add(tasks[position[device]])
                position[device] += 1
                moved = True
    stuck = [(d, tasks[position[d]]) for d, tasks in enumerate(schedule.tasks) if position[d] < len(tasks)]
    if stuck:
        waits = "; ".join(
            f"device {d} waits with {task} for {', '.join(str(o) for o in waits_for[task] if o not in done)}"
            for d, task in stuck
        )
        raise ScheduleError(f"schedule {schedule.name!r} would wait for ever: {waits}")


def _check_tasks(workload: Workload, schedule: Schedule) -> None:
    seen: set[Task] = set()
    for device, tasks in enumerate(schedule.tasks):
        for task in tasks:
            if task in seen:
                raise ScheduleError(f"the schedule runs {task} twice")
            seen.add(task)
            if task not in workload.waits_for:
                raise ScheduleError(f"the schedule runs {task}, which the program does not have")
            if workload.device_of[task] != device:
                raise ScheduleError(f"the schedule runs {task} on device {device}, where its segment is not")
    if missing := workload.waits_for.keys() - seen:
        raise ScheduleError(f"the schedule leaves out {min(map(str, missing))}")
