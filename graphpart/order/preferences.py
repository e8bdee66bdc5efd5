"""What several schedules prefer."""

from __future__ import annotations

import numpy as np

from graphpart.ir.task_index import Column
from graphpart.ir.workload import Workload
from graphpart.order.list_scheduler import Keys


def by_microbatch(workload: Workload, kinds: str) -> Keys:
    """One kind before another, then lower microbatches first, then what is further along its way.

    Args:
        workload: the tasks of the step.
        kinds: in the order in which they are preferred, such as ``WFB``.
    """
    index = workload.index
    along = np.where(index.kind == "F", -index.level, index.level)
    return by_kind(workload, kinds), np.maximum(index.microbatch, 0), along


def by_kind(workload: Workload, kinds: str) -> Column:
    """One kind before another; the rest last."""
    return np.select([workload.index.kind == kind for kind in kinds], range(len(kinds)), len(kinds))
