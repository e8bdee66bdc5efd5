"""List scheduling: what the most work waits for goes first.

The upward rank of HEFT (Topcuoglu et al., IEEE TPDS 2002, section 4.1), with the devices given.
"""

from __future__ import annotations

from collections import Counter

from graphpart.errors import ScheduleError
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.engine import Durations, Policy, list_tasks


def list_schedule(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order tasks by the longest chain of tasks that begins with them; for placements of any shape.

    Of equals, the lower microbatch goes first, since gradients are summed in that order. The number of
    microbatches in flight is not bounded.

    Args:
        workload: the tasks of the step.
        durations: seconds of each task; one unit each if None.
    """
    rank = upward_ranks(workload, durations)
    policy = Policy(lambda task: (-rank[task], workload.microbatch_of(task) or 0))
    return list_tasks("list", workload, policy, durations)


def upward_ranks(workload: Workload, durations: Durations | None = None) -> dict[Task, float]:
    """Per task, the time of the longest chain of tasks from its start to the end of the step.

    Raises:
        ScheduleError: if tasks wait for one another.
    """
    num_left = Counter(other for others in workload.waits_for.values() for other in others)  # that wait for a task
    after = dict.fromkeys(workload.waits_for, 0.0)
    ready = [task for task in workload.waits_for if not num_left[task]]
    rank: dict[Task, float] = {}
    while ready:
        task = ready.pop()
        rank[task] = after[task] + (1.0 if durations is None else durations[task])
        for other in workload.waits_for[task]:
            after[other] = max(after[other], rank[task])
            num_left[other] -= 1
            if not num_left[other]:
                ready.append(other)
    if left := workload.waits_for.keys() - rank.keys():
        raise ScheduleError(f"{len(left)} tasks of the program wait for one another, such as {min(map(str, left))}")
    return rank
