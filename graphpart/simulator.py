"""What a schedule will take, before it runs: a discrete-event simulation on forecast times."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphpart.cost.collectives import collective_s, slowest_link
from graphpart.cost.roofline import OperatorTime, OperatorWork, operator_time, operator_works, roofline_s
from graphpart.errors import ScheduleError
from graphpart.ir.cluster import Cluster, Device
from graphpart.ir.graph import Graph, refs
from graphpart.ir.program import Bridge, Program, Segment
from graphpart.ir.schedule import Schedule, Task, is_ready
from graphpart.ir.timeline import Event, Timeline
from graphpart.ir.workload import Workload


def simulate(workload: Workload, schedule: Schedule, cluster: Cluster, graph: Graph) -> Timeline:
    """Forecast the timeline of one step.

    Each device runs its tasks in order. A task starts when all it waits for has ended and every
    message that it reads has arrived. A link, in each direction, carries one message at a time, in the order in which
    they become ready; messages overlap compute. A collective starts when all who take part are ready, and takes the
    time of its best algorithm. Other times come from the roofline model and from latency plus bytes over bandwidth.

    Args:
        workload: the tasks of the step.
        schedule: the order of tasks per device.
        cluster: the devices; at least as many as the program's.
        graph: the graph that the program was lowered from.

    Raises:
        ScheduleError: if tasks wait for ever, or the cluster has too few devices.
    """
    program = workload.program
    if len(cluster) < program.num_devices:
        raise ScheduleError(f"the program needs {program.num_devices} devices; the cluster has {len(cluster)}")
    return _Simulation(workload, schedule, cluster, segment_times(program, cluster, graph)).run()


def segment_times(program: Program, cluster: Cluster, graph: Graph) -> Mapping[str, OperatorTime]:
    """Forward and backward time of every segment, by name; a step takes its share of its operator's work.

    The backward of a segment that is run again takes the forward's time once more.

    Args:
        program: the lowered program.
        cluster: the devices.
        graph: the graph that the program was lowered from.
    """
    works = dict(operator_works(graph))
    heirs: dict[str, str] = {}  # of an operator that lowering rewrote, the stand-in that is charged with its work
    for step in (step for segment in program.segments for step in segment.steps):
        origin = step.operator.rsplit(".", 1)[0]
        if not step.is_bridge and step.operator not in works and origin in works:
            heirs.setdefault(origin, step.operator)
    works.update((heir, works[origin]) for origin, heir in heirs.items())
    return {
        segment.name: _segment_time(segment, program, cluster.devices[segment.device], works)
        for segment in program.segments
    }


def _segment_time(
    segment: Segment, program: Program, device: Device, works: Mapping[str, OperatorWork]
) -> OperatorTime:
    forward_s = backward_s = 0.0
    for step in segment.steps:
        if step.is_bridge:
            names = {ref.name for ref in refs((step.args, dict(step.kwargs)))} | set(step.results)
            size_bytes = sum(program.wire[name].size_bytes for name in names if name in program.wire)
            copy_s = roofline_s(0.0, size_bytes, "float32", device) + device.overhead_s
            time = OperatorTime(copy_s, copy_s)
        else:
            work = works.get(step.operator)
            if work is not None:
                time = operator_time(work, device, step.share)
            else:  # added by lowering: nothing is known but that it has to be started
                time = OperatorTime(device.overhead_s, device.overhead_s)
        forward_s += time.forward_s
        backward_s += time.backward_s
    return OperatorTime(forward_s, backward_s + forward_s if segment.recompute else backward_s)


@dataclass(frozen=True, slots=True)
class _Message:
    """A bridge in one direction of the step, and the tasks that make it."""

    bridge: Bridge
    after: tuple[Task, ...]


@dataclass
class _Simulation:
    """The state of one simulation."""

    workload: Workload
    schedule: Schedule
    cluster: Cluster
    times: Mapping[str, OperatorTime]
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.program, self.backward = self.workload.program, self.workload.backward
        self.queues = [deque(tasks) for tasks in self.schedule.tasks]
        self.queues += [deque() for _ in range(self.program.num_devices - len(self.queues))]
        self.idle = [True] * self.program.num_devices
        self.done: set[Task] = set()
        self.waits_for = self.workload.waits_for
        self.messages = list(self._messages())
        self.missing = [len(message.after) for message in self.messages]
        self.made_by: defaultdict[Task, list[int]] = defaultdict(list)
        for number, message in enumerate(self.messages):
            for task in message.after:
                self.made_by[task].append(number)
        self.arrived: set[int] = set()
        # A bridge's tag is its message's number.
        both = self.program.collectives + (self.backward.collectives if self.backward is not None else ())
        self.collective_of = {tag: collective for collective in both for tag in collective.tags}
        self.held: dict[tuple[int, ...], list[int]] = {}  # messages that wait for the rest of their collective
        self.link_free_s: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.needed = self._needed_messages()
        self.first_reader: dict[int, Task] = {}
        for task in (task for queue in self.queues for task in queue):
            for number in self.needed.get(task, ()):
                self.first_reader.setdefault(number, task)
        # Entries (time, number, what ended): a task, or the number of a message. The number keeps ties in order.
        self.ends: list[tuple[float, int, Task | int]] = []
        self.num_ends = 0

    def _messages(self) -> Iterator[_Message]:
        """Forward messages, then those of gradients."""
        for bridge in self.program.bridges:
            segment = self.program.wire[bridge.wire].segment
            yield _Message(bridge, (Task("F", segment),) if segment else ())
        if self.backward is not None:
            for bridge in self.backward.bridges:
                makers = self.workload.makers(bridge.wire)
                yield _Message(bridge, tuple(t for t in makers if self.workload.device_of[t] == bridge.source))

    def _needed_messages(self) -> Mapping[Task, tuple[int, ...]]:
        """The messages that each task waits for."""
        num_forward = len(self.program.bridges)
        arriving: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)
        for number, message in enumerate(self.messages):
            kind = "F" if number < num_forward else "B"
            arriving[kind, message.bridge.wire, message.bridge.destination].append(number)
        needed: dict[Task, tuple[int, ...]] = {}
        for segment in self.program.segments:
            wires = [("F", segment.inputs)]
            if self.backward is not None and segment.name in self.backward.segments:
                wires.append(("B", self.backward.segments[segment.name].outputs))
            for kind, names in wires:
                found = (number for name in names for number in arriving[kind, name, segment.device])
                needed[Task(kind, segment.name)] = tuple(found)
        return needed

    def run(self) -> Timeline:
        """Run to the end."""
        for number, message in enumerate(self.messages):
            if not message.after:  # a source, or a gradient that the caller gives: it is there from the start
                self._send(number, 0.0)
        for device in range(self.program.num_devices):
            self._start_next(device, 0.0)
        now_s = 0.0
        while self.ends or self._dissolve(now_s):
            now_s, _, what = heapq.heappop(self.ends)
            if isinstance(what, Task):
                self._end_task(what, now_s)
            else:
                self.arrived.add(what)
            for device in range(self.program.num_devices):
                self._start_next(device, now_s)
        self._check_all_ran()
        return Timeline(
            num_devices=self.program.num_devices,
            events=tuple(sorted(self.events, key=lambda e: (e.start_s, e.device, e.kind, e.name))),
            num_messages=len(self.messages),
            message_bytes=sum(message.bridge.size_bytes for message in self.messages),
            device_names=tuple(device.name for device in self.cluster.devices[: self.program.num_devices]),
        )

    def _end_task(self, task: Task, now_s: float) -> None:
        self.done.add(task)
        self.idle[self.program.segment[task.segment].device] = True
        for number in self.made_by[task]:
            self.missing[number] -= 1
            if not self.missing[number]:
                self._send(number, now_s)

    def _start_next(self, device: int, now_s: float) -> None:
        """Start the device's next task if it is idle and the task is ready."""
        if not self.idle[device] or not self.queues[device]:
            return
        task = self.queues[device][0]
        if not self._is_ready(task):
            return
        self.queues[device].popleft()
        self.idle[device] = False
        time = self.times[task.segment]
        end_s = now_s + (time.forward_s if task.kind == "F" else time.backward_s)
        microbatch = self.program.segment[task.segment].microbatch
        self.events.append(Event(device, task.kind, task.segment, now_s, end_s, microbatch))
        self._push(end_s, task)

    def _is_ready(self, task: Task) -> bool:
        if task not in self.waits_for:
            raise ScheduleError(f"schedule {self.schedule.name!r} has task {task}, which the program doesn't")
        arrived = all(number in self.arrived for number in self.needed.get(task, ()))
        return arrived and is_ready(task, self.done, self.waits_for)

    def _send(self, number: int, now_s: float) -> None:
        """Put a message on its link, behind those that became ready before it; a collective's go together."""
        collective = self.collective_of.get(number)
        if collective is None:
            bridge = self.messages[number].bridge
            link = self.cluster.link(bridge.source, bridge.destination)
            self._carry([number], link.time_s(bridge.size_bytes), now_s)
            return
        held = self.held.setdefault(collective.tags, [])
        held.append(number)
        if len(held) == len(collective.tags):
            del self.held[collective.tags]
            link = slowest_link(self.cluster, collective.devices)
            time_s = collective_s(collective.kind, collective.size_bytes, len(collective.devices), link)
            self._carry(held, time_s, now_s)

    def _dissolve(self, now_s: float) -> bool:
        """Send what waits for a collective that some device only reaches by the help of these very messages."""
        held, self.held = self.held, {}
        for number in (number for numbers in held.values() for number in numbers):
            self.collective_of.pop(number)
            self._send(number, now_s)
        return bool(held)

    def _carry(self, numbers: Sequence[int], time_s: float, now_s: float) -> None:
        """Let messages start together, as soon as all their links are free, and end together."""
        bridges = [self.messages[number].bridge for number in numbers]
        ends = {(bridge.source, bridge.destination) for bridge in bridges}
        start_s = max(now_s, *(self.link_free_s[pair] for pair in ends))
        end_s = start_s + time_s
        self.link_free_s.update(dict.fromkeys(ends, end_s))
        for number, bridge in zip(numbers, bridges, strict=True):
            self.events.append(
                Event(
                    bridge.source,
                    "send",
                    bridge.wire,
                    start_s,
                    end_s,
                    self.program.wire[bridge.wire].microbatch,
                    peer=bridge.destination,
                    size_bytes=bridge.size_bytes,
                    reader=self.first_reader.get(number),
                )
            )
            self._push(end_s, number)

    def _push(self, end_s: float, what: Task | int) -> None:
        heapq.heappush(self.ends, (end_s, self.num_ends, what))
        self.num_ends += 1

    def _check_all_ran(self) -> None:
        for device, queue in enumerate(self.queues):
            if queue:
                task = queue[0]
                waits = [str(other) for other in self.waits_for[task] if other not in self.done]
                waits += [
                    f"message {self.messages[n].bridge.wire!r} from device {self.messages[n].bridge.source}"
                    for n in self.needed.get(task, ())
                    if n not in self.arrived
                ]
                raise ScheduleError(
                    f"schedule {self.schedule.name!r}: device {device} would wait for ever at {task} "
                    f"for {', '.join(waits) or 'itself'}"
                )
