"""GPipe: all microbatches forward, then all backward (Huang et al., 2019, section 2.3)."""

from __future__ import annotations

import numpy as np

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.task_index import TaskIndex
from graphpart.ir.workload import Workload
from graphpart.order.list_scheduler import Durations


def gpipe(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order every device's tasks as a wavefront: microbatch after microbatch through every level.

    Microbatches keep their number's order in both directions, so that gradients add up in one order. Gradients of
    weights, where they are tasks of their own, follow those of the inputs at once.

    Args:
        workload: the tasks of the step.
        durations: of no account: the order is the same whatever tasks take.
    """
    index = workload.index
    tasks, device_of = index.tasks, index.device.tolist()
    weights_of = {index.before[number][0]: number for number in np.flatnonzero(index.kind == "W").tolist()}
    lines: list[list[Task]] = [[] for _ in range(workload.program.num_devices)]
    for kind in "FB":
        for number in _wavefront(index, kind):
            line = lines[device_of[number]]
            line.append(tasks[number])
            if number in weights_of:
                line.append(tasks[weights_of[number]])
    for number in np.flatnonzero(index.kind == "U").tolist():
        lines[device_of[number]].append(tasks[number])
    return Schedule("gpipe", tuple(map(tuple, lines)))


def _wavefront(index: TaskIndex, kind: str) -> list[int]:
    """Tasks of one direction by the slot in which they could run if every task took one unit of time."""
    own = np.flatnonzero(index.kind == kind)
    # In this order each task follows what it waits for, and lower microbatches of a level come first.
    level, microbatch = index.level[own], index.microbatch[own]
    own = own[np.lexsort((microbatch, -level if kind == "B" else level))]
    stage = index.device * (index.level.max(initial=0) + 1) + index.level
    slot = [-1] * len(index)  # -1 for what is of the other direction
    last_of_stage: dict[int, int] = {}  # one microbatch after another
    is_weights = (index.kind == "W").tolist()
    for number, at in zip(own.tolist(), stage[own].tolist(), strict=True):
        # Gradients of weights are made with those of inputs.
        after = [slot[index.before[n][0] if is_weights[n] else n] for n in index.before[number]]
        slot[number] = last_of_stage[at] = 1 + max([*after, last_of_stage.get(at, -1)])
    slots = np.array(slot, np.int64)[own]
    return own[np.lexsort((index.level[own], index.microbatch[own], slots))].tolist()
