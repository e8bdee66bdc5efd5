"""List scheduling: what the most work waits for goes first.

The upward rank of HEFT (Topcuoglu et al., IEEE TPDS 2002, section 4.1), with the devices given.
"""

from __future__ import annotations

import numpy as np

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.list_scheduler import Durations, Policy, list_tasks


def list_schedule(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order tasks by the longest chain of tasks that begins with them; for placements of any shape.

    Of equals, the lower microbatch goes first, since gradients are summed in that order. The number of
    microbatches in flight is not bounded.

    Args:
        workload: the tasks of the step.
        durations: seconds of each task; one unit each if None.
    """
    ranks = np.array(list(upward_ranks(workload, durations).values()))
    return list_tasks("list", workload, Policy((-ranks, np.maximum(workload.index.microbatch, 0))), durations)


def upward_ranks(workload: Workload, durations: Durations | None = None) -> dict[Task, float]:
    """Per task, the time of the longest chain of tasks from its start to the end of the step.

    Raises:
        ScheduleError: if tasks wait for one another.
    """
    index = workload.index
    before, seconds, num_left = index.before, index.seconds(durations), [len(others) for others in index.after]
    after_s = [0.0] * len(index)  # of the longest chain behind a task
    ready = [number for number, left in enumerate(num_left) if not left]
    rank_s: list[float | None] = [None] * len(index)
    while ready:
        number = ready.pop()
        rank_s[number] = own_s = after_s[number] + seconds[number]
        for other in before[number]:
            if own_s > after_s[other]:
                after_s[other] = own_s
            num_left[other] -= 1
            if not num_left[other]:
                ready.append(other)
    found = {task: rank for task, rank in zip(index.tasks, rank_s, strict=True) if rank is not None}
    if left := index.number.keys() - found.keys():
        raise ScheduleError(f"{len(left)} tasks of the program wait for one another, such as {min(map(str, left))}")
    return found
