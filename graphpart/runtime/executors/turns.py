"""Letting one task run at a time, so that its own time can be measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from graphpart.ir.schedule import Schedule, Task, is_ready
from graphpart.ir.workload import Workload
from graphpart.runtime.device.mailbox import Aborted
from graphpart.runtime.executors.post import Post

CHECK_S = 0.1
"""How often a worker that waits for its turn looks whether another failed."""


class Turns:
    """Gives the workers of one process turns: a task starts when all it waits for has run, and none runs.

    Args:
        workload: the tasks of the step.
        post: the step's, which knows of failures.
    """

    def __init__(self, workload: Workload, post: Post) -> None:
        self.waits_for, self.post = workload.waits_for, post
        self.done: set[Task] = set()
        self.is_busy = False

    def lines(self, schedule: Schedule) -> tuple[Iterable[Task], ...]:
        """Per device its tasks, each given out when it is its turn; asking for the next one ends it."""
        return tuple(map(self._line, schedule.tasks))

    def _line(self, tasks: Iterable[Task]) -> Iterator[Task]:
        changed = self.post.changed
        for task in tasks:
            with changed:
                while self.is_busy or not is_ready(task, self.done, self.waits_for):
                    if self.post.aborted:
                        raise Aborted
                    changed.wait(CHECK_S)
                self.is_busy = True
            yield task
            with changed:
                self.is_busy = False
                self.done.add(task)
                changed.notify_all()
