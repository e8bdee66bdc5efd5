"""What happened when: the same noun for a forecast and for a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Event:
    """One span of time on one device.

    Attributes:
        device: index of the device; for a message, the sender.
        kind: ``F``, ``B``, or ``send``.
        name: segment or wire.
        start_s: start, seconds from the step's start.
        end_s: end, seconds from the step's start.
        microbatch: which microbatch, or None.
        peer: index of the device that a message goes to, where it is known.
    """

    device: int
    kind: str
    name: str
    start_s: float
    end_s: float
    microbatch: int | None = None
    peer: int | None = None


@dataclass(frozen=True)
class Timeline:
    """Events of one training step.

    Attributes:
        num_devices: number of devices.
        events: in order of their start.
        num_messages: messages between devices.
        message_bytes: bytes between devices.
        peak_memory_bytes: per device index, the most memory in use.
    """

    num_devices: int
    events: tuple[Event, ...]
    num_messages: int = 0
    message_bytes: int = 0
    peak_memory_bytes: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def makespan_s(self) -> float:
        """Time from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(e.end_s for e in self.events) - min(e.start_s for e in self.events)

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Per device, time spent computing."""
        total = [0.0] * self.num_devices
        for event in self.events:
            if event.kind != "send":
                total[event.device] += event.end_s - event.start_s
        return tuple(total)

    @property
    def bubble(self) -> float:
        """Part of the devices' time that is idle, over devices that work at all."""
        used = [b for b in self.busy_s if b]
        return 1 - sum(used) / (len(used) * self.makespan_s) if used and self.makespan_s else 0.0
