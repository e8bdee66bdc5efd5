"""Steps that are interrupted, that fail half way, or that several threads ask for at once."""

from __future__ import annotations

import copy
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.runtime.device.worker import DeviceRun


def deep() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 6)).double()


def train_both(plain: nn.Module, parted: nn.Module, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    """One step on each, which ends in the same weights."""
    x = torch.randn(8, 6, dtype=torch.float64)
    parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=ours)
    theirs.zero_grad()
    F.mse_loss(plain(x), x).backward()
    theirs.step()
    for a, b in zip(parted.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_nothing_goes_on_behind_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = deep()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy="layer", num_microbatches=4)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (parted, plain))
    train_both(plain, parted, ours, theirs)
    at_work = threading.Event()
    backward = DeviceRun._backward

    def slow(self: DeviceRun, *args: object) -> None:
        at_work.set()
        time.sleep(0.05)
        backward(self, *args)  # type: ignore[arg-type]

    def interrupt() -> None:
        at_work.wait()
        time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = [p.detach().clone() for p in parted.parameters()]
    x = torch.randn(8, 6, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRun, "_backward", slow)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=ours)
        finally:
            signal.signal(signal.SIGINT, handler)
        time.sleep(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, parted.parameters(), strict=True))
    train_both(plain, parted, ours, theirs)


@pytest.mark.parametrize("device", [0, 1])
def test_a_step_that_fails_in_its_backward_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch, device: int) -> None:
    parted = gp.partition(deep(), 2, strategy="layer", num_microbatches=2)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    x = torch.randn(8, 6, dtype=torch.float64)
    parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=optimizer)
    backward = DeviceRun._backward

    def failing(self: DeviceRun, *args: object) -> None:
        if self.code.device_index == device:
            raise RuntimeError("no more")
        backward(self, *args)  # type: ignore[arg-type]

    before = copy.deepcopy(parted.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(DeviceRun, "_backward", failing)
        with pytest.raises(gp.GraphpartError, match=f"failed on device {device} .*no more"):
            parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=optimizer)
    assert all(p.grad is None for p in parted.parameters())
    first = "0." if device == 0 else ""  # the first device goes back last: the others may have stepped theirs by then
    for name, value in parted.state_dict().items():
        assert torch.equal(value, before[name]) or not name.startswith(first)


def test_threads_may_share_a_model() -> None:
    torch.manual_seed(0)
    model = deep()
    parted = gp.partition(model, 3, strategy="layer", num_microbatches=2, deadline_s=60).eval()
    inputs = [torch.randn(4 + i % 2, 6, dtype=torch.float64) for i in range(4)]  # two shapes: two traces
    expected = [copy.deepcopy(model)(x).detach() for x in inputs]
    faults: list[BaseException] = []

    def ask(x: Tensor, y: Tensor) -> None:
        try:
            for _ in range(20):
                with torch.no_grad():
                    assert torch.allclose(parted(x), y, rtol=1e-12)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
