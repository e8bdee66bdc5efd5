"""One device's part of a step. The same code runs in a thread and in a process.

The life of a segment. Autograd runs inside it, from its leaves to its edges; wires tie it to the others::

         a wire it reads     a wire it makes            the gradient of         the gradient of
              |                    ^                    what it reads           what it makes
              | detach             | detach                   ^                       |
              v                    |                          | OrderedSum            | sum over devices
    F        leaf -> operators -> output                B     |                       v
              |                    |                         leaf <- autograd.grad <- edge
              '--- Tape: leaves, --'                                   |
                   edges, late  ------------> used up by B             | late, where W is a task
                                                                       v
                                              W    Unfinished -> late_gradients -> OrderedSum

A wire is made here, comes in a message, or is a source (a parameter, a buffer, an input). A complete sum goes to the
wire's home, in a message if that is elsewhere; there it enters the backward of the segment that made the wire, or, if
the wire is a parameter's, goes to ``Collector.keep`` for the update ``U``. A segment that runs again keeps a ``Rerun``,
what it read, and its ``B`` runs it first to have a ``Tape``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from graphpart.ir.program import Bridge, Segment, Wire
from graphpart.ir.schedule import Task, update_of
from graphpart.ir.timeline import Event
from graphpart.ir.workload import Workload
from graphpart.runtime.device.codegen import Executable
from graphpart.runtime.device.device_code import BackwardCode, DeviceCode
from graphpart.runtime.device.located import located
from graphpart.runtime.device.mailbox import Mailbox
from graphpart.runtime.device.offload import Shelved
from graphpart.runtime.device.ordered_sum import are_own, plus
from graphpart.runtime.device.rerun import Rerun, keeping_nothing
from graphpart.runtime.device.step_work import Collector, Gradients, StepWork
from graphpart.runtime.device.tape import Tape, Unfinished
from graphpart.runtime.device.weight_versions import Versions
from graphpart.runtime.kernels.deferred import Late, late_gradients
from graphpart.runtime.kernels.random import StepRandom


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
        split: whether gradients of weights are tasks of their own, known before the forward.
        events: what was noted.
        task: what runs now, if anything does.
        began_s: when it began to compute, its messages being there.
        values: by wire, what is still to be read here.
        reads_left: by wire, how often.
        tapes: by segment, what its forward keeps for its backward.
        reruns: by segment that runs again, what that takes.
        shelved: by wire, what reruns have put away.
        unfinished: by segment, what its backward keeps for the gradients of its weights.
        gradients: of the backward under way.
        versions: of weights that are updated within the step; None if none are.
    """

    code: DeviceCode
    mailbox: Mailbox
    read_source: Callable[[str], Tensor]
    random: StepRandom
    grad: bool
    record: bool = False
    split: bool = False
    events: list[Event] = field(default_factory=list)
    task: Task | None = None
    began_s: float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)
    reads_left: dict[str, int] = field(default_factory=dict)
    tapes: dict[str, Tape] = field(default_factory=dict)
    reruns: dict[str, Rerun] = field(default_factory=dict)
    shelved: WeakValueDictionary[str, Shelved] = field(default_factory=WeakValueDictionary)
    unfinished: dict[str, Unfinished] = field(default_factory=dict)
    gradients: Gradients | None = None
    versions: Versions | None = None

    def run(self, tasks: Iterable[Task], work: StepWork | None = None) -> None:
        """Run tasks of this device in order.

        Args:
            tasks: what to run.
            work: what tasks ``U`` do with gradients.
        """
        acts = {"F": self._forward, "B": self._backward, "W": self._weights}
        for task in tasks:
            if task.kind == "U":
                assert work is not None
                update = self._update if task == update_of(self.code.device_index) else self._update_early
                self._timed(task, None, partial(update, work))
                continue
            segment = self.code.program.segment[task.segment]
            direction = "forward" if task.kind == "F" else "backward"
            with located(segment, self._executable(segment), self.code, direction):
                self._timed(task, segment.microbatch, partial(acts[task.kind], segment))

    def _update(self, work: StepWork) -> None:
        self._keep_parameters()  # other tasks of this device may still follow
        work.update(self.code.device_index)
        if self.versions is not None:
            self.versions.updated()

    def _update_early(self, work: StepWork) -> None:
        """Update this device's own weights by the gradients that there are."""
        assert self.gradients is not None and self.versions is not None
        found = []
        for name in self.versions.weights:
            gradient, is_own = self.gradients.sums[name].take()
            if gradient is not None:
                found.append((self.code.program.wire[name], self.versions.scaled(name, gradient, is_own)[0]))
        work.update_early(found)
        self.versions.updated()

    def kept(self) -> dict[str, Tensor]:
        """Values that the caller wants, taken away from the device."""
        found = {}
        for name in self.code.kept:
            wire = self.code.program.wire[name]
            found[name] = self.values.pop(name) if wire.segment else self.read_source(name)
        return found

    def send_sources(self) -> None:
        """Send parameters and buffers at home here to the devices that read them: before anything runs."""
        for name, bridges in self.code.sends.items():
            if not self.code.program.wire[name].segment:
                for bridge in bridges:
                    source = self.read_source(name).detach()
                    self._send(bridge, source.clone() if self._is_read_on(bridge) else source)

    def _is_read_on(self, bridge: Bridge) -> bool:
        """Whether a parameter's receiver may still read it when all gradients are in, and an update changes it."""
        if self.gradients is None:
            return False
        work, program = self.gradients.code.backward.segments, self.code.program
        readers = [s for s in program.readers[bridge.wire] if program.segment[s].device == bridge.destination]
        return any(name not in work or bridge.wire not in work[name].inputs for name in readers)

    def _executable(self, segment: Segment) -> Executable:
        return (self.code.split_executables if self.split else self.code.executables)[segment.name]

    def _forward(self, segment: Segment) -> None:
        executable = self._executable(segment)
        if self.versions is not None:
            self.versions.began(segment.name)
        late: list[Late] = []
        again = self.grad and segment.recompute and bool(segment.reach)
        with torch.set_grad_enabled(self.grad), keeping_nothing(again):
            inputs = [self._leaf(name) for name in segment.inputs]
            if again:
                self.reruns[segment.name] = Rerun.of(segment, inputs, self.code.overwritten)
            outputs = executable.run(self.random, executable.keys, late, *inputs)
        if again and self.code.shelf is not None:
            self.reruns[segment.name].put_away(segment, self.code.program.wire, self.code.shelf, self.shelved)
        elif self.grad and segment.reach and not again:
            self.tapes[segment.name] = Tape.of(segment, inputs, outputs, late)
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
            source = self.read_source(name)
            return source if self.versions is None else self.versions.read(name, source)
        if name not in self.values:
            assert bridge is not None, f"{name} is read before it is made"
            self.values[name] = self._receive(bridge, wire)
            self.reads_left[name] = self.code.num_reads[name]
        tensor = self.values[name]
        self.reads_left[name] -= 1
        if self.reads_left[name] == 0:
            del self.values[name], self.reads_left[name]
        return tensor

    def begin_backward(self, code: BackwardCode, seeds: Mapping[str, Tensor], collector: Collector) -> None:
        """Make ready for tasks of a backward pass.

        Args:
            code: this device's part of the backward pass.
            seeds: gradients of live wires.
            collector: takes the gradients of parameters at home here.
        """
        self.gradients = Gradients(code, seeds, collector)

    def train(
        self,
        tasks: Iterable[Task],
        code: BackwardCode,
        seeds: Mapping[str, Tensor],
        work: StepWork,
        workload: Workload,
    ) -> dict[str, Tensor]:
        """Run a fused step on this device.

        Args:
            tasks: what to run.
            code: this device's part of the backward pass.
            seeds: gradients of live wires.
            work: what to do with gradients.
            workload: what the step consists of.

        Returns:
            Values that the caller wants.
        """
        self.split = workload.split
        self.versions = Versions.of(workload, self.code.device_index)
        self.begin_backward(code, seeds, work)
        self.send_sources()
        self.run(tasks, work)
        self.collect()
        return self.kept()

    def collect(self) -> dict[str, Tensor]:
        """Sum up the gradients of sources, once every task that makes a part of them has run.

        Returns:
            Gradients of inputs: this device's contribution. Those of parameters at home here go to the collector.
        """
        self._keep_parameters()
        gradients, self.gradients = self.gradients, None
        assert gradients is not None
        self.tapes.clear()
        self.reruns.clear()
        self.unfinished.clear()
        wires = (self.code.program.wire[name] for name in gradients.code.backward.sources)
        sums = {w.name: gradients.sums[w.name].total for w in wires if w.origin == "input" and w.name in gradients.sums}
        return {name: total for name, total in sums.items() if total is not None}

    def _keep_parameters(self) -> None:
        """Sum up the gradients of parameters at home here, and give them to the collector, once."""
        gradients = self.gradients
        assert gradients is not None
        if gradients.kept:
            return
        gradients.kept = True
        for name in gradients.code.backward.sources:
            wire = self.code.program.wire[name]
            if wire.origin != "input" and wire.device == self.code.device_index:
                total, is_own = self._total(name, gradients)
                if total is not None and self.versions is not None:
                    total, is_own = self.versions.scaled(name, total, is_own)
                if total is not None:
                    gradients.collector.keep(wire, total, is_own)

    def _backward(self, segment: Segment) -> None:
        gradients = self.gradients
        assert gradients is not None
        if self.versions is not None:
            self.versions.came_back(segment.name)
        work = gradients.code.backward.segments[segment.name]
        rerun = self.reruns.pop(segment.name).inputs(segment) if segment.recompute else None  # before gradients arrive
        arriving = {name: self._total(name, gradients)[0] for name in work.outputs}
        tape = self.tapes.pop(segment.name) if rerun is None else self._run_again(segment, rerun)
        outputs = [name for name in work.outputs if name in tape.edges]
        wanted = [tape.leaves[name] for name in work.inputs]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if outputs:
            found = torch.autograd.grad(
                [tape.edges[n] for n in outputs], wanted, [arriving[n] for n in outputs], allow_unused=True
            )
        own = are_own(found, [*arriving.values(), *(late.gradient for late in tape.late)])
        del arriving
        terms = {name: (gradient, is_own) for name, gradient, is_own in zip(work.inputs, found, own, strict=True)}
        if self.split and work.weights:
            begun = {name: terms.pop(name) for name in work.weights}
            leaves = {name: tape.leaves[name] for name in work.weights}
            self.unfinished[segment.name] = Unfinished(leaves, tape.late, begun)
        self._add_all(segment, tape.leaves, terms, gradients, {})

    def _weights(self, segment: Segment) -> None:
        """Make the gradients of a segment's weights, and add what its backward made of them already."""
        assert self.gradients is not None
        work = self.unfinished.pop(segment.name)
        found, direct = late_gradients(work.late, list(work.leaves.values()))
        self._add_all(
            segment, work.leaves, work.terms(found), self.gradients, dict(zip(work.leaves, direct, strict=True))
        )

    def _add_all(
        self,
        segment: Segment,
        leaves: Mapping[str, Tensor],
        terms: Mapping[str, tuple[Tensor | None, bool]],
        gradients: Gradients,
        late: Mapping[str, Sequence[Late]],
    ) -> None:
        """Add a segment's part of several gradients, each with whether it may be changed in place, and what is late."""
        for name, (term, is_own) in terms.items():
            left = late.get(name, ())
            if term is None and not left:
                # The static analysis promised a gradient; a path that autograd finds constant gives zeros.
                term = torch.zeros_like(leaves[name])
            self._add(segment, name, (term, is_own, left), gradients)

    def _run_again(self, segment: Segment, inputs: Sequence[Tensor]) -> Tape:
        """Run a segment's forward a second time, for its backward alone: nothing that it makes leaves it."""
        executable = self._executable(segment)
        late: list[Late] = []
        with torch.enable_grad():
            outputs = executable.run(self.random, executable.keys, late, *inputs)
        return Tape.of(segment, inputs, outputs, late)

    def _add(
        self, segment: Segment, name: str, term: tuple[Tensor | None, bool, Sequence[Late]], gradients: Gradients
    ) -> None:
        """Add a segment's part of a wire's gradient; the sum leaves once it is complete, if its home is elsewhere."""
        code, sums = gradients.code, gradients.sums
        if sums[name].add(code.position[name][segment.name], *term) and name in code.sends:
            self._send(code.sends[name], sums.pop(name).whole)

    def _total(self, name: str, gradients: Gradients) -> tuple[Tensor | None, bool]:
        """The gradient of a wire made here (the caller's, then each device's by rank), and whether it may change."""
        wire = self.code.program.wire[name]
        total: Tensor | None
        total, is_own = gradients.seeds.get(name), False
        for device in gradients.code.backward.gradient_devices.get(name, ()):
            if device == self.code.device_index:
                found = gradients.sums.pop(name)
                if found.total is not None:  # else updates within the step have taken all of it
                    total, is_own = plus(total, is_own, found.whole, found.is_own)
            else:
                term = self._receive(gradients.code.receives[name][device], wire)
                total, is_own = plus(total, is_own, term, False)
        return total, is_own

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

    def _timed(self, task: Task, microbatch: int | None, work: Callable[[], None]) -> None:
        """Run a task; its own time starts when the messages that it reads are there."""
        if not self.record:
            work()
            return
        self.task, self.began_s = task, time.perf_counter()
        work()
        end_s = self._now_s()
        self.events.append(Event(self.code.device_index, task.kind, task.segment, self.began_s, end_s, microbatch))
        self.task = None

    def _now_s(self) -> float:
        """The time once everything given to the device so far is done."""
        if self.code.device.type == "cuda":
            torch.cuda.synchronize(self.code.device)
        return time.perf_counter()
