"""Run a schedule dry: find a deadlock before anything is launched."""

from __future__ import annotations

from graphpart.errors import ScheduleError
from graphpart.ir.program import Backward, Program
from graphpart.ir.schedule import Schedule, Task, dependencies, is_ready


def dry_run(program: Program, schedule: Schedule, backward: Backward | None = None) -> None:
    """Let every device work through its tasks in order, without computing.

    Raises:
        ScheduleError: if a task is missing, repeated, on the wrong device, or if the devices end up waiting for
            one another; the message names what each of them waits for.
    """
    waits_for = dependencies(program, backward)
    lines = [list(f) + list(b) for f, b in _zip(schedule, program.num_devices)]
    _check_tasks(program, lines, set(waits_for))
    done: set[Task] = set()
    position = [0] * len(lines)
    moved = True
    while moved:
        moved = False
        for device, tasks in enumerate(lines):
            while position[device] < len(tasks) and is_ready(tasks[position[device]], done, waits_for):
                done.add(tasks[position[device]])
                position[device] += 1
                moved = True
    stuck = [(d, tasks[position[d]]) for d, tasks in enumerate(lines) if position[d] < len(tasks)]
    if stuck:
        waits = "; ".join(
            f"device {d} waits with {task} for {', '.join(str(o) for o in waits_for[task] if o not in done)}"
            for d, task in stuck
        )
        raise ScheduleError(f"schedule {schedule.name!r} would wait for ever: {waits}")


def _zip(schedule: Schedule, num_devices: int) -> list[tuple[tuple[Task, ...], tuple[Task, ...]]]:
    backward = schedule.backward or ((),) * num_devices
    return list(zip(schedule.forward, backward, strict=True))


def _check_tasks(program: Program, lines: list[list[Task]], wanted: set[Task]) -> None:
    listed = [task for tasks in lines for task in tasks]
    if len(set(listed)) < len(listed):
        twice = next(t for t in listed if listed.count(t) > 1)
        raise ScheduleError(f"the schedule runs {twice} twice")
    if missing := wanted - set(listed):
        raise ScheduleError(f"the schedule leaves out {min(map(str, missing))}")
    if unknown := set(listed) - wanted:
        raise ScheduleError(f"the schedule runs {min(map(str, unknown))}, which the program does not have")
    for device, tasks in enumerate(lines):
        for task in tasks:
            if program.segment[task.segment].device != device:
                raise ScheduleError(f"the schedule runs {task} on device {device}, where its segment is not")
