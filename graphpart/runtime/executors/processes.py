"""The distributed executor: one process a device, messages by ``torch.distributed``."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from graphpart.errors import DeadlineError, GraphpartError
from graphpart.ir.program import Bridge, Wire
from graphpart.runtime.device.mailbox import Counters
from graphpart.runtime.device.step_work import Collector, StepWork
from graphpart.runtime.device.worker import DeviceRun
from graphpart.runtime.executors.fingerprint import Claim
from graphpart.runtime.executors.host_memory import keep_host_memory
from graphpart.runtime.executors.launch import Launch, LaunchTasks, StepRun
from graphpart.runtime.executors.peer_faults import Fault, faults_named, known_fault, publish_fault
from graphpart.runtime.executors.process_group import group_for_messages, wire_device
from graphpart.runtime.executors.rank_compare import compare_ranks
from graphpart.runtime.kernels.memory import as_bytes, settled
from graphpart.runtime.kernels.random import StepRandom

T = TypeVar("T")


class ProcessMailbox:
    """Point-to-point messages between processes, matched by the program's tags. Those of a GPU go by host memory.

    Sends never wait (two blocking sends of large messages would wait for each other); what is being sent is held
    until :meth:`finish`.
    """

    def __init__(self, device: torch.device, deadline_s: float, group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank()
        self.device = device
        self.deadline_s = deadline_s
        self.group = group
        self.counters = Counters()
        self._sending: list[tuple[Bridge, Any, Tensor]] = []

    def send(self, bridge: Bridge, tensor: Tensor) -> None:
        """Start a send."""
        tensor = settled(tensor)
        self.counters.count(bridge, tensor)
        if tensor.numel():
            data = as_bytes(tensor.cpu())
            with self._faults_named(bridge, "to"):
                work = dist.isend(data, bridge.destination, group=self.group, tag=bridge.tag)
            self._sending.append((bridge, work, data))

    def receive(self, bridge: Bridge, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Wait for a message, at most until the deadline."""
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            with self._faults_named(bridge, "from"):
                work = dist.irecv(as_bytes(tensor), bridge.source, group=self.group, tag=bridge.tag)
                self._wait(work)
        return tensor.to(self.device)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for bridge, work, _ in self._sending:
            with self._faults_named(bridge, "to"):
                self._wait(work)
        self._sending.clear()

    def _wait(self, work: Any) -> None:
        work.wait(datetime.timedelta(seconds=self.deadline_s))

    def _faults_named(self, bridge: Bridge, way: str) -> AbstractContextManager[None]:
        other = bridge.source if way == "from" else bridge.destination
        what = f"{bridge.wire!r} ({bridge.size_bytes} bytes) {way} device {other}"
        return faults_named(f"rank {self.rank} waited for {what}", self.deadline_s)


