"""Custom operators: computed whole with a warning, or cut by the rule that their user registers."""

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import GraphError
from graphpart.rules.register import COSTS, RULES


@torch.library.custom_op("graphpart_test::gated", mutates_args=())
def gated(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(x) * x @ weight.t()


@gated.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward(ctx, gradient):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    gate = torch.sigmoid(x)
    inner = gradient @ weight
    return inner * (gate + x * gate * (1 - gate)), gradient.flatten(0, -2).t() @ (gate * x).flatten(0, -2)


gated.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.first(x), self.weight).square().mean()


@pytest.fixture(autouse=True)
def _forget():  # type: ignore[no-untyped-def]
    yield
    RULES.clear()
    COSTS.clear()


def test_unknown_operator_is_named_and_computed_whole() -> None:
    parted = gp.partition(Net(), 2, strategy={"first": 0, "*": 1}, num_microbatches=3)
    x = torch.randn(7, 3, 4)
    with pytest.warns(UserWarning, match=r"graphpart_test::gated.*register_rule"):
        parted.verify(x)
    steps = [s for segment in parted.plan.program.segments for s in segment.steps]
    assert sum(s.target.startswith("graphpart_test.gated") for s in steps) == 1


def test_registered_operator_is_cut_and_costed(recwarn: pytest.WarningsRecorder) -> None:
    gp.register_rule(gated, "... k, n k -> ... n", flops=lambda operands, results: 1000.0 * operands[0][0], sums="k")
    parted = gp.partition(Net(), 2, strategy={"first": 0, "*": 1}, num_microbatches=3)
    parted.verify(torch.randn(7, 3, 4))
    assert not [w for w in recwarn if "gated" in str(w.message)]
    steps = [s for segment in parted.plan.program.segments for s in segment.steps]
    assert sum(s.target.startswith("graphpart_test.gated") for s in steps) == 3
    operator = next(op for op in parted.plan.graph.operators if "gated" in op.target)
    assert (operator.flops_forward, operator.flops_backward) == (7000.0, 14000.0)


def test_wrong_notation_is_refused() -> None:
    with pytest.raises(GraphError, match="no axis 'z'"):
        gp.register_rule("graphpart_test::gated", "... k, n k -> ... n", sums="z")
    with pytest.raises(GraphError, match="->"):
        gp.register_rule("graphpart_test::gated", "... k, n k")
    gp.register_rule("graphpart_test::gated", "b k, n k -> b n")  # the call has three dimensions
    with pytest.raises(GraphError, match="gated"):
        gp.partition(Net(), 2)(torch.randn(7, 3, 4))
