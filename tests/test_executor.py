"""The executors: deadlines, errors in the backward, leaks, records."""

import copy
import gc
import threading
import time

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.errors import DeadlineError, DeviceOutOfMemoryError, ExecutionError
from graphpart.runtime.device.worker import DeviceRun


def chain(length: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(length)))


def test_late_message_names_value_bytes_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    parted = gp.partition(chain(2), 2, strategy={"0": 0, "1": 1}, deadline_s=0.2)
    parted(torch.randn(2, 4))
    forward = DeviceRun._forward

    def slow(self: DeviceRun, segment) -> None:  # type: ignore[no-untyped-def]
        if self.code.device_index == 0:
            time.sleep(1.0)
        forward(self, segment)

    monkeypatch.setattr(DeviceRun, "_forward", slow)
    with pytest.raises(DeadlineError, match=r"device 1 waited 0\.2 s for 'linear' \(32 bytes\) from device 0"):
        parted(torch.randn(2, 4))
    monkeypatch.undo()
    assert parted(torch.randn(2, 4)).shape == (2, 4)


class BadBackward(nn.Module):
    """Its forward works; its backward does not, since a saved value is overwritten in place meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_error_in_the_backward_names_segment_and_device() -> None:
    parted = gp.partition(BadBackward(), 2, strategy={"first": 0, "second": 1})
    out = parted(torch.randn(2, 4))
    with torch.no_grad():
        parted.module.second.weight.mul_(2)  # as an optimizer step between forward and backward would
    with pytest.raises(ExecutionError, match=r"backward of segment d1\..* failed on device 1 .*modified by an inplace"):
        out.sum().backward()
    out = parted(torch.randn(2, 4))
    out.sum().backward()
    assert parted.module.first.weight.grad is not None


@pytest.mark.slow
def test_a_thousand_steps_leak_neither_threads_nor_tensors() -> None:
    parted = gp.partition(chain(), 2, strategy={"0": 0, "1": 1, "2": 0}, num_microbatches=2)
    optimizer = torch.optim.SGD(parted.parameters(), lr=1e-3)
    x = torch.randn(4, 4)

    def steps(count: int) -> tuple[int, int]:
        for i in range(count):
            optimizer.zero_grad()
            out = parted(x)
            if i % 10:  # every tenth forward is abandoned
                out.sum().backward()
                optimizer.step()
        del out
        gc.collect()
        return threading.active_count(), sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    threads_before, tensors_before = steps(20)
    threads, tensors = steps(1000)
    assert threads <= threads_before  # workers of an earlier test may have ended meanwhile
    assert tensors <= tensors_before  # what an earlier test held may be freed meanwhile


def test_workers_end_with_the_module() -> None:
    def workers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("graphpart")}

    before = workers()
    parted = gp.partition(chain(2), 2, strategy={"0": 0, "1": 1})
    parted(torch.randn(2, 4))
    own = workers() - before
    assert len(own) == 2
    del parted
    gc.collect()
    for _ in range(50):
        if not own & workers():
            break
        time.sleep(0.05)
    assert not own & workers()


def test_measured_timeline_has_every_task_once() -> None:
    parted = gp.partition(chain(2), 2, strategy={"0": 0, "1": 1}, num_microbatches=2)
    with pytest.raises(gp.GraphpartError, match="record = True"):
        parted.timeline()
    parted.record = True
    parted(torch.randn(4, 4)).sum().backward()
    timeline = parted.timeline()
    program, backward = parted.plan.program, parted.plan.backward
    assert sorted(e.name for e in timeline.events if e.kind == "F") == sorted(s.name for s in program.segments)
    assert sorted(e.name for e in timeline.events if e.kind == "B") == sorted(backward.segments)
    assert timeline.num_messages == program.num_messages + backward.num_messages
    assert timeline.message_bytes == program.message_bytes + backward.message_bytes
    assert 0 < timeline.makespan_s < 10


def test_caller_settings_are_left_alone() -> None:
    """Threads, grad mode and the number of random draws are the caller's as before."""
    parted = gp.partition(chain(2), 2, strategy={"0": 0, "1": 1})
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    parted(torch.randn(2, 4, generator=torch.Generator()))
    assert torch.equal(torch.rand(2), expected)  # a model without random operators draws nothing
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_dropout_is_governed_by_manual_seed_and_differs_between_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 64))
    parted = gp.partition(copy.deepcopy(model), 2, strategy={"0": 0, "*": 1}, num_microbatches=2)
    other = gp.partition(copy.deepcopy(model), 2, strategy={"0": 0, "1": 0, "2": 1}, num_microbatches=2)
    x = torch.randn(4, 4)
    torch.manual_seed(1)
    first, second = parted(x), parted(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(parted(x), first)
    torch.manual_seed(1)
    assert torch.equal(other(x), first)  # the mask depends on the operator and the region, not on the device


class Greedy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).repeat(1, 2**50)


def test_running_out_of_memory_tells_forecast_measurement_and_reserve() -> None:
    parted = gp.partition(Greedy(), 2, strategy={"a": 0, "*": 1})
    where, what = r"aten\.repeat.*test_executor\.py", r"ran out of memory on device 1 \(cpu:1\): forecast .*"
    with pytest.raises(DeviceOutOfMemoryError, match=where + ".*" + what + r"memory_reserve=0\.\d\d"):
        parted(torch.randn(2, 4))
