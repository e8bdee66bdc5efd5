"""The order in which each device works, and the one rule for when a task may run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """One piece of work of one device; a named tuple, since a long pipeline makes and looks up a million.

    Attributes:
        kind: ``F`` forward, ``B`` backward (of inputs alone where ``W`` follows), ``W`` gradients of weights, or ``U``
            update of parameters.
        segment: name of the segment it runs; for ``U`` what :func:`update_of` calls it.
    """

    kind: str
    segment: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.segment}"


def update_of(device: int, microbatch: int | None = None) -> Task:
    """The task in which a device updates its parameters; within a step, behind the gradients of a microbatch."""
    return Task("U", f"d{device}" if microbatch is None else f"d{device}.m{microbatch}")


def place_of_update(task: Task) -> tuple[int, int | None]:
    """The device and the microbatch of an update: what :func:`update_of` made it of."""
    device, _, microbatch = task.segment.removeprefix("d").partition(".m")
    return int(device), int(microbatch) if microbatch else None


@dataclass(frozen=True)
class Schedule:
    """Per device, its tasks in order.

    Attributes:
        name: of the schedule that made it, such as ``gpipe``.
        tasks: per device, in order.
    """

    name: str
    tasks: tuple[tuple[Task, ...], ...]

    def of_kinds(self, kinds: Iterable[str]) -> tuple[tuple[Task, ...], ...]:
        """Per device, its tasks of some kinds, in order."""
        wanted = frozenset(kinds)
        return tuple(tuple(task for task in line if task.kind in wanted) for line in self.tasks)

    @property
    def forward(self) -> tuple[tuple[Task, ...], ...]:
        """Per device, its forward tasks."""
        return self.of_kinds("F")

    @property
    def backward(self) -> tuple[tuple[Task, ...], ...]:
        """Per device, all but its forward tasks."""
        return self.of_kinds("BWU")


def is_ready(task: Task, done: Collection[Task], waits_for: Mapping[Task, tuple[Task, ...]]) -> bool:
    """Whether everything a task waits for has ended."""
    return all(other in done for other in waits_for[task])
