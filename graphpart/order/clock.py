"""When each task starts, if every device works through its list."""

from __future__ import annotations

from graphpart.errors import ScheduleError
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.list_scheduler import Durations


@no_collection()
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
    index, lines = workload.index, _numbered(workload, schedule)
    device_of, after, seconds = index.device.tolist(), index.after, index.seconds(durations)
    missing: list[int] = index.num_before.tolist()
    start_s = [0.0] * len(index)  # at the earliest, until it starts
    free_s = [0.0] * len(lines)
    position = [0] * len(lines)
    moving = list(range(len(lines)))  # devices whose next task may be ready
    while moving:
        device = moving.pop()
        line, now_s = lines[device], free_s[device]
        while position[device] < len(line) and not missing[number := line[position[device]]]:
            position[device] += 1
            start_s[number] = now_s = max(now_s, start_s[number])
            now_s += seconds[number]
            for follower in after[number]:
                missing[follower] -= 1
                if start_s[follower] < now_s:
                    start_s[follower] = now_s
                if not missing[follower] and device_of[follower] != device:
                    moving.append(device_of[follower])
        free_s[device] = now_s
    stuck = [(d, line[position[d]]) for d, line in enumerate(lines) if position[d] < len(line)]
    if stuck:
        done = {number for line, end in zip(lines, position, strict=True) for number in line[:end]}
        waits = "; ".join(
            f"device {d} waits with {index.tasks[number]} for "
            + ", ".join(str(index.tasks[other]) for other in index.before[number] if other not in done)
            for d, number in stuck
        )
        raise ScheduleError(f"schedule {schedule.name!r} would wait for ever: {waits}")
    return dict(zip(index.tasks, start_s, strict=True))


def _numbered(workload: Workload, schedule: Schedule) -> list[list[int]]:
    """Per device, the numbers of its tasks."""
    index = workload.index
    device_of: list[int] = index.device.tolist()
    seen = [False] * len(index)
    lines: list[list[int]] = []
    for device, tasks in enumerate(schedule.tasks):
        lines.append([])
        for task in tasks:
            number = index.number.get(task)
            if number is None:
                raise ScheduleError(f"the schedule runs {task}, which the program does not have")
            if seen[number]:
                raise ScheduleError(f"the schedule runs {task} twice")
            if device_of[number] != device:
                raise ScheduleError(f"the schedule runs {task} on device {device}, where its segment is not")
            seen[number] = True
            lines[-1].append(number)
    if not all(seen):
        left_out = (str(task) for task, is_there in zip(index.tasks, seen, strict=True) if not is_there)
        raise ScheduleError(f"the schedule leaves out {min(left_out)}")
    return lines
