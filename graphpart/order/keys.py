"""What several schedules prefer."""

from __future__ import annotations

from graphpart.ir.schedule import Task
from graphpart.ir.workload import Workload
from graphpart.order.engine import Key


def by_microbatch(workload: Workload, kinds: str) -> Key:
    """One kind before another, then lower microbatches first, then what is further along its way.

    Args:
        workload: the tasks of the step.
        kinds: in the order in which they are preferred, such as ``WFB``.
    """
    segment = workload.program.segment

    def key(task: Task) -> tuple[int, int, int]:
        level = segment[task.segment].level
        return kinds.index(task.kind), workload.microbatch_of(task) or 0, -level if task.kind == "F" else level

    return key
