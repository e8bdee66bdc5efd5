"""``parted.verify``: its own loss sees every model, and buffers are compared however a model changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import VerificationError
from graphpart.module.verify import relative_difference
from graphpart.runtime.device.ordered_sum import OrderedSum

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class End(nn.Module):
    """Two layers and what is done with their result."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(x))


ENDS = {
    "unit length": lambda y: F.normalize(y, dim=-1),
    "norm": lambda y: F.layer_norm(y, (4,)),
    "softmax": lambda y: y.softmax(-1),
    "phases": lambda y: torch.polar(torch.ones_like(y), y),
    "signs": lambda y: F.softsign(1e4 * y),
    "several": lambda y: {"a": y.sum(-1), "b": (F.normalize(y, dim=0), y.long())},
}


@pytest.mark.parametrize("end", ENDS)
def test_its_own_loss_depends_on_the_parameters_of_every_model(end: str) -> None:
    parted = gp.partition(End(ENDS[end]), 2, strategy={"body.0": 0, "*": 1}, num_microbatches=2)
    parted.verify(X).check(1e-5)


@pytest.mark.parametrize("end", ENDS)
def test_it_finds_a_gradient_that_is_wrong(end: str) -> None:
    parted = gp.partition(End(ENDS[end]), 2, strategy={"body.0": 0, "*": 1}, num_microbatches=2)
    add = OrderedSum.add
    wrong = mock.patch.object(
        OrderedSum, "add", lambda self, place, term, own, late=(): add(self, place, 1.01 * term, False)
    )
    with wrong, pytest.raises(VerificationError, match="gradient of body"):
        parted.verify(X)


def test_imaginary_parts_are_compared() -> None:
    a = torch.tensor([1 + 1j, 2 - 1j])
    assert relative_difference(a, a) == 0 and relative_difference(a, a.conj()) > 0.5


class Counting(nn.Module):
    def __init__(self, assigns: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.assigns = nn.Linear(4, 4), assigns
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mean = 0.1 * y.detach().mean(0)
        if self.assigns:
            self.seen, self.count = 0.9 * self.seen + mean, self.count + 1
        else:
            self.seen.mul_(0.9).add_(mean)
            self.count += 1
        return y * self.seen


@pytest.mark.parametrize("assigns", [True, False])
def test_buffers_may_be_assigned_or_changed(assigns: bool) -> None:
    model = Counting(assigns)
    parted = gp.partition(model, 2, strategy={"*": 1})
    for count in (1, 2):
        report = parted.verify(X)
        report.check(1e-6)
        assert {"buffer seen", "buffer count"} <= set(report.differences)
        parted(X)
        assert parted.count == count  # by the call alone: verify leaves buffers as they were


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (3, "loss_fn=3 cannot be called"),
        (lambda y: y, r"loss_fn gave a tensor of \[6, 4\]; it has to give one number"),
        (lambda y: None, "loss_fn gave None"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        gp.partition(End(ENDS["norm"]), 2, strategy={"*": 1}).verify(X, loss_fn=loss_fn)


class OnlyRounding(nn.Module):
    """All gradients that are wanted are zero but for rounding: of a bias before BatchNorm, and of a bias of keys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.qkv = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 16)
        self.key_bias = nn.Parameter(torch.randn(8))
        for parameter in self.parameters():
            parameter.requires_grad_(parameter is self.a.bias or parameter is self.key_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qkv(torch.relu(self.norm(self.a(x)))).chunk(2, -1)
        return torch.softmax(q @ (k + self.key_bias).T, -1) @ k


@pytest.mark.parametrize("strategy", ["batch", "feature"])
def test_gradients_that_are_zero_but_for_rounding_are_no_failure(strategy: str) -> None:
    gp.partition(OnlyRounding(), 2, strategy=strategy).verify(torch.randn(64, 8))


@pytest.mark.parametrize(
    ("model", "size"),
    [(OnlyRounding(), 1.0), (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), 1e-3)],
    ids=["zero", "tanh"],
)
def test_an_error_is_found_beside_what_rounding_does(
    model: nn.Module, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphpart.module import verify as module

    true_gradients, calls = module._gradients, []

    def wrong(loss: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        calls.append(1)
        found = true_gradients(loss, parameters)
        if len(calls) != 2:  # the second call is the partitioned model's
            return found
        return tuple(None if g is None else g + size * g.abs().max().clamp(min=1e-3) for g in found)

    monkeypatch.setattr(module, "_gradients", wrong)
    with pytest.raises(VerificationError, match="gradient of"):
        gp.partition(model, 2, strategy="batch").verify(torch.randn(64, 8))


class Longer(nn.Module):
    """Gives one result more, or one fewer, at each call."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.layer, self.step, self.number = nn.Linear(3, 3), step, 4

    def forward(self, x: Tensor) -> list[Tensor]:
        self.number += self.step
        return [self.layer(x) + i for i in range(self.number)]


@pytest.mark.parametrize("step", [1, -1])
def test_results_of_another_number_are_a_difference(step: int) -> None:
    parted = gp.partition(Longer(step), 2, strategy="layer")
    with pytest.raises(VerificationError, match="is there on one side alone"):
        parted.verify(torch.randn(2, 3))
