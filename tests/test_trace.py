"""Tracing: what export loses, merges or leaves in place, each trap with its test."""

import contextlib
import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphpart as gp
from graphpart.errors import AutogradError, MicrobatchError, TraceError, UnsupportedOperatorError
from graphpart.trace import export, patches, trace
from tests.helpers import zoo

pytestmark = pytest.mark.sampled(2)


def same_as_plain(model: nn.Module, *args: torch.Tensor, workers: int = 2, **options: object) -> gp.PartitionedModule:
    """Every operator on alternating workers, compared with the plain model to 1e-12 in float64."""

    def alternate(graph, cluster, **_):  # type: ignore[no-untyped-def]
        return gp.Placement.whole(graph, {op.name: i % workers for i, op in enumerate(graph.operators)})

    parted = gp.partition(model.double(), workers, strategy=alternate, **options)  # type: ignore[arg-type]
    report = parted.verify(*args)
    assert report.worst[1] < 1e-12, report
    return parted


class NoGradBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = torch.tanh(self.a(x)) * 2
            with torch.enable_grad():
                inner = self.b(x)
        return (self.a(x) - target).square().sum() + inner.sum()


def test_no_grad_region_sends_no_gradient() -> None:
    """Export's decomposition would let gradients through ``torch.no_grad``."""
    parted = same_as_plain(NoGradBranch(), torch.randn(3, 4, dtype=torch.float64))
    graph = parted.plan.graph
    assert any(op.target == "aten.detach.default" for op in graph.operators)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y.add_(1).mul_(2)
        y[0] = 3.0
        y[:, 1] += y[:, 2]
        return y.relu_()


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_in_place_operators_become_functional(num_microbatches: int) -> None:
    same_as_plain(InPlace(), torch.randn(4, 4, dtype=torch.float64), num_microbatches=num_microbatches)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.equal = nn.Linear(4, 5, bias=False)
        self.equal.weight = nn.Parameter(self.embed.weight.detach().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        return self.head(h) + self.equal(h)


def test_tied_by_identity_not_by_value() -> None:
    parted = same_as_plain(Tied(), torch.tensor([[1, 2], [3, 4]]))
    names = sorted(s.names for s in parted.plan.graph.parameters)
    assert names == [("embed.weight", "head.weight"), ("equal.weight",)]


class Mutating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema", torch.zeros(4))

    def forward(self, x: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.a(x)
        self.count += 1
        self.ema.mul_(0.9).add_(0.1 * y.mean(0).detach())
        scratch.mul_(2)
        return y, x, scratch


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_buffers_inputs_and_outputs_that_are_inputs(num_microbatches: int) -> None:
    model = Mutating().double()
    parted = gp.partition(model, 2, strategy={"a": 1, "*": 0}, num_microbatches=num_microbatches)
    x, scratch = torch.randn(5, 4, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    y, same_x, same_scratch = parted(x, scratch)
    assert same_x is x and same_scratch is scratch
    assert torch.equal(scratch, torch.full((5,), 2.0, dtype=torch.float64))
    assert model.count == 1
    assert torch.allclose(model.ema, 0.1 * y.mean(0), rtol=1e-12)
    assert y.requires_grad


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.table = torch.arange(4.0, dtype=torch.float64)  # neither buffer nor parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) + self.table


def test_lifted_constants() -> None:
    same_as_plain(Constants(), torch.randn(3, 4, dtype=torch.float64), num_microbatches=3)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * 7


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubling.apply(self.a(x))


def equal_in_pieces(model: nn.Module, *args: torch.Tensor) -> str:
    """Compare a model that is no single graph with the plain one, over two calls; returns why it is cut up."""
    plain, parted = copy.deepcopy(model), gp.partition(model, 2, strategy="layer")
    for _ in range(2):
        expected, found = plain(*args), parted(*args)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            expected.square().sum().backward()
            found.square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted.get_parameter(name), parameter)
        if parameter.grad is None:
            assert parted.get_parameter(name).grad is None, name
        else:
            torch.testing.assert_close(parted.get_parameter(name).grad, parameter.grad)
    (why,) = parted._traces._cut.values()
    return why


@pytest.mark.filterwarnings("ignore:a part of")
def test_custom_backward_runs_as_it_is() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(UnsupportedOperatorError, match=r"test_trace\.py:\d+.*Doubling"):
        trace(CustomFunction(), (x,))
    assert "Doubling" in equal_in_pieces(CustomFunction(), x)
    with torch.no_grad():  # only the forward matters here
        model = CustomFunction()
        assert torch.equal(gp.partition(model, 2)(x), model.a(x) * 2)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y.register_hook(lambda g: g * 10)
        return y


@pytest.mark.filterwarnings("ignore:a part of")
def test_tensor_hook_runs_as_it_is() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(UnsupportedOperatorError, match="hook"):
        trace(Hooked(), (x,))
    equal_in_pieces(Hooked(), x)


def test_parameter_hook_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    gp.partition(model, 2, strategy={"0": 0, "1": 1})(torch.randn(2, 4)).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], model[0].weight.grad)


