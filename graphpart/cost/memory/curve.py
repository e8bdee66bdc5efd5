"""Memory of every device over one step: what a forecast timeline fills and frees, and when."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import ceil
from operator import attrgetter
from typing import NamedTuple

from graphpart.cost.memory.forecast import DeviceMemory, MemoryForecast
from graphpart.cost.memory.saved import Savings, Storage
from graphpart.cost.time.weight_steps import weight_steps
from graphpart.cost.touched import touched_bytes
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.ir.program import Backward, Program, Segment, Step
from graphpart.ir.schedule import update_of
from graphpart.ir.timeline import Event, MemorySample, Timeline

_Key = tuple[Storage, int | None]
"""A storage and the microbatch it belongs to."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Memory of a device from a point in time until the next one.

    Attributes:
        time_s: seconds from the step's start.
        memory: what the device holds.
    """

    time_s: float
    memory: DeviceMemory


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Memory of one device over one step.

    Attributes:
        moments: in order of time; the first is the step's start.
    """

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The first moment with most memory in use."""
        return max(self.moments, key=lambda moment: moment.memory.total_bytes)

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """The curve as part of a timeline."""
        return tuple(MemorySample(moment.time_s, moment.memory.parts) for moment in self.moments)


class _Change(NamedTuple):
    """Bytes of one kind that a device takes (or, negative, frees) at a time."""

    time_s: float
    device: int
    kind: str
    num_bytes: int


@no_collection()
def memory_over_time(
    graph: Graph,
    placement: Placement,
    program: Program,
    backward: Backward,
    timeline: Timeline,
    forecast: MemoryForecast,
) -> tuple[MemoryCurve, ...]:
    """Follow a forecast step: parameters, buffers and optimizer state stay, the rest comes and goes.

    A segment's saved activations are held from the end of its forward to the end of its backward, storages that
    several segments save from the first to the last. A segment that is run again holds what it reads for so long, and
    what it saves while its backward runs. Where gradients of weights are made apart, what those need is held for them:
    what their operators saved, and the gradients of their results. A gradient appears with its first part and stays at
    its parameter's home, until the device updates its parameters if the step does. A message's buffer is held at the
    receiver from the start of the transfer until its last reader has run.

    Args:
        graph: the traced model.
        placement: where everything runs and lives.
        program: the lowered program.
        backward: its backward pass.
        timeline: the forecast of one step.
        forecast: memory that stays, by device.

    Returns:
        A curve per device.
    """
    changes: list[list[_Change]] = [[] for _ in forecast.devices]
    for change in _Follower(graph, placement, program, backward, timeline).changes():
        changes[change.device].append(change)
    stays = (replace(whole, gradients_bytes=0, saved_bytes=0, bridges_bytes=0) for whole in forecast.devices)
    return tuple(_curve(start, own) for start, own in zip(stays, changes, strict=True))


def _curve(start: DeviceMemory, changes: list[_Change]) -> MemoryCurve:
    """One device's memory: what is freed at a time is free for what is taken then."""
    moments = [Moment(0.0, start)]
    held = {kind: getattr(start, kind) for kind in ("gradients_bytes", "saved_bytes", "bridges_bytes")}
    for time_s, at_once in groupby(sorted(changes, key=attrgetter("time_s")), key=attrgetter("time_s")):
        for change in at_once:
            held[change.kind] += change.num_bytes
        if moments[-1].time_s == time_s:
            moments.pop()
        moments.append(Moment(time_s, replace(start, **held)))
    return MemoryCurve(tuple(moments))


