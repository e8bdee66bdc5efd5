"""One traced form of the model, ready to be called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphpart.errors import AutogradError
from graphpart.ir.graph import Ref
from graphpart.ir.program import Backward, Collective, Program, Wire
from graphpart.module.autograd_bridge import Pending, attach
from graphpart.module.call_form import CallForm
from graphpart.module.fused_update import NOTHING_TO_TRAIN, Update
from graphpart.module.memory_check import MemoryCheck
from graphpart.planning.plan import Plan
from graphpart.runtime.device.mailbox import Counters
from graphpart.runtime.executors.fingerprint import Fact
from graphpart.runtime.executors.launch import Executor, Launch, LaunchTasks, StepRun
from graphpart.runtime.kernels.memory import laid, settled
from graphpart.runtime.kernels.random import Draw, step_seed
from graphpart.runtime.parameters.edge_guard import EdgeGuard
from graphpart.runtime.parameters.gradients import ParameterGradients
from graphpart.runtime.parameters.layout import cut, paste
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.trace import Traced
from graphpart.trace.dynamo.changes import Store
from graphpart.trace.tree import unflatten


@dataclass
class StepReport:
    """What a step did, without holding on to its values.

    Attributes:
        counters: messages sent, by device index of this process.
        plan: what it followed.
        backward: what ran backward, once it has.
        step: the step, for its timeline; None unless it was recorded.
        staleness: of an asynchronous step, how many backward tasks had how many updates since their forward.
    """

    counters: Mapping[int, Counters]
    plan: Plan
    backward: Backward | None = None
    step: StepRun | None = None
    staleness: Mapping[int, int] | None = None

    @property
    def program(self) -> Program:
        """What ran forward."""
        return self.plan.program

    @property
    def num_messages(self) -> int:
        """Messages sent by this process so far, forward and backward."""
        return sum(c.num_messages for c in self.counters.values())

    @property
    def message_bytes(self) -> int:
        """Bytes sent by this process so far, forward and backward."""
        return sum(c.message_bytes for c in self.counters.values())

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """The collectives in which this process has sent something so far, forward ones first."""
        sent = {tag for counters in self.counters.values() for tag in counters.tags}
        known = self.program.collectives + (self.backward.collectives if self.backward is not None else ())
        return tuple(collective for collective in known if not sent.isdisjoint(collective.tags))


@dataclass
class TracedCall:
    """A traced and lowered form of the model: run it with flattened arguments.

    Attributes:
        traced: graph and trees.
        plan: of such calls.
        launch: its program, ready to run.
        executor: who runs it.
        state: the model's tensors.
        edges: what the plan takes masks to be.
        form: what processes compare before they run such a call.
        stores: attributes that each call sets to constants.
        reads: per constant that is read anew at each call, where it is found; their values follow the arguments.
    """

    traced: Traced
    plan: Plan
    launch: Launch
    executor: Executor[Any]
    state: ModelState
    edges: EdgeGuard
    form: CallForm
    stores: tuple[Store, ...] = ()
    reads: Mapping[str, str] = field(default_factory=dict)
    _constants: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)
    _compared_backwards: set[frozenset[str]] = field(default_factory=set)

    def run(self, leaves: Sequence[Any], *, dropout_off: bool = False, record: bool = False) -> tuple[Any, StepReport]:
        """Run the model.

        Args:
            leaves: flattened ``(args, kwargs)``.
            dropout_off: whether dropout passes everything.
            record: whether to note when each task ran.

        Returns:
            The model's result, and what the step did.
        """
        grad = torch.is_grad_enabled() and bool(self.trainable or self._input_sources(leaves))
        with self._updating():
            step = self._start(leaves, grad, dropout_off, record)
            wires = self._lying_as_traced(self.executor.forward(step))
            self._commit(wires, leaves)
        report = StepReport(step.counters, self.plan, step=step if record else None)
        if grad:
            wires = self._attach(step, report, wires, leaves)
        return self._give(wires, leaves), report

    def train(
        self, leaves: Sequence[Any], update: Update, *, dropout_off: bool = False, record: bool = False
    ) -> tuple[Any, StepReport]:
        """Run a fused step of a graph whose first output is the loss: forward, backward and update.

        Args:
            leaves: flattened ``(args, kwargs)``, and what the loss takes.
            update: what to do with the gradients.
            dropout_off: whether dropout passes everything.
            record: whether to note when each task ran.

        Returns:
            What the graph gives, and what the step did.

        Raises:
            AutogradError: if the loss depends on no parameter, or an input wants a gradient.
        """
        launched = self.fused
        self._check_trainable(leaves, launched.backward.live)
        wire = self.launch.program.wire
        seeds = {name: update.seed(wire[name], self.launch.devices) for name in launched.backward.live}
        with self._updating():
            step = self._start(leaves, True, dropout_off, record, lambda: update.facts(self.form.watch))
            update.begin(self._gradients_of(launched.backward), is_early=launched.workload.update_every is not None)
            wires = self._lying_as_traced(self.executor.train(step, launched, seeds, update))
            update.finish(lambda work: self.executor.on_each_device(step, work))
            self._commit(wires, leaves)
        staleness = step.staleness if launched.workload.update_every is not None else None
        report = StepReport(step.counters, self.plan, launched.backward, step if record else None, staleness)
        return self._give(wires, leaves), report

    def _updating(self) -> AbstractContextManager[object]:
        """Held from the first read of a source to its update: concurrent calls take turns where there are updates."""
        return self.state.turn if self.launch.program.mutations else nullcontext()

    @cached_property
    def fused(self) -> LaunchTasks:
        """A fused step as planned: forward, backward and update in one order."""
        planned = self.plan.training
        return LaunchTasks.of(planned.workload, planned.schedule, self.launch.code)

    def _check_trainable(self, leaves: Sequence[Any], live: Sequence[str]) -> None:
        loss = self.launch.program.outputs[0]
        if not live or loss is None or not self.launch.program.wire[loss].differentiable:
            raise AutogradError(NOTHING_TO_TRAIN)
        if inputs := self._input_sources(leaves):
            raise AutogradError(
                f"the input {inputs[0]!r} requires a gradient, which train_step does not give; detach it, or call the "
                "model and loss.backward()"
            )

    def check_memory(self, leaves: Sequence[Any]) -> None:
        """Refuse arguments that share memory where that would show.

        Args:
            leaves: flattened arguments.

        Raises:
            UnsupportedOperatorError: naming what is changed in place, and what shares its memory.
        """
        self._memory.check(leaves)

    def _start(
        self,
        leaves: Sequence[Any],
        grad: bool,
        dropout_off: bool,
        record: bool,
        update: Callable[[], tuple[Fact, ...]] = tuple,
    ) -> StepRun:
        self.edges.check()
        self.check_memory(leaves)
        own_seed = step_seed() if self._needs_seed else 0
        seed = self.executor.check_same(self.form.claim(leaves, own_seed, dropout_off=dropout_off, update=update))
        at_hand: dict[tuple[str, torch.device], Tensor] = {}
        noise = self._noise(seed)

        def read_source(device_index: int, name: str) -> Tensor:
            wire, device = self.launch.program.wire[name], self.launch.devices[device_index]
            return noise[wire.value].to(device) if wire.value in noise else self._read(wire, device, leaves, at_hand)

        return self.executor.start(
            self.launch, read_source, grad=grad, seed=seed, dropout_off=dropout_off, record=record
        )

    def _give(self, wires: Mapping[str, Tensor], leaves: Sequence[Any]) -> Any:
        """The result in the model's own form, after its onlooking hooks have seen it."""
        result, given = unflatten(self._results(wires, leaves), self.traced.out_spec)
        for store in self.stores:
            store.repeat()
        for onlooker, values in zip(self.traced.onlookers, given, strict=True):
            onlooker(values)
        return result

    @cached_property
    def _memory(self) -> MemoryCheck:
        return MemoryCheck(self.traced, self.state.tensors)

    @cached_property
    def _needs_seed(self) -> bool:
        """Whether workers draw by themselves, as dropout does, or processes have to draw the same noise."""
        shares_noise = self.executor.distributed and bool(self.traced.noise)
        return shares_noise or any(op.random for op in self.traced.graph.operators)

    def _noise(self, seed: int) -> dict[str, Tensor]:
        """What the model draws in this step: from the caller's generator, or in each of several processes by a seed."""
        device, drawn = self.launch.devices[0], self.traced.noise
        if not drawn:
            return {}
        with Draw(seed, {}, False).on_default(device) if self.executor.distributed else nullcontext():
            return {name: noise.draw(device) for name, noise in drawn.items()}

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Trainable parameters, by value name."""
        return tuple(s.value.name for s in self.traced.graph.parameters if s.trainable)

    def _input_sources(self, leaves: Sequence[Any]) -> tuple[str, ...]:
        """Inputs that want a gradient, by value name."""
        index = self.traced.input_index
        return tuple(n for n, i in index.items() if isinstance(leaves[i], Tensor) and leaves[i].requires_grad)

    def _read(
        self, wire: Wire, device: torch.device, leaves: Sequence[Any], at_hand: dict[tuple[str, torch.device], Tensor]
    ) -> Tensor:
        """The tensor of a source wire on a device, cut once a step."""
        key = (wire.name, device)
        if key not in at_hand:
            at_hand[key] = self._cut(wire, device, leaves)
        return at_hand[key]

    def _cut(self, wire: Wire, device: torch.device, leaves: Sequence[Any]) -> Tensor:
        if wire.origin in ("parameter", "buffer"):
            part = self.state.read(wire.value, wire.region)
            is_part = wire.origin == "parameter" and part.shape != self.state.tensors[wire.value].shape
            return settled(part) if is_part else part  # in threads it may be a view of the whole
        if wire.origin == "input":
            tensor = leaves[self.traced.input_index[wire.value]].detach()
            return cut(tensor, wire.region).to(device)
        if wire.value in self.reads:
            return leaves[list(self.reads).index(wire.value) - len(self.reads)].detach().to(device)
        key = (wire.value, device)
        if key not in self._constants:
            self._constants[key] = self.traced.constants[wire.value].detach().to(device)
        return self._constants[key]

    def _lying_as_traced(self, wires: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs as they lie in memory on one device, for what the caller makes of them may depend on it."""
        program, found = self.launch.program, dict(wires)
        for output, name in zip(self.traced.graph.outputs, program.outputs, strict=True):
            if name is not None and program.wire[name].segment:
                found[name] = laid(found[name], self.traced.strides[output.name])
        return found

    def _commit(self, wires: Mapping[str, Tensor], leaves: Sequence[Any]) -> None:
        """Overwrite buffers and mutated inputs: once a step, after all of its forward has succeeded."""
        with torch.no_grad():
            for name, wire in self.launch.program.mutations:
                if wire not in wires:
                    continue
                index = self.traced.input_index.get(name)
                target = leaves[index] if index is not None else self.state.tensors[name]
                target.copy_(wires[wire])

    def _attach(
        self, step: StepRun, report: StepReport, wires: dict[str, Tensor], leaves: Sequence[Any]
    ) -> dict[str, Tensor]:
        program = self.launch.program
        parameters, inputs = self.trainable, self._input_sources(leaves)
        sources = [self.state.tensors[n] for n in parameters]
        sources += [leaves[self.traced.input_index[n]] for n in inputs]
        differentiable = {
            n: wires[n]
            for n in dict.fromkeys(program.outputs)
            if n is not None and program.wire[n].differentiable and program.wire[n].segment
        }
        if not differentiable:
            return wires

        def run_backward(seeds: dict[str, Tensor]) -> list[Tensor | None]:
            if self.executor.distributed and frozenset(seeds) not in self._compared_backwards:
                self.executor.check_same(self.form.backward_claim(seeds))
                self._compared_backwards.add(frozenset(seeds))
            launched = self.launch.backward(frozenset(seeds))
            report.backward = launched.backward
            live = set(launched.backward.sources)
            collected = self._gradients_of(launched.backward)
            found = self.executor.backward(step, launched, seeds, collected)
            gradients = [collected.of(n) for n in parameters]
            devices = [leaves[self.traced.input_index[n]].device for n in inputs]
            terms = [self._input_gradient(n, found, live, d) for n, d in zip(inputs, devices, strict=True)]
            return gradients + terms

        return {**wires, **attach(Pending(run_backward), sources, differentiable)}

    def _gradients_of(self, backward: Backward) -> ParameterGradients:
        """What collects the gradients that a backward pass makes of parameters."""
        live = set(backward.sources)
        parts = {n: [w for w in own if w.name in live] for n, own in self._parameter_wires.items()}
        return ParameterGradients(self.state, {n: own for n, own in parts.items() if own}, self.executor.own)

    @cached_property
    def _parameter_wires(self) -> Mapping[str, tuple[Wire, ...]]:
        """Per parameter, the wires of its parts: disjoint regions, of which those that nothing reads have none."""
        found: dict[str, list[Wire]] = {}
        for wire in self.launch.program.wires:
            if wire.origin == "parameter":
                found.setdefault(wire.value, []).append(wire)
        return {name: tuple(wires) for name, wires in found.items()}

    def _input_gradient(
        self, name: str, found: Mapping[int, Mapping[str, Tensor]], live: set[str], target: torch.device
    ) -> Tensor | None:
        """The gradient of an input: what each device has of it, added in the devices' order."""
        wires = [w for w in self.launch.program.wires if w.origin == "input" and w.value == name and w.name in live]
        if not wires:
            return None
        value = self.traced.graph.values[name]
        nothing = torch.zeros(value.shape, dtype=getattr(torch, value.dtype), device=target).neg_()  # 0 - 0 is not -0

        def whole(wire: Wire, term: Tensor) -> Tensor:
            if term.shape == value.shape:
                return settled(term.to(target))
            spread = nothing.clone()
            paste(spread, wire.region, term.to(target))
            return spread

        totals = []
        for device in sorted(found):
            parts = [whole(wire, found[device][wire.name]) for wire in wires if wire.name in found[device]]
            totals.append(functools.reduce(torch.add, parts) if parts else nothing)
        return self.executor.add_over_devices(totals)

    def _results(self, wires: Mapping[str, Tensor], leaves: Sequence[Any]) -> list[Any]:
        """Flattened results, on the device of the first tensor argument as the plain model's would be.

        An input that is returned is the caller's own object.
        """
        home = next((x.device for x in leaves if isinstance(x, Tensor)), None)
        graph, index = self.traced.graph, self.traced.input_index
        updated = {value: source for source, value in graph.mutations if source in index}
        results: list[Any] = []
        for output, wire in zip(graph.outputs, self.launch.program.outputs, strict=True):
            if not isinstance(output, Ref):
                results.append(self.traced.results[len(results)])
            elif output.name in index or output.name in updated:
                results.append(leaves[index[updated.get(output.name, output.name)]])
            elif output.name in self.state.tensors and output.name in graph.source:
                results.append(self.state.tensors[output.name])
            else:
                assert wire is not None
                results.append(wires[wire] if home is None else wires[wire].to(home))
        for i, view in self.traced.views.items():
            if any(results[i] is leaf for leaf in leaves):
                continue
            results[i] = view.of(leaves[view.base] if view.of_argument else results[view.base])
        return results
