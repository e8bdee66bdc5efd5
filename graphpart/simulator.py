"""What a schedule will take, before it runs: a discrete-event simulation on forecast times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from heapq import heappop, heappush
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from graphpart.cost.time.collectives import collective_s, slowest_link
from graphpart.cost.time.task_times import task_times
from graphpart.errors import ScheduleError
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.program import Bridge, Collective
from graphpart.ir.schedule import Schedule, Task, update_of
from graphpart.ir.task_index import Column, grouped
from graphpart.ir.timeline import Event, Timeline
from graphpart.ir.workload import Workload


@no_collection()
def simulate_workload(
    workload: Workload,
    schedule: Schedule,
    cluster: Cluster,
    *,
    times: Mapping[Task, float] | None = None,
) -> Timeline:
    """Forecast the timeline of one step.

    Each device runs its tasks in order. A task starts when all it waits for has ended and every
    message that it reads has arrived. A link, in each direction, carries one message at a time, in the order in which
    they become ready, and so does what links share; messages overlap compute. A collective starts when all who take
    part are ready, and takes the time of its best algorithm. Messages take latency plus bytes over bandwidth.

    The work is ``O(n log n)`` in the number of tasks, messages and dependencies.

    Args:
        workload: the tasks of the step.
        schedule: the order of tasks per device.
        cluster: the devices; at least as many as the program's.
        times: seconds per task; by default :func:`graphpart.cost.time.task_times.task_times`, from the roofline model.

    Raises:
        ScheduleError: if tasks wait for ever, or the cluster has too few devices.
    """
    program = workload.program
    if len(cluster) < program.num_devices:
        raise ScheduleError(f"the program needs {program.num_devices} devices; the cluster has {len(cluster)}")
    times = task_times(workload, cluster) if times is None else times
    return _Simulation(_Agenda(workload, schedule), cluster, times).run()


class _Agenda:
    """All that happens in a step, numbered, and what waits for what.

    Messages come first, forward ones before those of gradients; then tasks, device by device in the schedule's order.
    A task also waits for the one before it on its device, so that each thing may begin once nothing is missing.

    Attributes:
        bridges: per message, its bridge.
        numbers: per task, in the schedule's order, its number in the workload.
        devices: likewise, its device.
        things: per task, by its number in the workload, what it is here; -1 if the schedule leaves it out.
        num_missing: per thing, how many others have to end first.
        then: per thing, those that wait for it.
    """

    def __init__(self, workload: Workload, schedule: Schedule) -> None:
        self.workload, self.schedule = workload, schedule
        backward = workload.backward
        self.gradients: Sequence[Bridge] = () if backward is None else backward.bridges
        self.bridges: Sequence[Bridge] = (*workload.program.bridges, *self.gradients)
        self.numbers: list[int] = []
        self.devices: list[int] = []
        self.things = self._number_tasks()
        before, task = workload.index.edges
        maker, message = _pairs(self._makers())
        sent, reader = _pairs(self._readers())
        own = np.array(self.devices, np.int64)
        last = np.flatnonzero(own[1:] == own[:-1]) + len(self.bridges)
        ends = np.concatenate([last, self.things[before], self.things[maker], sent])
        waits = np.concatenate([last + 1, self.things[task], message, self.things[reader]])
        num_things = len(self.bridges) + len(self.numbers)
        # What waits for a task that the schedule leaves out misses it for ever.
        self.num_missing: list[int] = np.bincount(waits[waits >= 0], minlength=num_things).tolist()
        both = (ends >= 0) & (waits >= 0)
        self.then = grouped(ends[both], waits[both], num_things)

    def _number_tasks(self) -> Column:
        """Number the schedule's tasks."""
        index, name = self.workload.index, self.schedule.name
        things = [-1] * len(index)
        for device, line in enumerate(self.schedule.tasks):
            for thing, task in enumerate(line, len(self.bridges) + len(self.numbers)):
                number = index.number.get(task)
                if number is None:
                    raise ScheduleError(f"schedule {name!r} has task {task}, which the program doesn't")
                if things[number] >= 0:
                    raise ScheduleError(f"schedule {name!r} has task {task} twice")
                things[number] = thing
                self.numbers.append(number)
            self.devices += [device] * len(line)
        return np.array(things, np.int64)

    def _makers(self) -> Iterator[tuple[int, int]]:
        """The tasks that make what a message carries, each with the message.

        No task makes a source, nor a gradient that the caller gives.
        """
        index, device_of = self.workload.index, self.workload.index.device.tolist()
        for message, bridge in enumerate(self.workload.program.bridges):
            if (maker := index.value_maker[bridge.wire]) is not None:
                yield maker, message
        for message, bridge in enumerate(self.gradients, len(self.workload.program.bridges)):
            for maker in index.gradient_makers.get(bridge.wire, ()):
                if device_of[maker] == bridge.source:
                    yield maker, message

    def _readers(self) -> Iterator[tuple[int, int]]:
        """Messages, each with a task that reads it."""
        program, index = self.workload.program, self.workload.index
        arriving = {(bridge.wire, bridge.destination): message for message, bridge in enumerate(program.bridges)}
        for number, segment in enumerate(program.segments):
            for name in segment.inputs:
                if (message := arriving.get((name, segment.device))) is not None:
                    yield message, number
        for message, bridge in enumerate(self.gradients, len(program.bridges)):
            maker = index.value_maker[bridge.wire]
            reader = index.number.get(update_of(bridge.destination)) if maker is None else index.backward.get(maker)
            if reader is not None:
                yield message, reader

    def task(self, thing: int) -> Task:
        """The task with a number."""
        return self.workload.index.tasks[self.numbers[thing - len(self.bridges)]]

    def device(self, thing: int) -> int:
        """The device of the task with a number."""
        return self.devices[thing - len(self.bridges)]


