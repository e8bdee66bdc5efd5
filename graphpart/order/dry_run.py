"""What is checked of a schedule before anything is launched."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from graphpart.ir.program import Bridge
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order.clock import start_times


def dry_run(workload: Workload, schedule: Schedule) -> None:
    """Let every device work through its tasks in order, without computing.

    A schedule that passes cannot deadlock, also where messages go through channels without a buffer, under these rules:

    1. A send never blocks the device that makes it: the sender holds the message until the receiver takes it.
    2. Each directed pair of devices is one channel, which gives its messages in the order in which they were sent
       (:func:`channels`).
    3. A device receives when a task needs a message that it does not have. If others come before it in the channel, the
       device takes them out first and keeps them until it needs them.

    By 1 a device stands still only in a receive, or at its end. By 2 and 3 it then waits for a message that has not
    been sent: had it been, so had all before it in the channel, and the device would take them and go on. So a device
    waits only for a task that has not ended, as it does here, and the order of channels adds nothing to wait for.

    Args:
        workload: the tasks of the step.
        schedule: their order.

    Raises:
        ScheduleError: if a task is missing, repeated, on the wrong device, or if the devices end up waiting for
            one another; the message names what each of them waits for.
    """
    start_times(workload, schedule)


def in_flight(workload: Workload, schedule: Schedule) -> tuple[int, ...]:
    """Per device, the most microbatches that it has begun and whose backward it has not finished, at any time.

    It is what a device keeps activations for. A microbatch is begun with the first segment that has a backward: the
    others keep nothing. Its backward is finished when the gradients of weights are made, too.

    Args:
        workload: the tasks of the step.
        schedule: their order.
    """
    most = []
    for line in schedule.tasks:
        left = Counter(workload.microbatch_of(task) for task in line if task.kind in "BW")
        begun: set[int] = set()
        peak = 0
        for task in line:
            microbatch = workload.microbatch_of(task)
            if microbatch is None:
                continue
            if task.kind == "F" and Task("B", task.segment) in workload.waits_for:
                begun.add(microbatch)
                peak = max(peak, len(begun))
            elif task.kind in "BW":
                left[microbatch] -= 1
                if not left[microbatch]:
                    begun.discard(microbatch)
        most.append(peak)
    return tuple(most)


def channels(workload: Workload, schedule: Schedule) -> dict[tuple[int, int], tuple[int, ...]]:
    """Per pair of source and destination, the tags of the messages between them in the order in which they are sent.

    What a device has from the start goes first: parameters and buffers. A task sends what it makes when it ends; a
    gradient leaves with the last task of its device that makes a part of it.

    Args:
        workload: the tasks of the step.
        schedule: their order.
    """
    found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    sends = _Sends(workload)
    for name, bridges in sends.values.items():
        if not workload.program.wire[name].segment:
            for bridge in bridges:
                found[bridge.source, bridge.destination].append(bridge.tag)
    for line in schedule.tasks:
        for task in line:
            for bridge in sends.after(task):
                found[bridge.source, bridge.destination].append(bridge.tag)
    return {pair: tuple(tags) for pair, tags in sorted(found.items())}


class _Sends:
    """What leaves a device after each of its tasks, in the order in which it runs them."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.values: defaultdict[str, list[Bridge]] = defaultdict(list)
        for bridge in workload.program.bridges:
            self.values[bridge.wire].append(bridge)
        self.gradients: dict[tuple[str, int], Bridge] = {}
        for bridge in workload.backward.bridges if workload.backward is not None else ():
            self.gradients[bridge.wire, bridge.source] = bridge
        self.parts_left: dict[tuple[str, int], int] = {}
        for wire, device in self.gradients:
            makers = workload.makers(wire)
            self.parts_left[wire, device] = sum(workload.device_of[task] == device for task in makers)

    def after(self, task: Task) -> Iterator[Bridge]:
        """The messages that leave when a task ends."""
        if task.kind == "F":
            for name in self.workload.program.segment[task.segment].outputs:
                yield from self.values.get(name, ())
            return
        for name in self._gradients_of(task):
            key = name, self.workload.device_of[task]
            if key in self.parts_left:
                self.parts_left[key] -= 1
                if not self.parts_left[key]:
                    yield self.gradients[key]

    def _gradients_of(self, task: Task) -> Iterator[str]:
        """The wires of whose gradients a task makes a part."""
        backward = self.workload.backward
        if backward is None or task.kind == "U":
            return
        work = backward.segments[task.segment]
        apart = work.weights if self.workload.split else ()
        yield from apart if task.kind == "W" else (name for name in work.inputs if name not in apart)
