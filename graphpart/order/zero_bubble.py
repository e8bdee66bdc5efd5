"""Zero-bubble: gradients of weights wait until a device has nothing else to do.

ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2): the warm-up and the memory of 1F1B. On a
chain of K devices, each is idle for (K - 1) (F + B - W).
"""

from __future__ import annotations

from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.order.depth import depths
from graphpart.order.list_scheduler import Durations, Policy, list_tasks
from graphpart.order.preferences import by_microbatch


def zero_bubble(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order F where it may run, then B, and W where neither is ready.

    F is held back twice: as in 1F1B by the microbatches whose B is yet to come, and by those whose W is, of which each
    device has at most as many as the first device has in 1F1B.

    Args:
        workload: the tasks of the step; made with ``split=True``, or this is 1F1B.
        durations: seconds of each task; one unit each if None.
    """
    depth = depths(workload.program)
    caps = {"B": depth, "BW": (max(depth, default=0),) * len(depth)}
    policy = Policy(by_microbatch(workload, "FBW"), workload.index.microbatch, caps)
    return list_tasks("zero-bubble", workload, policy, durations)
