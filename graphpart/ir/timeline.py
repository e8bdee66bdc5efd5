"""What happened when: the same noun for a forecast and for a measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from graphpart.ir.schedule import Task

if TYPE_CHECKING:
    from graphpart.draw.timeline.compare import Comparison


class Event(NamedTuple):
    """One span of time on one device; a named tuple, since a long pipeline has millions.

    Attributes:
        device: index of the device; for a message, the sender.
        kind: ``F`` or ``B`` for work, ``send`` for a message, ``wait`` for the time a device stood still for one.
        name: segment or wire.
        start_s: start, seconds from the step's start.
        end_s: end, seconds from the step's start.
        microbatch: which microbatch, or None.
        peer: index of the device that a message goes to, or that is waited for.
        size_bytes: bytes of the message.
        reader: the task that reads the message first, where it is known.
    """

    device: int
    kind: str
    name: str
    start_s: float
    end_s: float
    microbatch: int | None = None
    peer: int | None = None
    size_bytes: int = 0
    reader: Task | None = None

    @property
    def is_work(self) -> bool:
        """Whether the device computes, as opposed to a message under way or a wait for one."""
        return self.kind not in ("send", "wait")


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What a device holds from a point in time until its next sample.

    Attributes:
        time_s: seconds from the step's start.
        size_bytes: bytes by what they are for.
    """

    time_s: float
    size_bytes: Mapping[str, int]


class LinkUse(NamedTuple):
    """What a link, or some ports of a switch in one direction, carried.

    Attributes:
        name: for people.
        size_bytes: bytes; of a collective, what its algorithm sends there.
        busy_s: how long it takes to carry them.
    """

    name: str
    size_bytes: float
    busy_s: float


@dataclass(frozen=True)
class Timeline:
    """Events of one training step.

    Attributes:
        num_devices: number of devices.
        events: in order of their start.
        num_messages: messages between devices.
        message_bytes: bytes between devices.
        memory: per device, its memory over time; empty where it is not known.
        device_names: per device; empty where they are not known.
        links: what links carried, the busiest first; empty where it is not known.
    """

    num_devices: int
    events: tuple[Event, ...]
    num_messages: int = 0
    message_bytes: int = 0
    memory: tuple[tuple[MemorySample, ...], ...] = ()
    device_names: tuple[str, ...] = ()
    links: tuple[LinkUse, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each device."""
        return self.device_names or tuple(f"device {number}" for number in range(self.num_devices))

    @cached_property
    def makespan_s(self) -> float:
        """Time from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(e.end_s for e in self.events) - min(e.start_s for e in self.events)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of work, in order of their first start."""
        return tuple(dict.fromkeys(e.kind for e in self.events if e.is_work))

    @cached_property
    def num_microbatches(self) -> int:
        """Parts of the batch, in time; 1 where work is not told apart by them."""
        return len({e.microbatch for e in self.events if e.microbatch is not None}) or 1

    def spent_s(self, kind: str) -> tuple[float, ...]:
        """Per device, time spent on one kind of event."""
        total = [0.0] * self.num_devices
        for event in self.events:
            if event.kind == kind:
                total[event.device] += event.end_s - event.start_s
        return tuple(total)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Per device, time spent computing."""
        total = [0.0] * self.num_devices
        for event in self.events:
            if event.is_work:
                total[event.device] += event.end_s - event.start_s
        return tuple(total)

    @cached_property
    def link_bytes(self) -> Mapping[tuple[int, int], int]:
        """Bytes by sender and receiver, for every pair between which a message went."""
        found: dict[tuple[int, int], int] = {}
        for event in self.events:
            if event.kind == "send" and event.peer is not None:
                pair = event.device, event.peer
                found[pair] = found.get(pair, 0) + event.size_bytes
        return found

    @property
    def bubble(self) -> float:
        """Part of the devices' time that is idle, over devices that work at all."""
        used = [b for b in self.busy_s if b]
        return 1 - sum(used) / (len(used) * self.makespan_s) if used and self.makespan_s else 0.0

    @property
    def staleness(self) -> Mapping[int, int]:
        """Per number of a device's updates between a task's forward and its backward, how many tasks had so many."""
        updates = [0] * self.num_devices
        at_forward: dict[tuple[int, str], int] = {}
        found: Counter[int] = Counter()
        for event in self.events:  # one device's work is in the order of its start
            if event.kind == "U":
                updates[event.device] += 1
            elif event.kind == "F":
                at_forward[event.device, event.name] = updates[event.device]
            elif event.kind == "B":
                found[updates[event.device] - at_forward[event.device, event.name]] += 1
        return found

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Per device, the most memory in use; empty where it is not known."""
        return tuple(max(sum(s.size_bytes.values()) for s in samples) for samples in self.memory)

    def draw(self, path: str | Path, *, title: str = "") -> Path:
        """Draw the step as a chart, a row a device, to ``.svg``; see
        :func:`graphpart.draw.timeline.gantt.draw_timelines`.

        Raises:
            DrawError: if the suffix is another, or the file cannot be written.
        """
        from graphpart.draw.timeline.gantt import draw_timelines

        return draw_timelines({title: self}, path)

    def save_trace(self, path: str | Path) -> Path:
        """Write the step as a trace that https://ui.perfetto.dev opens; see :mod:`graphpart.draw.timeline.perfetto`.

        Raises:
            DrawError: if the file cannot be written.
        """
        from graphpart.draw.timeline.perfetto import save_trace

        return save_trace(self, path)

    def compare(self, measured: Timeline) -> Comparison:
        """This forecast beside a measurement, device by device; print it for a table.

        Raises:
            GraphpartError: if the other timeline is one of another number of devices.
        """
        from graphpart.draw.timeline.compare import compare

        return compare(self, measured)

    def __str__(self) -> str:
        from graphpart.draw.timeline.compare import summary

        return summary(self)
