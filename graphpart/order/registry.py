"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from graphpart.errors import ArgumentError
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.order.critical_path import list_schedule
from graphpart.order.gpipe import gpipe
from graphpart.order.interleaved import interleaved
from graphpart.order.list_scheduler import Durations
from graphpart.order.one_f_one_b import one_f_one_b
from graphpart.order.zero_bubble import zero_bubble


@dataclass(frozen=True, slots=True)
class Scheduler:
    """How a schedule is made.

    Attributes:
        make: ``make(workload, durations)``; durations are seconds of each task, or None for one unit each.
        split: whether it wants gradients of weights as tasks of their own (``Workload(split=True)``).
    """

    make: Callable[[Workload, Durations | None], Schedule]
    split: bool = False


SCHEDULES: Mapping[str, Scheduler] = MappingProxyType(
    {
        "gpipe": Scheduler(gpipe),
        "1f1b": Scheduler(one_f_one_b),
        "interleaved": Scheduler(interleaved),
        "zero-bubble": Scheduler(zero_bubble, split=True),
        "list": Scheduler(list_schedule),
    }
)
"""Every synchronous schedule."""


@no_collection()
def make_schedule(name: str, workload: Workload, durations: Durations | None = None) -> Schedule:
    """Order the tasks of a step by a schedule's name.

    Args:
        name: one of :data:`SCHEDULES`.
        workload: the tasks; split where the schedule wants it.
        durations: seconds of each task; one unit each if None.

    Raises:
        ArgumentError: if there is no schedule of this name.
    """
    if name not in SCHEDULES:
        raise ArgumentError(f"there is no schedule {name!r}; give {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name].make(workload, durations)
