"""1F1B: backward as soon as it can be, so that few microbatches are in flight.

PipeDream-Flush (Narayanan et al., ICML 2021, section 2.2): after a warm-up, each device alternates between one forward
and one backward. Of a chain of K devices, stage s has at most K - s microbatches in flight.
"""

from __future__ import annotations

from typing import Any

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.depth import depths
from graphpart.order.engine import Durations, Policy, list_tasks


def one_f_one_b(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order backward before forward, and begin no more microbatches than there are devices up to the end.

    Gradients of weights, where they are tasks of their own, follow those of the inputs at once.

    Args:
        workload: the tasks of the step.
        durations: seconds of each task; one unit each if None.
    """

    def key(task: Task) -> tuple[Any, ...]:
        level = workload.program.segment[task.segment].level
        return "WBF".index(task.kind), workload.microbatch_of(task) or 0, level if task.kind == "F" else -level

    policy = Policy(key, workload.microbatch_of, {"BW": depths(workload.program)})
    return list_tasks("1f1b", workload, policy, durations)
