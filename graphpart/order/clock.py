"""When each task starts, if every device works through its list."""

from __future__ import annotations

from collections import defaultdict

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.engine import Durations


def start_times(workload: Workload, schedule: Schedule, durations: Durations | None = None) -> dict[Task, float]:
    """Per task, the time at which it starts if messages take no time.

    Args:
        workload: the tasks of the step.
        schedule: their order.
        durations: seconds of each task; one unit each if None.

    Raises:
        ScheduleError: if a task is missing, repeated, on the wrong device, or if the devices end up waiting for
            one another; the message names what each of them waits for.
    """
    _check_tasks(workload, schedule)
    waits_for = workload.waits_for
    missing = {task: len(others) for task, others in waits_for.items()}
    followers: defaultdict[Task, list[Task]] = defaultdict(list)
    for task, others in waits_for.items():
        for other in others:
            followers[other].append(task)
    ready_s = dict.fromkeys(waits_for, 0.0)
    start_s: dict[Task, float] = {}
    free_s = [0.0] * len(schedule.tasks)
    position = [0] * len(schedule.tasks)
    moving = list(range(len(schedule.tasks)))  # devices whose next task may be ready
    while moving:
        device = moving.pop()
        line = schedule.tasks[device]
        while position[device] < len(line) and not missing[task := line[position[device]]]:
            position[device] += 1
            start_s[task] = max(free_s[device], ready_s[task])
            free_s[device] = start_s[task] + (1.0 if durations is None else durations[task])
            for follower in followers[task]:
                missing[follower] -= 1
                ready_s[follower] = max(ready_s[follower], free_s[device])
                if not missing[follower] and workload.device_of[follower] != device:
                    moving.append(workload.device_of[follower])
    stuck = [(d, line[position[d]]) for d, line in enumerate(schedule.tasks) if position[d] < len(line)]
    if stuck:
        waits = "; ".join(
            f"device {d} waits with {task} for {', '.join(str(o) for o in waits_for[task] if o not in start_s)}"
            for d, task in stuck
        )
        raise ScheduleError(f"schedule {schedule.name!r} would wait for ever: {waits}")
    return start_s


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
