"""``torch.autograd.grad`` in a forward: written out in the graph, and differentiated again if the loss asks for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import graphpart as gp
from graphpart.errors import GraphpartError

Body = Callable[["Field", Tensor], Tensor]


class Field(nn.Module):
    """A network of points, and something that needs its derivatives."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
        self.smooth = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4), nn.GELU())
        self.beside, self.body = nn.Parameter(torch.ones(2)), body
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def residual(field: Field, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = field.net(x)
    (slope,) = grad(u.sum(), x, create_graph=True)
    return (slope**2).mean() + (u * slope.sum(1, keepdim=True)).mean()


def second_order(field: Field, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = field.smooth(x).square().sum(1)
    (slope,) = grad(u, x, torch.ones_like(u), create_graph=True)
    (bend,) = grad(slope[:, 0].sum(), x, create_graph=True)
    return (bend[:, 0] - u).square().mean()


def forces(field: Field, x: Tensor) -> Tensor:
    """No graph is kept, so that the loss knows nothing of how the force comes about."""
    x = x.detach().requires_grad_()
    (force,) = torch.autograd.grad(field.net(x).sum(), x, retain_graph=True)
    assert not force.requires_grad
    return field.net(x + force).square().mean()


def of_a_value_between(field: Field, x: Tensor) -> Tensor:
    h = field.net[0](x)
    one, two = torch.cat([h, h.sin()], 1).split([6, 10], 1)
    best, _ = two.max(1)
    wanted, seeds = [h, field.net[0].weight], [torch.tensor(2.0, dtype=h.dtype), best * 0 + 3]
    slope, of_weight = grad([one.sum(), best], wanted, seeds, create_graph=True)
    return slope.square().mean() + of_weight.cos().mean() + one.mean()


def unused(field: Field, x: Tensor) -> Tensor:
    u = field.net(x)
    found = grad(u.sum(), [field.net[0].bias, field.beside], create_graph=True, allow_unused=True)
    assert found[1] is None
    (none,) = grad(u.sum(), [field.beside], create_graph=True, materialize_grads=True)
    return found[0].square().sum() + none.sum() + u.mean()


def stopped(field: Field, x: Tensor) -> Tensor:
    h = field.net(x)
    (slope,) = grad((h * h.detach()).sum(), h, create_graph=True)
    with torch.no_grad():
        scale = h.sum()
    return (slope * h * scale).mean()


BODIES = [residual, second_order, forces, of_a_value_between, unused, stopped]


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("body", BODIES)
def test_training_equals_one_device(body: Body, num_microbatches: int) -> None:
    model, x = Field(body), torch.randn(6, 2, dtype=torch.float64)
    parted = gp.partition(copy.deepcopy(model), 3, strategy="layer", num_microbatches=num_microbatches)
    for _ in range(2):
        wanted, found = model(x), parted(x)
        torch.testing.assert_close(found, wanted)
        model.zero_grad()
        parted.zero_grad()
        wanted.backward()
        found.backward()
        for name, gradient in parted.grad_dict().items():
            own = model.get_parameter(name).grad
            assert (gradient is None) == (own is None), name
            torch.testing.assert_close(gradient, own, msg=name)
    assert parted.coverage.share == 1 and not parted.coverage.islands


def adding_up(field: Field, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    field.net(x).sum().backward()
    return field.net(x + x.grad).mean()


def of_a_function(field: Field, x: Tensor) -> Tensor:
    slope = torch.func.grad(lambda x: field.net(x).sum())(x)
    return (slope * field.net(x)[:, :2]).mean()


def in_batches(field: Field, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = grad(field.smooth(x).sum(0), x, torch.eye(4, dtype=x.dtype), is_grads_batched=True)
    return field.net(x + slope.sum(0)).mean()


@pytest.mark.parametrize("body", [adding_up, of_a_function, in_batches])
def test_what_is_not_written_out_is_as_ever(body: Body) -> None:
    model, x = Field(body), torch.randn(6, 2, dtype=torch.float64)
    parted = gp.partition(copy.deepcopy(model), 2, strategy="layer")
    wanted, found = model(x), parted(x)
    torch.testing.assert_close(found, wanted)
    wanted.backward()
    found.backward()
    for name, gradient in parted.grad_dict().items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


def of_nothing(field: Field, x: Tensor) -> Tensor:
    return grad(field.net(x).sum(), field.beside)[0].sum()


def test_what_fails_on_one_device_fails_so() -> None:
    with pytest.raises((GraphpartError, RuntimeError), match="not have been used"):
        gp.partition(Field(of_nothing), 2, strategy="layer")(torch.randn(6, 2, dtype=torch.float64))


def of_dropout(field: Field, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return grad(nn.functional.dropout(field.net(x), 1.0).sum(), x, create_graph=True)[0].sum()


def test_what_cannot_be_written_out_runs_as_it_is() -> None:
    parted = gp.partition(Field(of_dropout), 2, strategy="layer")
    with pytest.warns(UserWarning, match="draws numbers"):
        assert parted(torch.randn(6, 2, dtype=torch.float64)) == 0
    assert parted.coverage.share == 0
