"""The local executor: one process, a worker thread a device. No server, no launcher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from graphpart.ir.schedule import Task
from graphpart.runtime.device.mailbox import Aborted
from graphpart.runtime.device.step_work import Collector, StepWork
from graphpart.runtime.device.worker import DeviceRun
from graphpart.runtime.executors.fingerprint import Claim
from graphpart.runtime.executors.host_memory import keep_host_memory
from graphpart.runtime.executors.launch import Launch, LaunchTasks, StepRun
from graphpart.runtime.executors.post import LocalMailbox, Post
from graphpart.runtime.executors.turns import Turns
from graphpart.runtime.kernels.random import StepRandom

T = TypeVar("T")


@dataclass
class LocalStep(StepRun):
    """A step of the local executor, with where its workers leave messages."""

    post: Post


class LocalExecutor:
    """Runs every device in this process.

    CPU workers share the cores evenly: each gets ``torch.get_num_threads() / workers`` threads for its operators.

    Args:
        devices: torch device per index.
    """

    distributed = False
    num_compared = 0

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self.devices = devices
        self.own = tuple(range(len(devices)))
        self._generators: dict[int, dict[torch.device, torch.Generator]] = {i: {} for i in self.own}
        self._workers: dict[int, ThreadPoolExecutor] = {}
        self._in_turn = False
        self._handing_out = Lock()  # callers on several threads must not hand out steps in two orders
        keep_host_memory(self, devices)

    def start(
        self,
        launch: Launch,
        read_source: Callable[[int, str], Tensor],
        *,
        grad: bool,
        seed: int,
        dropout_off: bool = False,
        record: bool = False,
    ) -> LocalStep:
        """A new step's state on every device."""
        post = Post(self.devices, launch.program.deadline_s)
        mailboxes = {i: LocalMailbox(post) for i in launch.used}
        runs = {
            i: DeviceRun(
                launch.code[i],
                mailboxes[i],
                lambda name, i=i: read_source(i, name),  # type: ignore[misc]
                StepRandom(seed, self._generators[i], dropout_off),
                grad,
                record,
            )
            for i in launch.used
        }
        return LocalStep(launch, runs, {i: m.counters for i, m in mailboxes.items()}, post)

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Within, devices take turns."""
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False

    def check_same(self, claim: Claim) -> int:
        """One process always agrees with itself."""
        return claim.seed

    def gather(self, part: T) -> list[T]:
        """One process gives all there is."""
        return [part]

    def add_over_devices(self, gradients: Sequence[Tensor]) -> Tensor:
        """One process holds every term already."""
        return functools.reduce(torch.add, gradients)

    def forward(self, step: LocalStep) -> dict[str, Tensor]:
        """Run the forward on all devices; returns output and update wires."""
        schedule = step.launch.forward_schedule

        def work(run: DeviceRun) -> dict[str, Tensor]:
            run.send_sources()
            run.run(_until_aborted(schedule.tasks[run.code.device_index], step.post))
            return run.kept()

        found: dict[str, Tensor] = {}
        for kept in self._on_all(step, work).values():
            found.update(kept)
        return found

    def backward(
        self, step: LocalStep, launched: LaunchTasks, seeds: Mapping[str, Tensor], collector: Collector
    ) -> dict[int, dict[str, Tensor]]:
        """Run the backward on all devices; returns gradients of inputs per device."""
        lines = launched.schedule.backward

        def work(run: DeviceRun) -> dict[str, Tensor]:
            run.begin_backward(launched.code[run.code.device_index], seeds, collector)
            run.run(_until_aborted(lines[run.code.device_index], step.post))
            return run.collect()

        return self._on_all(step, work)

    def train(
        self, step: LocalStep, launched: LaunchTasks, seeds: Mapping[str, Tensor], work: StepWork
    ) -> dict[str, Tensor]:
        """Run a fused step on all devices; returns output and update wires."""
        lines: Sequence[Iterable[Task]] = launched.schedule.tasks
        if self._in_turn:
            lines = Turns(launched.workload, step.post).lines(launched.schedule)

        def on_worker(run: DeviceRun) -> dict[str, Tensor]:
            index = run.code.device_index
            tasks = _until_aborted(lines[index], step.post)
            return run.train(tasks, launched.code[index], seeds, work, launched.workload)

        return {name: tensor for kept in self._on_all(step, on_worker).values() for name, tensor in kept.items()}

    def on_each_device(self, step: LocalStep, work: Callable[[int], None]) -> None:
        """Do something for each device at once, on its worker."""
        self._on_all(step, lambda run: work(run.code.device_index))

    def _on_all(self, step: LocalStep, work: Callable[[DeviceRun], T]) -> dict[int, T]:
        """Do some work for every device at once; a failure wakes the others and reaches the caller."""
        if len(step.runs) == 1:  # nothing to overlap with: the caller's own thread does it
            ((index, run),) = step.runs.items()
            with torch.autocast(self.devices[index].type, enabled=False):
                return {index: work(run)}

        streams = _current_streams(self.devices)

        def guarded(run: DeviceRun) -> T:
            try:
                with _on_streams(streams, self.devices[run.code.device_index]):
                    return work(run)
            except BaseException:
                step.post.abort()
                raise

        with self._handing_out:
            self._start_workers()
            futures: dict[int, Future[T]] = {i: self._workers[i].submit(guarded, run) for i, run in step.runs.items()}
        try:
            wait(futures.values())
        except BaseException:  # an interrupt: nothing may go on behind the caller's back
            step.post.abort()
            wait(futures.values())
            raise
        errors = [e for f in futures.values() if (e := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, Aborted)):
            raise error
        return {i: future.result() for i, future in futures.items()}

    def _start_workers(self) -> None:
        if self._workers:
            return
        num_cpu_workers = sum(d.type == "cpu" for d in self.devices)
        threads = max(1, torch.get_num_threads() // max(1, num_cpu_workers))
        for i, device in enumerate(self.devices):
            self._workers[i] = ThreadPoolExecutor(
                1, f"graphpart-{i}", initializer=_enter_worker, initargs=(device, threads)
            )


def _until_aborted(tasks: Iterable[Task], post: Post) -> Iterator[Task]:
    """Tasks for as long as no worker of the step has failed: an update must not follow a failure elsewhere."""
    for task in tasks:
        if post.aborted:
            raise Aborted
        yield task


def _current_streams(devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
    """The streams of this thread on every GPU among some devices."""
    return [torch.cuda.current_stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]


@contextmanager
def _on_streams(streams: Sequence[torch.cuda.Stream], device: torch.device) -> Iterator[None]:
    """Within, a worker's kernels and copies queue where its caller's do, so that neither has to wait for the other.

    A stream of its own on each GPU: a message to another GPU is put into that one's queue, too.

    Args:
        streams: the caller's.
        device: the worker's own, which stays the current one.
    """
    with ExitStack() as entered:
        for stream in sorted(streams, key=lambda stream: stream.device == device):
            entered.enter_context(torch.cuda.stream(stream))
        yield


def _enter_worker(device: torch.device, num_threads: int) -> None:
    """Threads don't inherit settings: each worker sets its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(num_threads)
