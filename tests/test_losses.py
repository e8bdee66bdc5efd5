"""A fused step follows what its loss function reads, and refuses what a trace would lose of it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import TraceError
from graphpart.module.losses import default_loss, projection
from graphpart.trace.loss import own_loss

pytestmark = pytest.mark.sampled(3)

scale = 1.0
shift = torch.zeros(3)


def scaled(loss: Tensor) -> Tensor:
    return scale * loss


class Objective:
    """Weights of terms that training changes as it goes on."""

    factor = 1.0

    def __init__(self) -> None:
        self.options = types.SimpleNamespace(power=1.0, by_name={"bias": 0.0})
        self.terms: list[nn.Module] = [nn.MSELoss()]
        self.num_steps = 0
        self.last = torch.zeros(3)

    @property
    def base(self) -> float:
        return self.options.by_name["bias"]

    def weigh(self, loss: Tensor) -> Tensor:
        return self.factor * loss**self.options.power

    def loss(self, out: Tensor, target: Tensor) -> Tensor:
        return self.weigh(torch.stack([term(out, target) for term in self.terms]).sum()) + self.base

    def __call__(self, out: Tensor, target: Tensor) -> Tensor:
        return self.loss(out, target)


def set_scale(value: float) -> None:
    global scale
    scale = value


CHANGES: dict[str, Callable[[Objective], None]] = {
    "of the object": lambda it: setattr(it, "factor", 3.0),
    "of an object it has": lambda it: setattr(it.options, "power", 2.0),
    "in a dictionary, behind a property": lambda it: it.options.by_name.update(bias=1.0),
    "of a module in a list": lambda it: setattr(it.terms[0], "reduction", "sum"),
    "one more in the list": lambda it: it.terms.append(nn.L1Loss()),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["method", "callable", "partial", "closure"])
@pytest.mark.parametrize("change", CHANGES)
def test_numbers_that_a_loss_reads_may_change_between_steps(change: str, kind: str) -> None:
    objective = Objective()
    loss_fn: Any = {
        "method": objective.loss,
        "callable": objective,
        "partial": functools.partial(lambda out, target, by: by(out, target), by=objective),
        "closure": lambda out, target: objective.loss(out, target),
    }[kind]
    torch.manual_seed(0)
    parted, x = gp.partition(nn.Linear(3, 3), 1), torch.randn(4, 3)
    for num_traces in (1, 1, 2):
        if num_traces == 2:
            CHANGES[change](objective)
        expected = loss_fn(parted(x), x).detach()
        before = parted._traces.num_traces
        assert torch.allclose(parted.train_step(x, target=x, loss_fn=loss_fn).loss, expected)
        assert parted._traces.num_traces - before <= 1
    assert parted._traces.num_traces == 3  # one of the plain call


def test_a_weight_that_anneals_counts_at_each_step() -> None:
    objective = Objective()
    torch.manual_seed(0)
    parted, x = gp.partition(nn.Linear(3, 3), 1), torch.randn(4, 3)
    for factor in (1.0, 0.5):
        objective.factor = factor
        expected = objective.loss(parted(x), x).detach()
        assert torch.allclose(parted.train_step(x, target=x, loss_fn=objective.loss).loss, expected)


def test_what_a_loss_does_not_read_makes_no_new_trace() -> None:
    objective, x = Objective(), torch.randn(4, 3)
    parted = gp.partition(nn.Linear(3, 3), 1)
    for _ in range(2):
        objective.num_steps += 1
        parted.train_step(x, target=x, loss_fn=objective.loss)
    assert parted._traces.num_traces == 1


def test_functions_that_a_loss_calls_are_followed() -> None:
    parted, x = gp.partition(nn.Linear(3, 3), 1), torch.randn(4, 3)
    found = []
    for value in (1.0, 2.0):
        set_scale(value)
        found.append(
            parted.train_step(x, target=x, loss_fn=lambda out, y: sum(scaled(F.mse_loss(out, y)) for _ in "a"))
        )
    assert torch.allclose(2 * found[0].loss, found[1].loss)
    set_scale(1.0)


def test_a_loss_may_read_the_model_it_stands_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    x = torch.randn(5, 3, dtype=torch.float64)
    for reader in (model, parted):

        def decay(out: Tensor, y: Tensor, reader: nn.Module = reader) -> Tensor:
            return F.mse_loss(out, y) + 0.1 * sum(p.square().sum() for p in reader.parameters())

        parted.zero_grad()
        parted.train_step(x, target=x, loss_fn=decay)
        found = [p.grad for p in parted.parameters()]
        expected = torch.autograd.grad(decay(parted(x), x), list(parted.parameters()))
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_a_teacher_is_followed(trains: bool) -> None:
    torch.manual_seed(0)
    parted, x = gp.partition(nn.Linear(3, 3), 2), torch.randn(4, 3)
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Dropout(1.0), nn.Linear(3, 3)).requires_grad_(trains)

    def distil(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, teacher(y))

    for mode in (False, True):
        teacher.train(mode)
        expected = distil(parted(x), x)
        wanted = torch.autograd.grad(expected, list(teacher.parameters()), allow_unused=True) if trains else ()
        teacher.zero_grad()
        found = parted.train_step(x, target=x, loss_fn=distil).loss
        assert torch.allclose(found, expected.detach())
        for parameter, gradient in zip(teacher.parameters(), wanted, strict=trains):
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.allclose(parameter.grad, gradient)
        with torch.no_grad():
            teacher[2].bias.add_(1.0)


class ByTensor(nn.Module):
    """Keeps a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.ones(3)

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(out * self.weight, target)


