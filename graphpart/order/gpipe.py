"""GPipe: all microbatches forward, then all backward (Huang et al., 2019, section 2.3)."""

from __future__ import annotations

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.engine import Durations


def gpipe(workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order every device's tasks as a wavefront: microbatch after microbatch through every level.

    Microbatches keep their number's order in both directions, so that gradients add up in one order. Gradients of
    weights, where they are tasks of their own, follow those of the inputs at once.

    Args:
        workload: the tasks of the step.
        durations: of no account: the order is the same whatever tasks take.
    """
    per_device: list[list[Task]] = [[] for _ in range(workload.program.num_devices)]
    for kind in "FB":
        for task in _wavefront(workload, [t for t in workload.waits_for if t.kind == kind], kind):
            line = per_device[workload.device_of[task]]
            line.append(task)
            weights = Task("W", task.segment)
            if kind == "B" and weights in workload.waits_for:
                line.append(weights)
    for task in workload.waits_for:
        if task.kind == "U":
            per_device[workload.device_of[task]].append(task)
    return Schedule("gpipe", tuple(map(tuple, per_device)))


def _wavefront(workload: Workload, tasks: list[Task], kind: str) -> list[Task]:
    """Tasks of one direction by the slot in which they could run if every task took one unit of time."""
    segment = workload.program.segment
    sign = -1 if kind == "B" else 1

    def microbatch(task: Task) -> int:
        found = workload.microbatch_of(task)
        return -1 if found is None else found

    slot: dict[Task, int] = {}
    last_of_stage: dict[tuple[int, int], int] = {}  # one microbatch after another
    # In this order each task follows what it waits for, and lower microbatches of a level come first.
    for task in sorted(tasks, key=lambda t: (sign * segment[t.segment].level, microbatch(t))):
        stage = (segment[task.segment].device, segment[task.segment].level)
        # Gradients of weights are made with those of inputs.
        before = (Task("B", t.segment) if t.kind == "W" else t for t in workload.waits_for[task])
        after = [slot[other] for other in before if other in slot]
        slot[task] = 1 + max([*after, last_of_stage.get(stage, -1)], default=-1)
        last_of_stage[stage] = slot[task]
    return sorted(slot, key=lambda t: (slot[t], microbatch(t), segment[t.segment].level))
