"""The order in which each device works, and the one rule for when a task may run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from graphpart.ir.program import Backward, Program


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work of one device.

    Attributes:
        kind: ``F`` forward or ``B`` backward.
        segment: name of the segment it runs.
    """

    kind: str
    segment: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.segment}"


@dataclass(frozen=True)
class Schedule:
    """Per device, its tasks in order.

    Attributes:
        name: of the schedule that made it, such as ``gpipe``.
        forward: per device, forward tasks in order.
        backward: per device, backward tasks in order.
    """

    name: str
    forward: tuple[tuple[Task, ...], ...]
    backward: tuple[tuple[Task, ...], ...] = ()


def dependencies(program: Program, backward: Backward | None = None) -> Mapping[Task, tuple[Task, ...]]:
    """What waits for what: per task, the tasks that must have ended before it may start.

    This is the one readiness rule: ordering, the dry run, the simulator and both executors rest on it.

    Args:
        program: the lowered program.
        backward: the backward pass for one set of live outputs, or None for forward only.
    """
    found: dict[Task, tuple[Task, ...]] = {}
    for segment in program.segments:
        made_by = (program.wire[name].segment for name in segment.inputs)
        found[Task("F", segment.name)] = tuple(dict.fromkeys(Task("F", s) for s in made_by if s))
    if backward is not None:
        for name, work in backward.segments.items():
            users = dict.fromkeys(
                Task("B", user) for wire in work.outputs for user in backward.contributors.get(wire, ())
            )
            found[Task("B", name)] = (Task("F", name), *users)
    return found


def is_ready(task: Task, done: Collection[Task], waits_for: Mapping[Task, tuple[Task, ...]]) -> bool:
    """Whether everything a task waits for has ended."""
    return all(other in done for other in waits_for[task])