@pytest.mark.parametrize("place", ["closure", "attribute", "module"])
def test_tensors_that_functions_further_in_read_are_read_at_each_step(place: str) -> None:
    torch.manual_seed(0)
    parted, x = gp.partition(nn.Linear(3, 3), 1), torch.randn(4, 3)
    objective, by_tensor, local = Objective(), ByTensor(), torch.ones(3)
    loss_fn: Any = {
        "closure": lambda out, y: (lambda: F.mse_loss(out, y + local))(),
        "attribute": lambda out, y: F.mse_loss(out, y + objective.last),
        "module": by_tensor,
    }[place]
    for _ in range(2):
        found = parted.train_step(x, target=x, loss_fn=loss_fn).loss
        assert torch.allclose(found, loss_fn(parted(x), x).detach())
        for tensor in (local, by_tensor.weight, objective.last):
            tensor += 1.0  # in place
    objective.last, by_tensor.weight = torch.zeros(3), torch.zeros(3)
    found = parted.train_step(x, target=x, loss_fn=loss_fn).loss
    assert torch.allclose(found, loss_fn(parted(x), x).detach())


@pytest.mark.filterwarnings("ignore:a part of")
def test_a_loss_that_cannot_be_traced_runs_as_it_is() -> None:
    torch.manual_seed(0)
    parted, x = gp.partition(nn.Linear(3, 4), 1), torch.randn(6, 2, 3)
    target = {"words": torch.ones(2, 2, dtype=torch.long), "lengths": (6, 6), "words_in": (2, 2)}

    def ctc(out: Tensor, y: dict[str, Any]) -> Tensor:
        return F.ctc_loss(out.log_softmax(-1), y["words"], y["lengths"], y["words_in"])

    expected = ctc(parted(x), target)
    expected.backward()
    wanted = {name: gradient.clone() for name, gradient in parted.grad_dict().items()}
    parted.zero_grad()
    assert torch.allclose(parted.train_step(x, target=target, loss_fn=ctc).loss, expected.detach())
    assert all(torch.allclose(gradient, wanted[name]) for name, gradient in parted.grad_dict().items())
    with pytest.raises(TraceError, match=r"^the loss has to be one floating-point number"):
        parted.train_step(x, loss_fn=lambda out: None)


def test_the_warning_of_many_traces_names_the_loss() -> None:
    parted, x = gp.partition(nn.Linear(3, 3), 1), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="differ in what the loss function reads"):
        for step in range(9):
            parted.train_step(x, target=x, loss_fn=lambda out, y, by=step: by * F.mse_loss(out, y))


@dataclass
class Output:
    logits: Tensor
    loss: Tensor


class Ends(nn.Module):
    """A layer, whose result is given in any form."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.end = nn.Linear(3, 4), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.layer(x))


OWN: dict[str, Callable[[Tensor], Any]] = {
    "a scalar": lambda y: y.square().mean(),
    "one element": lambda y: y.square().mean().reshape(1, 1),
    "first of a tuple": lambda y: (y.square().mean(), y),
    "entry": lambda y: {"logits": y, "loss": y.square().mean()},
    "attribute": lambda y: Output(y, y.square().mean()),
}
NONE: dict[str, Callable[[Tensor], Any]] = {
    "many numbers": lambda y: y,
    "second of a tuple": lambda y: (y, y.square().mean()),
    "a loss per sample": lambda y: {"loss": y.square().mean(1), "logits": y},
    "labels first": lambda y: (y.argmax(), y),
    "nothing": lambda y: (),
}


@pytest.mark.parametrize("form", OWN)
def test_the_models_own_loss_is_the_same_to_all(form: str) -> None:
    model, x = Ends(OWN[form]), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = model.layer(x).square().mean().detach()
    for loss_of in (own_loss, default_loss, projection):
        assert torch.equal(loss_of(model(x)).detach().reshape(()), expected)
    parted = gp.partition(model, 2, strategy="batch")
    torch.testing.assert_close(parted.train_step(x).loss, expected)
    assert parted.verify(x).loss == pytest.approx(float(expected))


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_loss_is_none_to_all(form: str) -> None:
    model, x = Ends(NONE[form]), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert own_loss(model(x)) is None
    with pytest.raises(TraceError, match="without a loss of one number"):
        gp.partition(model, 2, strategy="batch").train_step(x)
