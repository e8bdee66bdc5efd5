"""Measured times of a plan's tasks, for forecasts that rest on this machine and not on data sheets."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from graphpart.errors import PlanError
from graphpart.ir.program import Segment
from graphpart.ir.schedule import Task
from graphpart.ir.timeline import Timeline
from graphpart.ir.workload import Workload


@dataclass(frozen=True)
class Calibration:
    """How long each task of a step takes; ``gp.calibrate`` measures it.

    Attributes:
        times_s: seconds by task. Tasks that only differ in their microbatch have one time, the median of theirs.
    """

    times_s: Mapping[Task, float]

    @classmethod
    def of(cls, workload: Workload, timelines: Iterable[Timeline]) -> Calibration:
        """The calibration that some measured steps give.

        Args:
            workload: the tasks of the step.
            timelines: of measured steps; each may hold the tasks of some devices only.
        """
        found: dict[Hashable, list[float]] = {}
        for event in (event for timeline in timelines for event in timeline.events if event.is_work):
            found.setdefault(_likeness(workload, Task(event.kind, event.name)), []).append(event.end_s - event.start_s)
        return cls({task: median(found[_likeness(workload, task)]) for task in workload.waits_for})

    def times_of(self, workload: Workload) -> Mapping[Task, float]:
        """Seconds by task.

        Raises:
            PlanError: if these are the tasks of another plan, or of another schedule of it.
        """
        if workload.waits_for.keys() != self.times_s.keys():
            odd = min(map(str, workload.waits_for.keys() ^ self.times_s.keys()))
            raise PlanError(f"the calibration was measured on another plan or schedule: {odd} is in one of them only")
        return self.times_s


def _likeness(workload: Workload, task: Task) -> Hashable:
    """What tasks have in common that differ in nothing but their microbatch."""
    if task.kind == "U":
        return task
    segment: Segment = workload.program.segment[task.segment]
    calls = tuple((step.operator, step.share) for step in segment.steps)
    return task.kind, segment.device, segment.level, segment.fraction, calls
