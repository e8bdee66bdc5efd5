"""One device's part of a step. The same code runs in a thread and in a process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphpart.ir.cluster import Device
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.program import Backward, Bridge, Program, Segment, Wire
from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.timeline import Event
from graphpart.runtime.codegen import Executable, compile_segment
from graphpart.runtime.faults import located
from graphpart.runtime.mailbox import Mailbox
from graphpart.runtime.random import StepRandom

KeepGradient = Callable[[Wire, Tensor], None]
"""Takes the gradient of a parameter's wire, on the worker's thread."""


@dataclass(frozen=True)
class DeviceCode:
    """What one device needs to know of a program; made once, shared by all steps.

    Attributes:
        program: the whole program.
        graph: the graph it comes from, for errors.
        device_index: which device this is.
        device: the torch device.
        executables: compiled segments of this device, by name.
        cluster_device: the device as the plan knows it.
        forecast_bytes: memory that the plan expects it to take.
    """

    program: Program
    graph: Graph
    device_index: int
    device: torch.device
    executables: Mapping[str, Executable]
    cluster_device: Device
    forecast_bytes: float

    @classmethod
    def build(
        cls,
        program: Program,
        graph: Graph,
        device_index: int,
        device: torch.device,
        cluster_device: Device,
        forecast_bytes: float,
    ) -> DeviceCode:
        """Compile the segments of one device."""
        own = [s for s in program.segments if s.device == device_index]
        executables = {s.name: compile_segment(s, device, graph) for s in own}
        return cls(program, graph, device_index, device, executables, cluster_device, forecast_bytes)

    def operator(self, name: str) -> Operator | None:
        """The graph operator behind a step; a rewritten mean's parts are named after it."""
        return self.graph.operator.get(name) or self.graph.operator.get(name.rsplit(".", 1)[0])

    @cached_property
    def sends(self) -> Mapping[str, tuple[Bridge, ...]]:
        """Per wire made here, the messages it leaves in."""
        found: dict[str, list[Bridge]] = {}
        for bridge in self.program.bridges:
            if bridge.source == self.device_index:
                found.setdefault(bridge.wire, []).append(bridge)
        return {name: tuple(bridges) for name, bridges in found.items()}

    @cached_property
    def receives(self) -> Mapping[str, Bridge]:
        """Per wire made elsewhere and read here, the message it comes in."""
        return {b.wire: b for b in self.program.bridges if b.destination == self.device_index}

    @cached_property
    def num_reads(self) -> Mapping[str, int]:
        """Per wire, how often it is read here; one that the caller wants is never used up."""
        found: dict[str, int] = {}
        for segment in self.program.segments:
            if segment.device == self.device_index:
                for name in segment.inputs:
                    found[name] = found.get(name, 0) + 1
        for wanted in (*self.program.outputs, *(n for _, n in self.program.mutations)):
            if wanted is not None and self.program.wire[wanted].device == self.device_index:
                found[wanted] = found.get(wanted, 0) + 1
        return found

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Wires made here that the caller wants: outputs, and values that buffers are overwritten with."""
        wanted = dict.fromkeys((*self.program.outputs, *(n for _, n in self.program.mutations)))
        return tuple(n for n in wanted if n is not None and self.program.wire[n].device == self.device_index)


@dataclass(frozen=True)
class BackwardCode:
    """What one device needs to know of one backward pass.

    Attributes:
        backward: the whole backward pass.
        sends: per wire whose gradient leaves here, the message it leaves in.
        receives: per wire made here, the messages its gradient comes in, by rank.
        position: per wire, the place of each of this device's contributors in the order of summation.
    """

    backward: Backward
    sends: Mapping[str, Bridge]
    receives: Mapping[str, Mapping[int, Bridge]]
    position: Mapping[str, Mapping[str, int]]

    @classmethod
    def build(cls, program: Program, backward: Backward, device_index: int) -> BackwardCode:
        """Pick one device's part."""
        sends = {b.wire: b for b in backward.bridges if b.source == device_index}
        receives: dict[str, dict[int, Bridge]] = {}
        for bridge in backward.bridges:
            if bridge.destination == device_index:
                receives.setdefault(bridge.wire, {})[bridge.source] = bridge
        position = {}
        for name, segments in backward.contributors.items():
            own = [s for s in segments if program.segment[s].device == device_index]
            position[name] = {s: i for i, s in enumerate(own)}
        return cls(backward, sends, receives, position)