class DistributedExecutor:
    """Runs this process's device; every process calls the model with the same arguments.

    Outputs, and gradients of inputs, are given to every process, so that each can go on as one device would.

    Args:
        devices: torch device per rank.
    """

    distributed = True

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self.devices = devices
        self.rank = dist.get_rank()
        self.own: tuple[int, ...] = (self.rank,)
        self.num_compared = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        self._group_for_messages = group_for_messages()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # collectives work on the current one
        keep_host_memory(self, [self._device])

    @property
    def _device(self) -> torch.device:
        return self.devices[self.rank]

    @property
    def _wire(self) -> torch.device:
        """What collectives take their tensors from."""
        assert dist.group.WORLD is not None
        return wire_device(dist.group.WORLD)

    def start(
        self,
        launch: Launch,
        read_source: Callable[[int, str], Tensor],
        *,
        grad: bool,
        seed: int,
        dropout_off: bool = False,
        record: bool = False,
    ) -> StepRun:
        """A new step's state on this process's device."""
        mailbox = ProcessMailbox(self._device, launch.program.deadline_s, self._group_for_messages())
        run = DeviceRun(
            launch.code[self.rank],
            mailbox,
            lambda name: read_source(self.rank, name),
            StepRandom(seed, self._generators, dropout_off),
            grad,
            record,
        )
        return StepRun(launch, {self.rank: run}, {self.rank: mailbox.counters})

    def one_at_a_time(self) -> NoReturn:
        """Devices of several processes take no turns.

        Raises:
            GraphpartError: always.
        """
        raise GraphpartError(
            "calibrate(alone=True) lets the devices of one process take turns; under torchrun each device has one of "
            "its own, so leave it out"
        )

    def check_same(self, claim: Claim) -> int:
        """Every process has to be about to do the same, see :func:`compare_ranks`; returns the first one's seed."""
        self.num_compared += 1
        return compare_ranks(claim, self._group_for_messages())

    def gather(self, part: T) -> list[T]:
        """What each process gives, by rank."""
        found: list[Any] = [None] * len(self.devices)
        dist.all_gather_object(found, part)
        return found

    def add_over_devices(self, gradients: Sequence[Tensor]) -> Tensor:
        """A gradient summed over processes by rank; this one's term is the only one given."""
        (given,) = gradients
        own = settled(given.to(self._wire))
        terms = [torch.empty_like(own) for _ in self.devices]
        dist.all_gather(terms, own)
        return functools.reduce(torch.add, terms).to(given.device)

    def forward(self, step: StepRun) -> dict[str, Tensor]:
        """Run this device's forward; then every process gets every output."""
        run = step.runs[self.rank]
        with self._work(run):
            run.send_sources()
            run.run(step.launch.forward_schedule.tasks[self.rank])
        return self._share_outputs(step, run.kept())

    def train(
        self, step: StepRun, launched: LaunchTasks, seeds: Mapping[str, Tensor], work: StepWork
    ) -> dict[str, Tensor]:
        """Run this device's part of a fused step; then every process gets every output."""
        run = step.runs[self.rank]
        tasks, code = launched.schedule.tasks[self.rank], launched.code[self.rank]
        with self._work(run):
            found = run.train(tasks, code, seeds, work, launched.workload)
        return self._share_outputs(step, found)

    def on_each_device(self, step: StepRun, work: Callable[[int], None]) -> None:
        """Do something for this process's device."""
        work(self.rank)

    def _share_outputs(self, step: StepRun, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, and values that inputs are overwritten with, from the process that has them to all."""
        program = step.launch.program
        inputs = {s.value.name for s in step.launch.graph.inputs}
        shared = dict.fromkeys(n for n in program.outputs if n is not None)
        shared.update(dict.fromkeys(wire for name, wire in program.mutations if name in inputs))
        for name in shared:
            if program.wire[name].segment:
                found[name] = self._share(program.wire[name], found.get(name))
        return found

    def _share(self, wire: Wire, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            shared = torch.empty(wire.shape, dtype=getattr(torch, wire.dtype), device=self._wire)
        else:
            shared = tensor.to(self._wire)
        shared = settled(shared)
        if shared.numel():
            with faults_named(f"rank {self.rank} waited for the output {wire.name!r} of rank {wire.device}", 0):
                dist.broadcast(as_bytes(shared), src=wire.device)
        return shared.to(self._device)

    def backward(
        self, step: StepRun, launched: LaunchTasks, seeds: Mapping[str, Tensor], collector: Collector
    ) -> dict[int, dict[str, Tensor]]:
        """Run this device's backward; returns gradients of inputs, this device's contribution."""
        run = step.runs[self.rank]
        with self._work(run):
            run.begin_backward(launched.code[self.rank], seeds, collector)
            run.run(launched.schedule.backward[self.rank])
            found = run.collect()
        return {self.rank: found}

    @contextlib.contextmanager
    def _work(self, run: DeviceRun) -> Iterator[None]:
        """Around a device's work: no autocast, every message out at the end, a fault told to all processes."""
        mailbox = run.mailbox
        assert isinstance(mailbox, ProcessMailbox)
        try:
            with torch.autocast(self._device.type, enabled=False):
                yield
            mailbox.finish()
        except Exception as reason:
            if not known_fault():
                fault = Fault(f"rank {self.rank} failed: {reason}", isinstance(reason, DeadlineError))
                publish_fault(fault, len(self.devices) - 1, self._group_for_messages())
            raise
