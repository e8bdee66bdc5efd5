"""Schedules as text: a line a device, or a staircase over time; both read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.clock import start_times
from graphpart.order.list_scheduler import Durations

IDLE, BUSY = ".", "-"
"""What a staircase shows where a device waits, and where it is still at the task it began before."""


def schedule_text(workload: Workload, schedule: Schedule) -> str:
    """A line for each device: its tasks in order, such as ``0F0 0F1 0B0``; see :attr:`Workload.texts`.

    Args:
        workload: the tasks of the step.
        schedule: their order.
    """
    return "\n".join(" ".join(workload.texts[task] for task in line) for line in schedule.tasks)


def parse_schedule(workload: Workload, name: str, text: str) -> Schedule:
    """Read a schedule that :func:`schedule_text` or :func:`staircase` wrote, or a person.

    A line has the tasks of one device, and may begin with a label that ends in a colon. Its tasks say which device it
    is, so a device without tasks needs no line. Whether the order can be followed is for
    :func:`~graphpart.order.dry_run.dry_run` to say.

    Args:
        workload: the tasks of the step.
        name: of the schedule.
        text: the lines.

    Raises:
        ScheduleError: if a word is no task of the workload, or of another device than its line; it names the word.
    """
    tasks: dict[str, Task] = {}
    for task, word in workload.texts.items():
        if word in tasks:
            raise ScheduleError(f"{word!r} stands for both {tasks[word]} and {task}, so no text can tell them apart")
        tasks[word] = task
    lines: list[list[Task]] = [[] for _ in range(workload.program.num_devices)]
    for number, line in enumerate(text.splitlines(), 1):
        words = [word for word in line.split(":")[-1].split() if word.strip(IDLE + BUSY)]
        for word in words:
            if word not in tasks:
                known = ", ".join(list(tasks)[:3])
                raise ScheduleError(f"line {number}: {word!r} is no task of this program; its tasks are {known}, …")
        devices = [workload.device_of[tasks[word]] for word in words]
        for word, device in zip(words, devices, strict=True):
            if device != devices[0]:
                where = f"{word!r} runs on device {device}, but {words[0]!r} on device {devices[0]}"
                raise ScheduleError(f"line {number}: {where}; give each device a line of its own")
        if words and lines[devices[0]]:
            raise ScheduleError(f"line {number}: {words[0]!r} begins a second line for device {devices[0]}")
        if words:
            lines[devices[0]] = [tasks[word] for word in words]
    return Schedule(name, tuple(map(tuple, lines)))


def staircase(workload: Workload, schedule: Schedule, durations: Durations | None = None) -> str:
    """A row for each device, and a column for each time at which some device starts a task.

    A dot is a device that waits, a dash one that is still at work. Where all tasks take one unit of time, columns are
    units of time. Messages take none.

    Args:
        workload: the tasks of the step.
        schedule: their order.
        durations: seconds of each task; one unit each if None.

    Raises:
        ScheduleError: if the order cannot be followed.
    """
    start_s = start_times(workload, schedule, durations)
    times = sorted(set(start_s.values()))
    rows = [_row(workload, line, start_s, times, durations) for line in schedule.tasks]
    width = max((len(cell) for row in rows for cell in row), default=0)
    label_width = len(str(len(rows) - 1))
    return "\n".join(
        f"device {device:>{label_width}}: "
        + " ".join((BUSY * width if cell == BUSY else cell).ljust(width) for cell in row).rstrip()
        for device, row in enumerate(rows)
    )


def _row(
    workload: Workload,
    line: Iterable[Task],
    start_s: Mapping[Task, float],
    times: Iterable[float],
    durations: Durations | None,
) -> list[str]:
    """What a device does at each time; tasks that take no time share a cell with the next."""
    words: dict[float, list[str]] = {}
    end_s: dict[float, float] = {}
    for task in line:
        at = start_s[task]
        words.setdefault(at, []).append(workload.texts[task])
        end_s[at] = at + (1.0 if durations is None else durations[task])
    row, busy_until_s = [], 0.0
    for time_s in times:
        busy_until_s = end_s.get(time_s, busy_until_s)
        row.append(" ".join(words[time_s]) if time_s in words else BUSY if time_s < busy_until_s else IDLE)
    return row