@pytest.mark.filterwarnings("ignore:a part of")
def test_embedding_max_norm_runs_as_it_is() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises((UnsupportedOperatorError, TraceError), match=r"[Ee]mbedding|weight"):
        trace(nn.Embedding(5, 4, max_norm=1.0), (ids,))
    equal_in_pieces(nn.Embedding(5, 4, max_norm=1.0), ids)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.a(x).sum() > 0:
            return self.a(x)
        return x


@pytest.mark.filterwarnings("ignore:a part of")
def test_decisions_on_data_break_the_graph_at_the_line() -> None:
    x, line = torch.randn(2, 4), r"test_trace\.py:\d+ \(if self\.a\(x\)\.sum\(\) > 0:\)"
    with pytest.raises(UnsupportedOperatorError, match=line):
        trace(Deciding(), (x,))
    for sign in (1, -1):
        assert re.search(line, equal_in_pieces(Deciding(), sign * x))


def test_meta_model_is_planned_but_not_run() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        x = torch.randn(4, 64)
    plan = gp.plan(model, "4xA100", (x,), strategy="layer")
    assert plan.graph.num_parameters == 64 * 64 + 64 + 64 * 8 + 8
    with pytest.raises(gp.GraphpartError, match="meta"):
        gp.partition(model, 2)(torch.randn(4, 64))


def test_flops_and_saved_bytes_of_a_linear_chain() -> None:
    """2·m·n·k FLOPs forward; backward as much per operand that wants a gradient, m·n for a bias; inputs saved once."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    graph = trace(model, (torch.randn(4, 16),)).graph
    linears = [op for op in graph.operators if op.target == "aten.linear.default"]
    assert [op.flops_forward for op in linears] == [2 * 4 * 16 * 32, 2 * 4 * 32 * 8]
    assert [op.flops_backward for op in linears] == [2 * 4 * 16 * 32 + 4 * 32, 2 * 2 * 4 * 32 * 8 + 4 * 8]
    saved = {name for op in graph.operators for name in op.saved}
    relu = next(op for op in graph.operators if "relu" in op.target)
    assert saved == {graph.inputs[0].value.name, relu.name}
    assert all(op.saved_extra_bytes == 0 for op in graph.operators)
    assert [op.module_path for op in linears] == ["0", "2"]


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * 2 + b

    parted = gp.partition(Two(), 1)
    x = torch.randn(3)
    assert torch.equal(parted(x, x), 3 * x)
    assert torch.equal(parted(x, torch.zeros(3)), 2 * x)


class Scaled(nn.Module):
    """Divides by the literal batch size: a retrace is the only right answer for another batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sum() / x.shape[0]


def test_new_batch_sizes_and_uneven_microbatches() -> None:
    model = Scaled().double()
    parted = gp.partition(model, 2, strategy={"a": 1, "*": 0}, num_microbatches=3)
    for batch in (8, 7, 3, 8, 2, 1):
        x = torch.randn(batch, 4, dtype=torch.float64)
        assert torch.allclose(parted(x), model(x), rtol=1e-12)
        assert parted.verify(x).worst[1] < 1e-12