def _pairs(pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Pairs as two columns."""
    return np.fromiter(chain.from_iterable(pairs), np.int64).reshape(-1, 2).T


@dataclass(frozen=True, slots=True)
class _Route:
    """The way from one device to another: its link, and the numbers of all that carries one message at a time on it."""

    link: Link
    queues: tuple[int, ...]


class _Simulation:
    """The state of one simulation."""

    def __init__(self, agenda: _Agenda, cluster: Cluster, times: Mapping[Task, float]) -> None:
        self.agenda, self.cluster = agenda, cluster
        self.num_messages = len(agenda.bridges)
        # Per thing; a task's time is known from the start, a message's once it is sent.
        self.took_s = [0.0] * self.num_messages + [
            times[agenda.workload.index.tasks[number]] for number in agenda.numbers
        ]
        self.start_s: list[float | None] = [None] * len(self.took_s)
        self.num_missing = list(agenda.num_missing)
        self.ends: list[tuple[float, int]] = []  # when, and what; ties go by number
        self.routes: dict[tuple[int, int], _Route] = {}
        self.slowest = cache(partial(slowest_link, cluster))
        self.free_s = [0.0] * len(cluster.shared)  # per queue, when it is next free
        backward, program = agenda.workload.backward, agenda.workload.program
        both = program.collectives + (() if backward is None else backward.collectives)
        # A bridge's tag is its message's number.
        self.collective_of: dict[int, Collective] = {tag: found for found in both for tag in found.tags}
        self.held: dict[tuple[int, ...], list[int]] = {}  # messages that wait for the rest of their collective

    def run(self) -> Timeline:
        """Run to the end."""
        first, missing, ends, then = self.num_messages, self.num_missing, self.ends, self.agenda.then
        took_s, start_s = self.took_s, self.start_s
        begins = [thing for thing, count in enumerate(missing) if not count]
        now_s = 0.0
        while begins or ends or self._dissolve(now_s):
            for thing in begins:
                if thing < first:
                    self._send(thing, now_s)
                else:
                    start_s[thing] = now_s
                    heappush(ends, (now_s + took_s[thing], thing))
            begins = []
            if ends:
                now_s, ended = heappop(ends)
                for thing in then[ended]:
                    missing[thing] -= 1
                    if not missing[thing]:
                        begins.append(thing)
        self._check_all_ran()
        program = self.agenda.workload.program
        return Timeline(
            num_devices=program.num_devices,
            events=self._events(),
            num_messages=self.num_messages,
            message_bytes=sum(bridge.size_bytes for bridge in self.agenda.bridges),
            device_names=tuple(device.name for device in self.cluster.devices[: program.num_devices]),
        )

    def _send(self, message: int, now_s: float) -> None:
        """Put a message on its link, behind those that became ready before it; a collective's go together."""
        collective = self.collective_of.get(message)
        if collective is None:
            bridge = self.agenda.bridges[message]
            route = self._route(bridge.source, bridge.destination)
            self._carry([message], route.queues, route.link.time_s(bridge.size_bytes), now_s)
            return
        held = self.held.setdefault(collective.tags, [])
        held.append(message)
        if len(held) == len(collective.tags):
            del self.held[collective.tags]
            link = self.slowest(collective.devices)
            time_s = collective_s(collective.kind, collective.size_bytes, len(collective.devices), link)
            ends = ((self.agenda.bridges[number].source, self.agenda.bridges[number].destination) for number in held)
            queues = dict.fromkeys(queue for pair in ends for queue in self._route(*pair).queues)
            self._carry(held, queues, time_s, now_s)

    def _dissolve(self, now_s: float) -> bool:
        """Send what waits for a collective that some device only reaches by the help of these very messages."""
        held, self.held = self.held, {}
        for message in (message for messages in held.values() for message in messages):
            self.collective_of.pop(message)
            self._send(message, now_s)
        return bool(held)

    def _carry(self, messages: Sequence[int], queues: Iterable[int], time_s: float, now_s: float) -> None:
        """Let messages start together, as soon as all that they wait for one another at is free, and end together."""
        start_s, free_s = now_s, self.free_s
        for queue in queues:
            if free_s[queue] > start_s:
                start_s = free_s[queue]
        for queue in queues:
            free_s[queue] = start_s + time_s
        for message in messages:
            self.start_s[message], self.took_s[message] = start_s, time_s
            heappush(self.ends, (start_s + time_s, message))

    def _route(self, source: int, destination: int) -> _Route:
        route = self.routes.get((source, destination))
        if route is None:
            self.free_s.append(0.0)
            queues = (len(self.free_s) - 1, *self.cluster.shared_by(source, destination))
            route = self.routes[source, destination] = _Route(self.cluster.link(source, destination), queues)
        return route

    def _events(self) -> tuple[Event, ...]:
        """What happened, in order of time; of what starts at once, messages first, then by device."""
        agenda, index, wire = self.agenda, self.agenda.workload.index, self.agenda.workload.program.wire
        microbatches = [None if m < 0 else m for m in index.microbatch.tolist()]
        found = []
        for message, bridge in enumerate(agenda.bridges):
            start_s, readers = self.start_s[message], agenda.then[message]
            if start_s is not None:  # else no task of the schedule makes it
                reader = agenda.task(min(readers)) if readers else None
                about = wire[bridge.wire].microbatch, bridge.destination, bridge.size_bytes, reader
                end_s = start_s + self.took_s[message]
                found.append(Event(bridge.source, "send", bridge.wire, start_s, end_s, *about))
        for number, device, start_s, took_s in zip(
            agenda.numbers,
            agenda.devices,
            self.start_s[self.num_messages :],
            self.took_s[self.num_messages :],
            strict=True,
        ):
            task = index.tasks[number]
            assert start_s is not None
            found.append(Event(device, task.kind, task.segment, start_s, start_s + took_s, microbatches[number]))
        return tuple(sorted(found, key=attrgetter("start_s")))

    def _check_all_ran(self) -> None:
        agenda, index = self.agenda, self.agenda.workload.index
        for thing, number in enumerate(agenda.numbers, self.num_messages):
            if self.start_s[thing] is not None:
                continue
            task = index.tasks[number]
            befores = ((index.tasks[other], int(agenda.things[other])) for other in index.before[number])
            waits = [str(other) for other, n in befores if n < 0 or self.start_s[n] is None]
            waits += [
                f"message {bridge.wire!r} from device {bridge.source}"
                for message, bridge in enumerate(agenda.bridges)
                if self.start_s[message] is None and thing in agenda.then[message]
            ]
            raise ScheduleError(
                f"schedule {agenda.schedule.name!r}: device {agenda.device(thing)} would wait for ever at {task} "
                f"for {', '.join(waits) or 'itself'}"
            )
