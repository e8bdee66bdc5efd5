"""What one thread traces is no matter of another: it may train, compile and hook meanwhile, and is not traced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import graphpart as gp
from graphpart.errors import UnsupportedOperatorError
from graphpart.trace import trace
from graphpart.trace.patches import replaced

TIMEOUT_S = 60


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def _custom_function() -> None:
    x = torch.arange(3.0, requires_grad=True)
    Square.apply(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 2, 4]


def _tensor_hook() -> None:
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: 5 * grad)
    x.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [5, 5, 5]


def _checkpoint(reentrant: bool = False) -> None:
    x, small = torch.ones(2, 3, requires_grad=True), nn.Linear(3, 3)
    checkpoint(small, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, small.weight.sum(0).expand(2, 3))


def _reentrant_checkpoint() -> None:
    _checkpoint(True)


def _optimizer() -> None:
    torch.manual_seed(0)
    small = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = small(torch.ones(2, 3)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


_COMPILED = torch.compile(lambda x: x * 2 + 1, backend="eager")


def _compiled() -> None:
    x = torch.ones(3, requires_grad=True)
    _COMPILED(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]


def _flags() -> None:
    assert not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _module_hook() -> None:
    seen: list[Any] = []
    small = nn.Linear(3, 3)
    small.register_forward_hook(lambda module, given, result: seen.append(result))
    result = small(torch.ones(2, 3))
    assert len(seen) == 1 and seen[0] is result


def _log() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    log.warning("something of this thread's")
    log.removeHandler(handler)
    assert len(records) == 1


class Meanwhile(nn.Module):
    """A model in whose forward another thread does something; what that raises is raised here."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.act = [act]

    def forward(self, x: Tensor) -> Tensor:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self.act[0]()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        if failed:
            raise failed[0]
        return self.b(torch.relu(self.a(x)))


ACTS = (
    _custom_function,
    _tensor_hook,
    _checkpoint,
    _reentrant_checkpoint,
    _optimizer,
    _compiled,
    _flags,
    _module_hook,
    _log,
)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__.strip("_"))
def test_another_thread_goes_on_while_one_traces(act: Callable[[], None]) -> None:
    _COMPILED(torch.ones(3, requires_grad=True))  # compiling itself waits for the trace
    act()
    model = Meanwhile(act)
    x = torch.randn(3, 4)
    parted = gp.partition(model, 2, strategy={"a": 0, "*": 1})
    torch.testing.assert_close(parted(x), model.b(torch.relu(model.a(x))))


def test_a_hook_of_all_modules_stays_plain_for_other_threads() -> None:
    calls: list[str] = []

    def hook(module: nn.Module, given: Any, result: Any) -> None:
        calls.append(threading.current_thread().name)

    handle = register_module_forward_hook(hook)
    try:
        count: list[int] = []

        def act() -> None:
            before = len(calls)
            nn.Linear(3, 3)(torch.ones(2, 3))
            count.append(len(calls) - before)

        model = Meanwhile(act)
        gp.partition(model, 2, strategy={"a": 0, "*": 1})(torch.randn(3, 4))
    finally:
        handle.remove()
    assert count[0] == 1


def test_a_hook_that_removes_itself_in_the_trace_stays_away() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    calls: list[Any] = []

    def once(module: nn.Module, given: Any, result: Any) -> None:
        calls.append(result)
        handle.remove()

    handle = model[0].register_forward_hook(once)
    gp.partition(model, 2, strategy={"0": 0, "*": 1})(torch.randn(3, 4))
    assert not model[0]._forward_hooks


def test_compiling_in_another_thread_waits_and_succeeds() -> None:
    started, results = threading.Event(), []

    def compile_and_run() -> None:
        started.set()
        try:
            x = torch.ones(3, requires_grad=True)
            torch.compile(lambda x: Square.apply(x) * 3, backend="eager", fullgraph=True)(x).sum().backward()
            results.append(x.grad)
        except BaseException as error:
            results.append(error)

    threads: list[threading.Thread] = []

    def act() -> None:
        threads.append(threading.Thread(target=compile_and_run, daemon=True))
        threads[-1].start()
        started.wait(TIMEOUT_S)

    gp.partition(Meanwhile(act), 2, strategy={"a": 0, "*": 1})(torch.randn(3, 4))
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert results and all(isinstance(found, Tensor) and found.tolist() == [6, 6, 6] for found in results)


def test_what_is_traced_itself_is_still_refused() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(self.a(x))

    with pytest.raises(UnsupportedOperatorError, match="Square"):
        trace(Custom(), (torch.randn(3, 4),))


class Asks(nn.Module):
    """Takes what torch says of compiling for the boolean that it is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.compiler.is_compiling()
        found |= False
        assert found is True and (False or torch.compiler.is_exporting()) == True  # noqa: E712
        assert found & torch.compiler.is_exporting() and [1.0, 2.0][torch.compiler.is_compiling()] == 2.0
        return self.a(x)


def test_a_model_reads_the_flags_as_booleans() -> None:
    gp.plan(Asks(), 2, (torch.randn(3, 4),), strategy="layer")


def test_nothing_of_torch_stays_replaced() -> None:
    before = torch.autograd.Function.__dict__["apply"], torch.Tensor.register_hook
    gp.partition(nn.Linear(4, 4), 2, strategy="layer")(torch.randn(3, 4))
    assert (torch.autograd.Function.__dict__["apply"], torch.Tensor.register_hook) == before
    assert not torch.compiler.is_compiling()


def test_a_replacement_counts_in_its_thread_and_inside_alone() -> None:
    x = torch.tensor([-1.0])
    original = F.relu
    with replaced(F, "relu", lambda original, x: original(x) + 1):
        assert F.relu(x) == 1
        with replaced(F, "relu", lambda original, x: original(x) + 2):
            assert F.relu(x) == 2
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(F.relu(x)))
        thread.start()
        thread.join()
        assert found[0] == 0 and F.relu(x) == 1
    assert F.relu is original


def test_what_others_put_in_its_place_meanwhile_stays() -> None:
    original = F.relu
    try:
        with replaced(F, "relu", lambda original, x: original(x) + 1):
            inner = F.relu
            F.relu = lambda x: inner(x) * 10  # type: ignore[assignment]
            assert F.relu(torch.tensor([-1.0])) == 10
        assert F.relu(torch.tensor([2.0])) == 20
    finally:
        F.relu = original  # type: ignore[assignment]
