"""What a schedule will take, before it runs: a discrete-event simulation on forecast times."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import attrgetter

from graphpart.cost.collectives import collective_s, slowest_link
from graphpart.cost.task_times import task_times
from graphpart.errors import ScheduleError
from graphpart.ir.cluster import Cluster, Link
from graphpart.ir.graph import Graph
from graphpart.ir.program import Bridge, Collective
from graphpart.ir.schedule import Schedule, Task, update_of
from graphpart.ir.timeline import Event, Timeline
from graphpart.ir.workload import Workload


def simulate(
    workload: Workload,
    schedule: Schedule,
    cluster: Cluster,
    graph: Graph,
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
        graph: the graph that the program was lowered from.
        times: seconds per task; by default :func:`graphpart.cost.task_times.task_times`, from the roofline model.

    Raises:
        ScheduleError: if tasks wait for ever, or the cluster has too few devices.
    """
    program = workload.program
    if len(cluster) < program.num_devices:
        raise ScheduleError(f"the program needs {program.num_devices} devices; the cluster has {len(cluster)}")
    with _no_collection():
        times = task_times(workload, cluster, graph) if times is None else times
        return _Simulation(_Agenda(workload, schedule), cluster, times).run()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking, again and again, through millions of values that all stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Agenda:
    """All that happens in a step, numbered, and what waits for what.

    Messages come first, forward ones before those of gradients; then tasks, device by device in the schedule's order.
    A task also waits for the one before it on its device, so that each thing may begin once nothing is missing.

    Attributes:
        bridges: per message, its bridge.
        tasks: all tasks.
        devices: per task, its device.
        num_missing: per thing, how many others have to end first.
        then: per thing, those that wait for it.
    """

    def __init__(self, workload: Workload, schedule: Schedule) -> None:
        self.workload, self.schedule = workload, schedule
        backward = workload.backward
        self.bridges: Sequence[Bridge] = workload.program.bridges + (() if backward is None else backward.bridges)
        self.tasks: list[Task] = []
        self.devices: list[int] = []
        self.number: dict[str, dict[str, int]] = {kind: {} for kind in "FBWU"}  # of a task, by kind and segment
        self.num_missing = [0] * len(self.bridges)
        self.then: list[list[int]] = [[] for _ in self.bridges]
        self._number_tasks()
        self._wait_for_tasks()
        self._wait_for_messages()

    def _number_tasks(self) -> None:
        """Number the tasks; each waits for the one before it on its device."""
        waits_for = self.workload.waits_for
        for device, line in enumerate(self.schedule.tasks):
            for thing, task in enumerate(line, len(self.then)):
                if task not in waits_for:
                    raise ScheduleError(f"schedule {self.schedule.name!r} has task {task}, which the program doesn't")
                if self.number[task.kind].setdefault(task.segment, thing) != thing:
                    raise ScheduleError(f"schedule {self.schedule.name!r} has task {task} twice")
                self.then.append([thing + 1])
            if line:
                self.then[-1].clear()
                self.num_missing += [0] + [1] * (len(line) - 1)
            self.tasks += line
            self.devices += [device] * len(line)

    def _wait(self, thing: int | None, task: Task) -> None:
        """Let a thing wait for a task; what the schedule leaves out is None, and never ends."""
        if thing is not None:
            self.num_missing[thing] += 1
            other = self.number[task.kind].get(task.segment)
            if other is not None:
                self.then[other].append(thing)

    def _wait_for_tasks(self) -> None:
        """Let tasks wait for others, and messages for the tasks that make them.

        No task makes a source, nor a gradient that the caller gives.
        """
        program, number = self.workload.program, self.number
        for task, before in self.workload.waits_for.items():
            thing = number[task.kind].get(task.segment)
            for other in before:
                self._wait(thing, other)
        for message, bridge in enumerate(self.bridges):
            if message >= len(program.bridges):
                for task in self.workload.makers(bridge.wire):
                    if program.segment[task.segment].device == bridge.source:
                        self._wait(message, task)
            elif segment := program.wire[bridge.wire].segment:
                self._wait(message, Task("F", segment))

    def _wait_for_messages(self) -> None:
        """Let tasks wait for the messages that they read."""
        program, backward = self.workload.program, self.workload.backward
        arriving = {(bridge.wire, bridge.destination): message for message, bridge in enumerate(program.bridges)}
        readers = [
            (message, self.number["F"].get(segment.name))
            for segment in program.segments
            for name in segment.inputs
            if (message := arriving.get((name, segment.device))) is not None
        ]
        for message, bridge in enumerate(() if backward is None else backward.bridges, len(program.bridges)):
            maker = program.wire[bridge.wire].segment
            reader = Task("B", maker) if maker else update_of(bridge.destination)
            readers.append((message, self.number[reader.kind].get(reader.segment)))
        for message, thing in readers:
            if thing is not None:
                self.num_missing[thing] += 1
                self.then[message].append(thing)

    def task(self, thing: int) -> Task:
        """The task with a number."""
        return self.tasks[thing - len(self.bridges)]

    def device(self, thing: int) -> int:
        """The device of the task with a number."""
        return self.devices[thing - len(self.bridges)]


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
        self.took_s = [0.0] * self.num_messages + [times[task] for task in agenda.tasks]
        self.start_s: list[float | None] = [None] * len(self.took_s)
        self.num_missing = list(agenda.num_missing)
        self.ends: list[tuple[float, int]] = []  # when, and what; ties go by number
        self.routes: dict[tuple[int, int], _Route] = {}
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
            link = slowest_link(self.cluster, collective.devices)
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
        agenda, program = self.agenda, self.agenda.workload.program
        found = []
        for thing, (start_s, took_s) in enumerate(zip(self.start_s, self.took_s, strict=True)):
            if start_s is None:  # a message that no task of the schedule makes
                continue
            if thing < self.num_messages:
                bridge, readers = agenda.bridges[thing], agenda.then[thing]
                reader = agenda.task(min(readers)) if readers else None
                about = program.wire[bridge.wire].microbatch, bridge.destination, bridge.size_bytes, reader
                found.append(Event(bridge.source, "send", bridge.wire, start_s, start_s + took_s, *about))
            else:
                task, device = agenda.task(thing), agenda.device(thing)
                microbatch = agenda.workload.microbatch_of(task)
                found.append(Event(device, task.kind, task.segment, start_s, start_s + took_s, microbatch))
        return tuple(sorted(found, key=attrgetter("start_s")))

    def _check_all_ran(self) -> None:
        agenda = self.agenda
        for thing in range(self.num_messages, len(self.start_s)):
            if self.start_s[thing] is not None:
                continue
            task, number = agenda.task(thing), agenda.number
            befores = {other: number[other.kind].get(other.segment) for other in agenda.workload.waits_for[task]}
            waits = [str(other) for other, n in befores.items() if n is None or self.start_s[n] is None]
            waits += [
                f"message {bridge.wire!r} from device {bridge.source}"
                for message, bridge in enumerate(agenda.bridges)
                if self.start_s[message] is None and thing in agenda.then[message]
            ]
            raise ScheduleError(
                f"schedule {agenda.schedule.name!r}: device {agenda.device(thing)} would wait for ever at {task} "
                f"for {', '.join(waits) or 'itself'}"
            )