class _Follower:
    """Turns a timeline's events into changes of memory."""

    def __init__(
        self, graph: Graph, placement: Placement, program: Program, backward: Backward, timeline: Timeline
    ) -> None:
        self.graph = graph
        self.placement = placement
        self.program = program
        self.backward = backward
        self.timeline = timeline
        self.starts = {(e.kind, e.name): e.start_s for e in timeline.events}
        self.ends = {(e.kind, e.name): e.end_s for e in timeline.events if e.kind != "send"}
        self.savings = Savings(graph, placement, program.num_devices)
        self.saved_by = {
            op.name: {device: own for device, own in enumerate(self.savings.of([op])) if own} for op in graph.operators
        }

    def changes(self) -> Iterator[_Change]:
        yield from self._activations()
        yield from self._results_gradients()
        yield from self._gradients()
        for event in self.timeline.events:
            if event.kind == "send" and event.peer is not None:
                yield from self._message(event, event.peer)

    def _keepers(self, steps: Iterable[Step]) -> Iterable[str]:
        """The traced operators whose backward is that of some steps: those that keep anything for it."""
        lowered = self.program.graph.operator
        ops = [lowered[step.operator] for step in steps if not step.is_bridge]
        return dict.fromkeys(op.origin for op in ops if op.saved or op.saved_extra_bytes)

    def _storages(self, segment: Segment, steps: Iterable[Step] | None = None) -> Mapping[_Key, int]:
        """The storages that a segment keeps, or some of its steps."""
        found: dict[_Key, int] = {}
        for name in self._keepers(segment.steps if steps is None else steps):
            for storage, size_bytes in self.saved_by[name].get(segment.device, {}).items():
                key = (storage, segment.microbatch if storage.parted else None)
                found[key] = max(ceil(size_bytes * (segment.fraction if storage.parted else 1.0)), found.get(key, 0))
        return found

    def _read(self, segment: Segment) -> Mapping[_Key, int]:
        """The storages that a segment reads and keeps to run again; parameters and buffers stay anyway."""
        found: dict[_Key, int] = {}
        for wire in (self.program.wire[name] for name in segment.inputs):
            if wire.origin in ("segment", "input"):
                root = self.savings.roots.get(wire.value, wire.value)
                storage = Storage(root, root in self.savings.samples)
                parted = segment.microbatch if storage.parted else None
                key = (storage, parted if wire.microbatch is None else wire.microbatch)
                found[key] = max(wire.size_bytes, found.get(key, 0))
        return found

    def _activations(self) -> Iterator[_Change]:
        spans: dict[tuple[int, _Key], tuple[float, float, int]] = {}
        for segment in self.program.segments:
            start_s, end_s = self.ends.get(("F", segment.name)), self.ends.get(("B", segment.name))
            if start_s is None or end_s is None:
                continue
            late_s = self.ends.get(("W", segment.name), end_s)
            late = {} if late_s == end_s else self._storages(segment, self._late(segment))
            for storage, size_bytes in (self._read if segment.recompute else self._storages)(segment).items():
                until_s = late_s if storage in late else end_s
                first_s, last_s, most = spans.get((segment.device, storage), (start_s, until_s, 0))
                spans[segment.device, storage] = (min(first_s, start_s), max(last_s, until_s), max(most, size_bytes))
        yield from self._run_again(spans)
        for (device, _), (start_s, end_s, size_bytes) in spans.items():
            yield _Change(start_s, device, "saved_bytes", size_bytes)
            yield _Change(end_s, device, "saved_bytes", -size_bytes)

    def _run_again(self, kept: Collection[tuple[int, _Key]]) -> Iterator[_Change]:
        """What segments save when they run again, until their backward, or its gradients of weights, are done."""
        for segment in self.program.segments:
            if not segment.recompute or (end_s := self.ends.get(("B", segment.name))) is None:
                continue
            late_s = self.ends.get(("W", segment.name), end_s)
            late = {} if late_s == end_s else self._storages(segment, self._late(segment))
            for storage, size_bytes in self._storages(segment).items():
                if (segment.device, storage) not in kept:
                    yield _Change(self.starts["B", segment.name], segment.device, "saved_bytes", size_bytes)
                    freed_s = late_s if storage in late else end_s
                    yield _Change(freed_s, segment.device, "saved_bytes", -size_bytes)

    def _late(self, segment: Segment) -> tuple[Step, ...]:
        """The steps that leave gradients of weights for later."""
        work = self.backward.segments.get(segment.name)
        return weight_steps(segment, work.weights)[0] if work is not None else ()

    def _results_gradients(self) -> Iterator[_Change]:
        """What gradients of weights need besides activations: the gradients of their operators' results."""
        lowered = self.program.graph.operator
        for segment in self.program.segments:
            if (end_s := self.ends.get(("W", segment.name))) is None:
                continue
            size_bytes = 0
            for op in (self.graph.operator[lowered[step.operator].origin] for step in self._late(segment)):
                for value in op.results:
                    whole = touched_bytes(op, value.name, self.graph, self.placement, self.savings.roots).get(
                        segment.device, 0
                    )
                    size_bytes += ceil(whole * (segment.fraction if value.name in self.savings.samples else 1.0))
            yield _Change(self.ends["B", segment.name], segment.device, "saved_bytes", size_bytes)
            yield _Change(end_s, segment.device, "saved_bytes", -size_bytes)

    def _gradients(self) -> Iterator[_Change]:
        sent = {(e.name, e.device): e.end_s for e in self.timeline.events if e.kind == "send"}
        for name in self.backward.sources:
            wire = self.program.wire[name]
            if wire.origin != "parameter":
                continue
            first: dict[int, float] = {}
            for user in self.backward.contributors.get(name, ()):
                device, end_s = self.program.segment[user].device, self._made_s(user, name)
                first[device] = min(end_s, first.get(device, end_s))
            if first:
                first.setdefault(wire.device, min(first.values()))
            updated_s = self.ends.get(("U", update_of(wire.device).segment))
            for device, start_s in first.items():
                yield _Change(start_s, device, "gradients_bytes", wire.size_bytes)
                freed_s = updated_s if device == wire.device else max(sent.get((name, device), start_s), start_s)
                if freed_s is not None:
                    yield _Change(freed_s, device, "gradients_bytes", -wire.size_bytes)

    def _made_s(self, segment: str, weight: str) -> float:
        """When a segment has made its part of a parameter's gradient."""
        late = weight in self.backward.segments[segment].weights
        return self.ends["W" if late and ("W", segment) in self.ends else "B", segment]

    def _message(self, event: Event, receiver: int) -> Iterator[_Change]:
        """The buffer of a message at its receiver: a value until its last reader ran, a gradient until it was used."""
        wire = self.program.wire[event.name]
        if event.device == wire.device:
            if wire.origin != "segment":  # a copy of a parameter stays for the step, and is counted with those
                return
            used_s = self.read_until.get((event.name, receiver), event.end_s)
        else:
            used_s = self.ends.get(("B", wire.segment), event.end_s)
        yield _Change(event.start_s, receiver, "bridges_bytes", wire.size_bytes)
        yield _Change(max(event.end_s, used_s), receiver, "bridges_bytes", -wire.size_bytes)

    @cached_property
    def read_until(self) -> Mapping[tuple[str, int], float]:
        """Per wire and device, when the last of its segments that read it has ended."""
        found: dict[tuple[str, int], float] = {}
        for segment in self.program.segments:
            if (end_s := self.ends.get(("F", segment.name))) is not None:
                for name in segment.inputs:
                    key = (name, segment.device)
                    found[key] = max(end_s, found.get(key, end_s))
        return found