class OrderedSum:
    """A sum whose terms may come in any order and are added in one."""

    __slots__ = ("_early", "_next", "is_own", "num_terms", "total")

    def __init__(self, num_terms: int) -> None:
        self.num_terms = num_terms
        self.total: Tensor | None = None
        self.is_own = False
        self._next = 0
        self._early: dict[int, tuple[Tensor, bool]] = {}

    def add(self, position: int, term: Tensor, is_own: bool) -> bool:
        """Take one term, which may be changed in place if it is nobody else's; returns whether the sum is complete."""
        self._early[position] = (term, is_own)
        while self._next in self._early:
            self.total, self.is_own = _plus(self.total, self.is_own, *self._early.pop(self._next))
            self._next += 1
        return self._next == self.num_terms

    @property
    def whole(self) -> Tensor:
        """The sum, once every term is in."""
        assert self.total is not None and self._next == self.num_terms
        return self.total


def _plus(total: Tensor | None, total_is_own: bool, term: Tensor, term_is_own: bool) -> tuple[Tensor, bool]:
    """A sum and whether it may be changed in place; written over a term that may be, which saves its memory."""
    if total is None:
        return term, term_is_own
    if total_is_own:
        return total.add_(term), True
    if term_is_own:
        return torch.add(total, term, out=term), True
    return total + term, True


def _are_own(gradients: Sequence[Tensor | None], others: Iterable[Tensor | None]) -> list[bool]:
    """Which gradients share their memory with no other gradient of the segment (a sum passes one on to all terms)."""
    places = Counter(_place(g) for g in (*gradients, *others) if g is not None and g.layout == torch.strided)
    return [
        g is not None
        and g.layout == torch.strided
        and places[_place(g)] == 1
        and g.untyped_storage().nbytes() == g.numel() * g.element_size()  # not an expanded value, nor a part of one
        and g.is_contiguous()
        for g in gradients
    ]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Tape:
    """What a segment keeps from its forward for its backward."""

    leaves: Mapping[str, Tensor]
    edges: Mapping[str, GradientEdge]


