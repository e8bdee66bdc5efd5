"""1F1B: backward as soon as it can be, so that few microbatches are in flight.

PipeDream-Flush (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021): after a warm-up, each
device alternates between one forward and one backward. Of a chain of K devices, stage s has at most K - s microbatches
in flight.
"""

from __future__ import annotations

from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.order.depth import depths
from graphpart.order.list_scheduler import Durations, Policy, list_tasks
from graphpart.order.preferences import by_microbatch


def one_f_one_b(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Begin as many microbatches as there are devices up to the end, then another whenever one has come back.

    A forward that the bound allows goes before a backward: that is what makes a device alternate, also where its
    neighbours are faster. Gradients of weights, where they are tasks of their own, follow those of the inputs at once.

    Args:
        workload: the tasks of the step.
        durations: seconds of each task; one unit each if None.
    """
    caps = {"BW": depths(workload.program)}
    policy = Policy(by_microbatch(workload, "WFB"), workload.index.microbatch, caps)
    return list_tasks("1f1b", workload, policy, durations)
