"""Asynchronous pipelining: each device updates its weights as gradients come, while others are still under way.

PipeDream (Narayanan et al., SOSP 2019): 1F1B without a flush, each microbatch going back with the weights that it went
forward with (weight stashing). AMPNet (Gaunt et al., 2017): a bound on what is in flight, a local update after a number
of gradients, no stashing. Gradients are stale by the updates in between; the result is not that of one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphpart.errors import ArgumentError
from graphpart.ir.schedule import Schedule, Task, update_of
from graphpart.ir.workload import Workload
from graphpart.order.depth import depths
from graphpart.order.list_scheduler import Durations, Policy, list_tasks
from graphpart.order.preferences import by_microbatch


@dataclass(frozen=True, slots=True)
class Async:
    """How far an asynchronous step goes.

    Attributes:
        in_flight: most microbatches that a device has begun and not ended; None: as many as there are devices from it
            to the end, which keeps all of them busy.
        update_every: microbatches whose gradients a device adds up before it updates its weights.
        stash_weights: whether each microbatch goes back with the weights that it went forward with, for the memory of a
            copy for every update in between; without it, with those of the time.

    Raises:
        ArgumentError: if a number is not a whole one from 1 up, or ``stash_weights`` neither True nor False.
    """

    in_flight: int | None = None
    update_every: int = 1
    stash_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("in_flight", "update_every"):
            value = getattr(self, name)
            if value is None and name == "in_flight":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r} of an asynchronous schedule; give a whole number from 1 up")
        if not isinstance(self.stash_weights, bool):
            raise ArgumentError(f"stash_weights={self.stash_weights!r} of an asynchronous schedule; give True or False")


def asynchronous(workload: Workload, options: Async, durations: Durations | None = None) -> Schedule:
    """1F1B within the bound, and every local update as soon as its gradients are in.

    Args:
        workload: the tasks of the step; made with ``update_every``.
        options: the bound.
        durations: seconds of each task; one unit each if None.
    """
    caps = depths(workload.program)
    if options.in_flight is not None:
        caps = (options.in_flight,) * len(caps)
    policy = Policy(by_microbatch(workload, "WFB"), workload.index.microbatch, {"BW": caps})
    schedule = list_tasks("async", workload, policy, durations)
    return Schedule("async", tuple(_with_updates(workload, d, line) for d, line in enumerate(schedule.tasks)))


def _with_updates(workload: Workload, device: int, line: Sequence[Task]) -> tuple[Task, ...]:
    """A device's tasks with each update right behind the last of those that it waits for (all are the device's own)."""
    early = [task for task in line if task.kind == "U" and task != update_of(device)]
    others = [task for task in line if task not in set(early)]
    place = {task: i for i, task in enumerate(others)}
    behind: dict[int, list[Task]] = {}
    for update in early:
        last = max(place[task] for task in workload.waits_for[update])
        place[update] = last
        behind.setdefault(last, []).append(update)
    return tuple(task for i, other in enumerate(others) for task in (other, *behind.get(i, ())))