def test_too_many_microbatches_are_refused() -> None:
    with pytest.raises(MicrobatchError, match="batch of 2 samples cannot be cut into 3"):
        gp.partition(Scaled(), 2, num_microbatches=3)(torch.randn(2, 4))
    with pytest.raises(MicrobatchError, match="sample_dims"):
        gp.partition(Scaled(), 2, num_microbatches=3, sample_dims={"args[0]": None})(torch.randn(6, 4))


def test_other_sample_dimension() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.a(x)).mean(0)

    model = TimeFirst().double()
    parted = gp.partition(model, 2, strategy={"a": 1, "*": 0}, num_microbatches=3, sample_dims={"args[0]": 1})
    assert parted.verify(torch.randn(5, 7, 4, dtype=torch.float64)).worst[1] < 1e-12


@pytest.mark.parametrize("mode", ["microbatch", "barrier"])
def test_batch_norm_statistics(mode: str) -> None:
    """Running statistics come out as on one device in both modes; outputs do so with the barrier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2)).double()
    plain = torch.nn.Sequential(*model)  # shares parameters; statistics are compared by value below
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected = plain(x)
    after = {name: b.clone() for name, b in model.named_buffers()}
    for name, b in model.named_buffers():
        b.copy_(before[name])
    parted = gp.partition(model, 2, strategy={"0": 0, "*": 1}, num_microbatches=3, batch_norm=mode)
    out = parted(x)
    out.sum().backward()
    for name, b in model.named_buffers():
        assert torch.allclose(b, after[name], rtol=1e-12), name
    assert model[1].num_batches_tracked == 1
    assert torch.allclose(out, expected, rtol=1e-10) == (mode == "barrier")


def test_double_backward_is_refused() -> None:
    parted = gp.partition(Scaled(), 2)
    with pytest.raises(AutogradError, match="create_graph"):
        parted(torch.randn(2, 4)).backward(create_graph=True)


class NewZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        state = h.new_zeros(x.shape[0], 4) + h.new_full((1,), 2.0)
        return torch.tanh(state + h)


def test_new_tensors_do_not_wait_for_the_one_they_are_like() -> None:
    parted = same_as_plain(NewZeros(), torch.randn(6, 4, dtype=torch.float64), num_microbatches=3)
    targets = {op.target for op in parted.plan.graph.operators}
    assert {"aten.zeros.default", "aten.full.default"} <= targets
    waits = [
        s
        for s in parted.plan.program.segments
        if s.microbatch is None and any("addmm" in n or "linear" in n for n in s.inputs)
    ]
    assert not waits


class BehindAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y.detach().mul_(2)
        return y


@pytest.mark.filterwarnings("ignore:a part of")
def test_change_through_detach_runs_as_it_is() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(UnsupportedOperatorError, match=r"test_trace\.py:\d+ .*mul_ changes .* through detach"):
        trace(BehindAutograd(), (x,))
    equal_in_pieces(BehindAutograd(), x)


def test_a_model_is_partitioned_once() -> None:
    with pytest.raises(gp.GraphpartError, match="partitioned already"):
        gp.partition(gp.partition(nn.Linear(2, 2), 2), 2)


def test_containers_stay_containers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    parted = gp.partition(model, 2, strategy={"0": 0, "*": 1})
    assert len(parted) == 3 and parted[0] is model[0] and list(parted) == list(model)
    assert not hasattr(gp.partition(nn.Linear(2, 2), 1), "__len__")


class ArgumentsName(nn.Module):
    """A buffer that is called like an argument, and one like an operator; parts that are called like results."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("mask", torch.arange(4.0))
        self.mean = nn.Parameter(torch.ones(4))
        self.split = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(2 * torch.ones(2))])
        self.linear = torch.full((4,), 3.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.a(x) * self.mask * mask + x.mean(1, keepdim=True) * self.mean + self.linear
        left, right = y.split(2, 1)
        return left * self.split[0] + right * self.split[1]


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_names_of_tensors_arguments_and_operators_live_apart(num_microbatches: int) -> None:
    model = ArgumentsName()
    model.linear = model.linear.double()
    x = torch.randn(4, 4).double()
    parted = same_as_plain(model, x, 2 * x, num_microbatches=num_microbatches)
    names = [*parted.plan.graph.source, *(op.name for op in parted.plan.graph.operators)]
    assert {"mask", "mean", "split.0", "split.1"} <= set(names) and len(set(names)) == len(names)


class Noisy(nn.Module):
    """Draws numbers in every way that hangs on no data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.a(x) + torch.randn_like(x)
        _ = torch.rand(2)  # of no use, but drawn
        h = torch.where(torch.rand(len(x), 1) > 0.3, h, torch.zeros_like(h).uniform_(-1, 1))
        h = h[:, torch.randperm(8)] * torch.randint(0, 4, (8,))
        return self.b(F.gumbel_softmax(h, hard=True)), torch.normal(0.0, 1.0, (3,))


@pytest.mark.parametrize("choices", [{"strategy": "layer", "num_microbatches": 3}, {"strategy": "feature"}])
def test_noise_is_that_of_one_device(choices: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(6, 8)
    parted = gp.partition(copy.deepcopy(model), 2, **choices)
    torch.manual_seed(1)
    want = [*model(x), *model(x), torch.rand(1)]
    torch.manual_seed(1)
    for a, b in zip([*parted(x), *parted(x), torch.rand(1)], want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "resnet", "t5", "mixtral"])
def test_composites_of_the_graph_alone_give_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for of_all in (False, True):
        if of_all:
            monkeypatch.setattr(export, "composites_of", lambda graph: contextlib.nullcontext())
        torch.manual_seed(0)
        sample = zoo.MODELS[name](4)
        graph = trace(sample.model, sample.args, sample.kwargs).graph
        found.append([(op.name, op.target, op.args, op.kwargs, op.results) for op in graph.operators])
    assert found[0] == found[1]


COMPOSITES = {
    "T": lambda x: x.T, "adjoint": lambda x: x.adjoint(), "chunk": lambda x: x.chunk(3, 1)[1],
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6), training=True),
    "contiguous": lambda x: x.t().contiguous(), "dropout": lambda x: F.dropout(x, 0.5),
    "expand_as": lambda x: x[:1].expand_as(x), "flatten": lambda x: x.view(4, 2, 3).flatten(), "mH": lambda x: x.mH,
    "mT": lambda x: x.mT, "moveaxis": lambda x: x.moveaxis(0, 1), "movedim": lambda x: x.movedim(0, 1),
    "narrow": lambda x: x.narrow(1, 1, 2), "numpy_T": lambda x: x.T, "reshape": lambda x: x.t().reshape(3, 8),
    "reshape_as": lambda x: x.reshape_as(x.view(3, 8)), "swapaxes": lambda x: x.swapaxes(0, 1),
    "swapdims": lambda x: x.swapdims(0, 1), "to": lambda x: x.to(torch.float64),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "unflatten": lambda x: x.unflatten(1, (2, 3)), "view_as": lambda x: x.view_as(torch.zeros(3, 8)),
}  # fmt: skip
"""By name, a call of each operator that is taken to come apart into no other composite."""


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", sorted(patches._INTO_PLAIN))
def test_a_composite_that_is_said_to_be_plain_gives_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return COMPOSITES[name.removeprefix("aten::")](x) + 0

    found = []
    for of_all in (False, True):
        if of_all:
            monkeypatch.setattr(export, "composites_of", lambda graph: contextlib.nullcontext())
        graph = trace(Net(), (torch.randn(4, 6),)).graph
        found.append([(op.name, op.target, op.args, op.kwargs, op.results) for op in graph.operators])
    assert found[0] == found[1]


def test_a_composite_that_may_come_apart_into_others_has_all_looked_at() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.alpha_dropout(x, 0.5, self.training).tensor_split(2)[0] @ x.T

    graph = trace(Net().eval(), (torch.randn(4, 4),)).graph
    assert "aten.matmul.default" in {op.target for op in graph.operators}


def test_a_graph_that_depends_on_data_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(UnsupportedOperatorError, match="decides on the values"):
        gp.plan(Net(), 1, (torch.randn(4, 4),))
    gp.partition(Net(), 1)(torch.randn(4, 4))
    assert not any(capfd.readouterr())
