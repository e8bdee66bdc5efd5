"""GPipe: all microbatches forward, then all backward (Huang et al., 2019, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.ir.program import Backward, Program
from graphpart.ir.schedule import Schedule, Task, dependencies


def gpipe(program: Program, backward: Backward | None = None) -> Schedule:
    """Order every device's tasks as a wavefront: microbatch after microbatch through every level.

    Microbatches keep their number's order in both directions, so that gradients add up in one order.

    Args:
        program: the lowered program.
        backward: its backward pass, or None for forward only.
    """
    waits_for = dependencies(program, backward)
    forward = [t for t in waits_for if t.kind == "F"]
    behind = [t for t in waits_for if t.kind == "B"]
    return Schedule("gpipe", _wavefront(program, forward, waits_for), _wavefront(program, behind[::-1], waits_for))


def _wavefront(
    program: Program, tasks: list[Task], waits_for: Mapping[Task, tuple[Task, ...]]
) -> tuple[tuple[Task, ...], ...]:
    """Per device, tasks by the slot in which they could run if every task took one unit of time."""
    slot: dict[Task, int] = {}
    last_of_lane: dict[tuple[int, int], int] = {}  # (device, level): one microbatch after another
    for task in _topological(program, tasks, waits_for):
        segment = program.segment[task.segment]
        lane = (segment.device, segment.level)
        after = [slot[other] for other in waits_for[task] if other in slot]
        slot[task] = 1 + max([*after, last_of_lane.get(lane, -1)], default=-1)
        last_of_lane[lane] = slot[task]
    per_device: list[list[Task]] = [[] for _ in range(program.num_devices)]
    for task in sorted(slot, key=lambda t: (slot[t], _microbatch(program, t), program.segment[t.segment].level)):
        per_device[program.segment[task.segment].device].append(task)
    return tuple(map(tuple, per_device))


def _topological(program: Program, tasks: list[Task], waits_for: Mapping[Task, tuple[Task, ...]]) -> list[Task]:
    """Tasks such that each follows what it waits for, and lower microbatches of a level come first."""
    sign = -1 if tasks and tasks[0].kind == "B" else 1
    return sorted(tasks, key=lambda t: (sign * program.segment[t.segment].level, _microbatch(program, t)))


def _microbatch(program: Program, task: Task) -> int:
    microbatch = program.segment[task.segment].microbatch
    return -1 if microbatch is None else microbatch