@dataclass
class DeviceRun:
    """One device during one step: its values, its tapes, its gradients.

    Attributes:
        code: what the device runs.
        mailbox: how it talks to the others.
        read_source: gives the tensor of a source wire, on this device.
        random: the step's randomness.
        grad: whether a backward may follow.
        record: whether to note when each task ran and each message went. On a GPU that means to wait for it after
            each, so a recorded step is slower.
        events: what was noted.
        task: what runs now, if anything does.
        began_s: when it began to compute, its messages being there.
    """

    code: DeviceCode
    mailbox: Mailbox
    read_source: Callable[[str], Tensor]
    random: StepRandom
    grad: bool
    record: bool = False
    events: list[Event] = field(default_factory=list)
    task: Task | None = None
    began_s: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)
    reads_left: dict[str, int] = field(default_factory=dict)
    tapes: dict[str, Tape] = field(default_factory=dict)

    def forward(self, schedule: Schedule) -> None:
        """Run this device's forward tasks in order."""
        self._send_sources()
        for task in schedule.forward[self.code.device_index]:
            segment = self.code.program.segment[task.segment]
            with located(segment, self.code, "forward"):
                self._timed("F", segment, self._forward)

    def kept(self) -> dict[str, Tensor]:
        """Values that the caller wants, taken away from the device."""
        found = {}
        for name in self.code.kept:
            wire = self.code.program.wire[name]
            found[name] = self.values.pop(name) if wire.segment else self.read_source(name)
        return found

    def _send_sources(self) -> None:
        for name, bridges in self.code.sends.items():
            if not self.code.program.wire[name].segment:
                for bridge in bridges:
                    self._send(bridge, self.read_source(name).detach())

    def _forward(self, segment: Segment) -> None:
        executable = self.code.executables[segment.name]
        with torch.set_grad_enabled(self.grad):
            inputs = [self._leaf(name) for name in segment.inputs]
            outputs = executable.run(self.random, executable.keys, *inputs)
        if self.grad and segment.reach:
            leaves = {n: t for n, t in zip(segment.inputs, inputs, strict=True) if t.requires_grad}
            edges = {n: get_gradient_edge(t) for n, t in zip(segment.outputs, outputs, strict=True) if t.requires_grad}
            self.tapes[segment.name] = Tape(leaves, edges)
        del inputs
        for name, tensor in zip(segment.outputs, outputs, strict=True):
            tensor = tensor.detach()
            for bridge in self.code.sends.get(name, ()):
                self._send(bridge, tensor)
            if name in self.code.num_reads:
                self.values[name] = tensor
                self.reads_left[name] = self.code.num_reads[name]

    def _leaf(self, name: str) -> Tensor:
        """A segment's own view of a wire: detached, so that autograd stops at the segment's edge."""
        tensor = self._take(name).detach()
        if self.grad and self.code.program.wire[name].differentiable:
            tensor.requires_grad_()
        return tensor

    def _take(self, name: str) -> Tensor:
        wire = self.code.program.wire[name]
        bridge = self.code.receives.get(name)
        if bridge is None and not wire.segment:
            return self.read_source(name)
        if name not in self.values:
            assert bridge is not None, f"{name} is read before it is made"
            self.values[name] = self._receive(bridge, wire)
            self.reads_left[name] = self.code.num_reads[name]
        tensor = self.values[name]
        self.reads_left[name] -= 1
        if self.reads_left[name] == 0:
            del self.values[name], self.reads_left[name]
        return tensor

    def backward(
        self, schedule: Schedule, code: BackwardCode, seeds: Mapping[str, Tensor], keep: KeepGradient
    ) -> dict[str, Tensor]:
        """Run this device's backward tasks in order.

        Args:
            schedule: whose backward tasks to run.
            code: this device's part of the backward pass.
            seeds: gradients of program outputs, by wire.
            keep: takes the gradients of parameters at home here.

        Returns:
            Gradients of inputs: this device's contribution.
        """
        sums = {name: OrderedSum(len(own)) for name, own in code.position.items() if own}
        for task in schedule.backward[self.code.device_index]:
            segment = self.code.program.segment[task.segment]
            with located(segment, self.code, "backward"):
                self._timed("B", segment, lambda s: self._backward(s, code, sums, seeds))
        self.tapes.clear()
        found = {}
        for name in code.backward.sources:
            wire = self.code.program.wire[name]
            if wire.origin == "input":
                if name in sums and (total := sums[name].total) is not None:
                    found[name] = total
            elif wire.device == self.code.device_index and (total := self._total(name, code, sums, seeds)) is not None:
                keep(wire, total)
        return found

    def _backward(
        self, segment: Segment, code: BackwardCode, sums: dict[str, OrderedSum], seeds: Mapping[str, Tensor]
    ) -> None:
        work = code.backward.segments[segment.name]
        tape = self.tapes.pop(segment.name)
        outputs = [name for name in work.outputs if name in tape.edges]
        wanted = [tape.leaves[name] for name in work.inputs]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        arriving = {name: self._total(name, code, sums, seeds) for name in work.outputs}
        if outputs:
            gradients = torch.autograd.grad(
                [tape.edges[n] for n in outputs], wanted, [arriving[n] for n in outputs], allow_unused=True
            )
        own = _are_own(gradients, arriving.values())
        del arriving
        for name, leaf, gradient, is_own in zip(work.inputs, wanted, gradients, own, strict=True):
            # The static analysis promised a gradient; a path that autograd finds constant gives zeros.
            term = torch.zeros_like(leaf) if gradient is None else gradient
            if sums[name].add(code.position[name][segment.name], term, is_own) and name in code.sends:
                self._send(code.sends[name], sums.pop(name).whole)

    def _total(
        self, name: str, code: BackwardCode, sums: dict[str, OrderedSum], seeds: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The gradient of a wire made here: the caller's, then each device's by rank."""
        wire = self.code.program.wire[name]
        total, is_own = seeds.get(name), False
        for device in code.backward.gradient_devices.get(name, ()):
            if device == self.code.device_index:
                found = sums.pop(name)
                total, is_own = _plus(total, is_own, found.whole, found.is_own)
            else:
                term = self._receive(code.receives[name][device], wire)
                total, is_own = _plus(total, is_own, term, False)
        return total

    def _send(self, bridge: Bridge, tensor: Tensor) -> None:
        start_s = time.perf_counter()
        self.mailbox.send(bridge, tensor)
        if self.record:
            self._note("send", bridge, bridge.destination, start_s)

    def _receive(self, bridge: Bridge, wire: Wire) -> Tensor:
        start_s = time.perf_counter()
        tensor = self.mailbox.receive(bridge, wire.shape, getattr(torch, wire.dtype))
        if self.record:
            self.began_s = self._note("wait", bridge, bridge.source, start_s)
        return tensor

    def _note(self, kind: str, bridge: Bridge, peer: int, start_s: float) -> float:
        """Record a message that leaves, or that was waited for; returns the time now."""
        end_s = self._now_s()
        reader = self.task if kind == "wait" else None
        microbatch = self.code.program.wire[bridge.wire].microbatch
        own, size_bytes = self.code.device_index, bridge.size_bytes
        self.events.append(Event(own, kind, bridge.wire, start_s, end_s, microbatch, peer, size_bytes, reader))
        return end_s

    def _timed(self, kind: str, segment: Segment, run: Callable[[Segment], None]) -> None:
        """Run a task; its own time starts when the messages that it reads are there."""
        if not self.record:
            run(segment)
            return
        self.task, self.began_s = Task(kind, segment.name), time.perf_counter()
        run(segment)
        end_s = self._now_s()
        self.events.append(Event(self.code.device_index, kind, segment.name, self.began_s, end_s, segment.microbatch))
        self.task = None

    def _now_s(self) -> float:
        """The time once everything given to the device so far is done."""
        if self.code.device.type == "cuda":
            torch.cuda.synchronize(self.code.device)
        return time.perf_counter()
