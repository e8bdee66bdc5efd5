"""A partitioned model takes what the model took, gives what it gave, and says so where it cannot."""

from __future__ import annotations

import collections
import copy
import enum
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpart as gp
from graphpart.errors import GraphpartError, ParameterError, TraceError
from graphpart.module import traces as traces_module
from tests.helpers.zoo import MODELS, WORDS, padding_mask

pytestmark = pytest.mark.sampled(6)

BATCH, WIDTH = 6, 4
PLACEMENT = {"first": 0, "*": 1}


class Net(nn.Module):
    """Two layers, with any function of them as its forward."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function or (lambda net, x: net.body(x))
        self.scale = 1.0

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) * self.scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def parted_of(model: nn.Module, num_microbatches: int = 3) -> gp.PartitionedModule:
    return gp.partition(model, 2, strategy=PLACEMENT, num_microbatches=num_microbatches)


def x_of(batch: int = BATCH) -> Tensor:
    return torch.linspace(-1, 1, batch * WIDTH).reshape(batch, WIDTH)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.requires_grad == expected.requires_grad
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, collections.abc.Mapping):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif hasattr(expected, "__dict__") and not isinstance(expected, (type, enum.Enum)):
        assert_same(vars(found), vars(expected))
    else:
        assert found == expected


# --- arguments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A dataclass that torch does not know."""

    x: Tensor
    inner: Pair | None = None
    factor: float = 2.0


class Mode(enum.Enum):
    TWICE = 2


INPUTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "none": (lambda net, x, mask=None: net.body(x) if mask is None else x, (x_of(),), {"mask": None}),
    "flag": (lambda net, x, flag=False: net.body(x) if flag else net.first(x), (x_of(),), {"flag": True}),
    "numbers and strings": (lambda net, x, k, name: net.body(x) * k * len(name), (x_of(), 2.5), {"name": "abc"}),
    "broadcast": (lambda net, x, mask: net.body(x) * mask, (x_of(),), {"mask": torch.rand(1, WIDTH)}),
    "scalar tensor": (lambda net, x, factor: net.body(x) * factor, (x_of(), torch.tensor(3.0)), {}),
    "without batch": (lambda net, x, bias: net.body(x) + bias, (x_of(), torch.rand(WIDTH)), {}),
    "dict": (lambda net, d: net.body(d["x"] + d["y"][0]), ({"x": x_of(), "y": [x_of(), None]},), {}),
    "keywords only": (lambda net, *, b, a: net.body(a) - b, (), {"a": x_of(), "b": 2 * x_of()}),
    "dataclass": (lambda net, p: net.body(p.x + p.inner.x) * p.factor, (Pair(x_of(), Pair(x_of())),), {}),
    "enum, dtype, device": (
        lambda net, x, mode, dtype, device: net.body(x).to(device, dtype) * mode.value,
        (x_of(), Mode.TWICE, torch.float64, torch.device("cpu")),
        {},
    ),
    "odd names": (lambda net, **kwargs: net.body(kwargs["if"] + kwargs["a b"]), (), {"if": x_of(), "a b": x_of()}),
    "one tensor twice": (lambda net, x, y: net.body(x) * y, (x_of(),) * 2, {}),
    "no tensor": (lambda net, n: net.body(torch.ones(n, WIDTH)), (BATCH,), {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str) -> None:
    function, args, kwargs = INPUTS[name]
    model = Net(function)
    parted = parted_of(model, 1 if name == "no tensor" else 3)
    assert_same(parted(*args, **kwargs), model(*args, **kwargs))
    parted.verify(*args, **kwargs).check(1e-5)


@pytest.mark.parametrize(
    ("argument", "named"), [(object(), "builtins.object"), ({1, 2}, "builtins.set"), (torch.Generator(), "Generator")]
)
def test_arguments_that_could_change_unseen_are_refused(argument: Any, named: str) -> None:
    with pytest.raises(TraceError, match=rf"argument other is a .*{named}"):
        parted_of(Net(lambda net, x, other: net.body(x)))(x_of(), other=argument)


def test_one_sample_and_none() -> None:
    model = Net()
    parted = parted_of(model)
    for batch in (BATCH, 1, 0):
        x = x_of(batch)
        assert_same(parted(x), model(x))
        parted.verify(x, loss_fn=lambda y: y.sum()).check(1e-5)


# --- results ------------------------------------------------------------------------------------------------------

Named = collections.namedtuple("Named", "a b")


class Cache:
    """An object with tensors inside, as a cache of keys and values is."""

    def __init__(self, *values: Tensor) -> None:
        self.values, self.length = list(values), len(values)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "nested": lambda net, x: ((net.body(x), (x, None)), [x.max(), {"n": 3}]),
    "scalars": lambda net, x: {"y": net.body(x), "n": 3, "f": 0.5, "s": "text", "mean": net.body(x).mean()},
    "named tuple": lambda net, x: Named(net.body(x), 1),
    "ordered": lambda net, x: collections.OrderedDict(b=net.body(x), a=x),
    "dataclass": lambda net, x: Pair(net.body(x), Pair(net.first(x), factor=1.0)),
    "object": lambda net, x: (net.body(x), Cache(net.first(x), x)),
    "dtype and device": lambda net, x: (net.body(x), x.dtype, str(x.device), len(x)),
    "the same twice": lambda net, x: [net.body(x)] * 2,
    "a constant": lambda net, x: (net.body(x), torch.arange(3)),
    "part of an input": lambda net, x: (net.body(x), x[:2]),
    "no tensor": lambda net, x: (None, 3),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    model = Net(OUTPUTS[name])
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=3)
    assert_same(parted(x_of()), model(x_of()))
    if name != "no tensor":
        parted.verify(x_of()).check(1e-5)


def test_inputs_and_parameters_that_are_returned_are_the_same_objects() -> None:
    model = Net(lambda net, x: (net.body(x), x, net.first.weight))
    x = x_of()
    _, same, weight = parted_of(model)(x)
    assert same is x
    assert weight is model.first.weight


# --- traces -------------------------------------------------------------------------------------------------------


def test_many_shapes_are_warned_of_by_name_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "MAX_CALLS", 10)
    model = Net(lambda net, x, *, factor: net.body(x) * factor)
    parted = parted_of(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(1, 9):
            parted(x_of(batch), factor=1.0)
            parted(x_of(batch), factor=1.0)
    with pytest.warns(UserWarning, match=r"traced and planned 9 times.*shape of args\[0\].*\(9, 4\)") as caught:
        parted(x_of(9), factor=1.0)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"the value of factor \(.*1\.[0-9]"):
        for i in range(1, 9):
            parted(x_of(), factor=1.0 + i / 10)
    assert len(parted._traces.calls) == 10


def test_each_call_has_a_plan_of_its_own_shapes() -> None:
    parted = parted_of(Net())
    assert parted.plan is None
    plans = {batch: parted.prepare(x_of(batch)) for batch in (BATCH, 2)}
    for batch, plan in plans.items():
        (source,) = plan.graph.inputs
        assert source.value.shape == (batch, WIDTH) and plan.num_microbatches == min(batch, 3)
        assert parted.prepare(x_of(batch)) is plan
        parted(x_of(batch))
        assert parted.last_step is not None and parted.last_step.plan is plan
    step = parted.prepare_step(x_of(2), loss_fn=lambda y: y.square().mean())
    assert step.program.wire[step.program.outputs[0]].shape == () and step is not plans[2]
    assert parted.plan is plans[BATCH]  # as it was decided first
    assert all(plan.placement.homes == plans[BATCH].placement.homes for plan in (plans[2], step))


def test_attributes_modes_and_counters_are_seen() -> None:
    def counting(net: Net, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        return F.dropout(net.body(x), 0.5, net.training) + net.calls

    model = Net(counting)
    parted = parted_of(model)
    parted.eval()
    assert not model.training
    first = parted(x_of())
    assert_same(parted(x_of()), first + 1)
    model.scale = 2.0
    assert_same(parted(x_of()), 2 * (first - 1) + 3)
    parted.scale = 1.0
    assert model.scale == 1.0
    parted.train()
    assert (parted(x_of()) == model.calls).any()
    assert model.calls == 4


def test_the_mode_is_the_originals_too() -> None:
    model = Net(lambda net, x: F.dropout(net.body(x), 0.5, net.training))
    parted = parted_of(model)
    for mode in (False, True):
        for switch in (model.train, parted.train, lambda mode: setattr(parted, "training", mode)):
            model.train(not mode)
            switch(mode)
            assert torch.equal(parted(x_of()), parted(x_of())) != mode
            assert model.training == parted.training == mode
    assert parted.train() is parted and parted.eval() is parted and not model.first.training


def test_attributes_and_methods_pass_through() -> None:
    model = Net()
    model.config = {"a": 1}  # type: ignore[assignment]
    parted = parted_of(model)
    assert parted.config == {"a": 1}
    assert parted.first is model.first
    assert [n for n, _ in parted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert parted.body(x_of()).shape == (BATCH, WIDTH)
    with pytest.raises(AttributeError, match="nothing"):
        _ = parted.nothing


@pytest.mark.parametrize("change", [copy.copy, copy.deepcopy, pickle.dumps, nn.Module.half, nn.Module.double])
def test_copies_and_casts_are_refused(change: Callable[[Any], Any]) -> None:
    with pytest.raises(GraphpartError, match=r"before graphpart.partition|state_dict"):
        change(parted_of(Net()))


def test_requires_grad_changed_after_planning() -> None:
    parted = parted_of(Net())
    parted(x_of()).sum().backward()
    for frozen in (["first"], ["second"], []):
        parted.zero_grad()
        for name in ("first", "second"):
            getattr(parted, name).requires_grad_(name not in frozen)
        parted(x_of()).sum().backward()
        without = {n for n, g in parted.grad_dict().items() if g is None}
        assert without == {f"{n}.{p}" for n in frozen for p in ("weight", "bias")}
        parted.verify(x_of()).check(1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
        lambda m: m.add_module("third", nn.Linear(2, 2)),
        lambda m: setattr(m.second, "bias", None),
        lambda m: setattr(m, "second", nn.Linear(WIDTH, 2 * WIDTH)),
        lambda m: m.register_buffer("late", torch.zeros(1)),
    ],
    ids=["replaced", "added", "removed", "of another size", "a buffer"],
)
def test_changed_parameters_are_taken_over(change: Callable[[nn.Module], None]) -> None:
    model = Net()
    plain = copy.deepcopy(model)
    parted = parted_of(model)
    parted(x_of())
    for changed in (model, plain):
        torch.manual_seed(5)
        change(changed)
    plain(x_of()).sum().backward()
    parted(x_of()).sum().backward()
    assert_same(parted(x_of()), plain(x_of()))
    assert dict(parted.named_parameters()).keys() == dict(plain.named_parameters()).keys() == parted.grad_dict().keys()
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (parted.grad_dict()[name] is None)
        if parameter.grad is not None:
            assert_same(parted.grad_dict()[name], parameter.grad)


def test_meta_model() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.empty(BATCH, WIDTH)
    assert len(gp.plan(model, 2, (x,), strategy="layer").program.segments) == 2
    with pytest.raises(ParameterError, match=r"'first.weight' has no values"):
        parted_of(model)(x)


def looped(net: Net, x: Tensor) -> Tensor:
    while x.abs().max() < 2.0:
        x = torch.tanh(net.first(x)) + 1.5 * x
    return net.second(x)


def clamped_in_place(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x)
    with torch.no_grad():
        hidden.clamp_(0)
    return net.second(hidden)


IN_PIECES: dict[str, Callable[..., Any]] = {
    "rows by a mask": lambda net, x: net.body(x)[x.sum(1) > 0],
    "a number of the data": lambda net, x: net.body(x) * x.sum().item(),
    "a decision on the data": lambda net, x: net.body(x) if x[0, 0] > 0 else net.first(x),
    "as many loops as it takes": looped,
    "a change that autograd overlooks": clamped_in_place,
    "reentrant checkpoint": lambda net, x: net.second(checkpoint(net.first, x.requires_grad_(), use_reentrant=True)),
    "a hook in the forward": lambda net, x: hooked(net.first(x)) + net.second(x),
    "sizes by the data": lambda net, x: net.body(torch.cat([x, x[x > 0].reshape(-1, 1).expand(-1, WIDTH)])).sum(0),
    "a list grows": lambda net, x: net.log.append(len(x)) or net.body(x),
    "print": lambda net, x: print(end="") or net.body(x),
}


def hooked(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: 3 * gradient)
    return x


@pytest.mark.parametrize("case", IN_PIECES)
def test_what_is_no_single_graph_is_cut_up(case: str) -> None:
    model = Net(IN_PIECES[case])
    model.log = []
    plain = copy.deepcopy(model)
    parted = parted_of(model)
    for sign in (1, -1, 1):
        expected, found = plain(sign * x_of()), parted(sign * x_of())
        assert_same(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
        for name, parameter in plain.named_parameters():
            assert_same(parted.get_parameter(name).grad, parameter.grad)
    assert model.log == plain.log


def test_plain_tensor_attributes_are_read_as_they_are() -> None:
    model = Net(lambda net, x: net.body(x) * net.factor)
    model.factor = torch.ones(WIDTH)
    parted = parted_of(model)
    parted.verify(x_of()).check(1e-5)
    model.factor = torch.full((WIDTH,), 2.0)
    parted.verify(x_of()).check(1e-5)
    model.factor.zero_()
    assert not parted(x_of()).any()
    model.factor = torch.ones(1)
    parted.verify(x_of()).check(1e-5)
    model.factor = torch.ones(WIDTH, requires_grad=True)
    parted(x_of()).square().sum().backward()
    expected = torch.autograd.grad(model(x_of()).square().sum(), model.factor)
    torch.testing.assert_close(model.factor.grad, *expected)


def test_regions_without_grad_and_under_autocast() -> None:
    """Also one inside of the other, which export drops; modules and lines are known inside of them."""

    def function(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                hidden = net.first(x)
            hidden = net.second(hidden)
        with torch.no_grad():
            scale = net.second(x)
        return hidden.float() * scale

    model = Net(function)
    parted = parted_of(model)
    parted.verify(x_of()).check(1e-2)
    parted(x_of()).sum().backward()
    assert {n for n, g in parted.grad_dict().items() if g is None} == {"first.weight", "first.bias"}
    found = {op.module_path: op for op in parted.plan.graph.operators if op.target == "aten.linear.default"}
    assert set(found) == {"first", "second"}
    assert "test_face.py" in str(found["first"].source_line)


@pytest.mark.parametrize("expression", ["einsum", "tensordot", "inner", "multi_dot"])
def test_autocast_inside_of_composite_operators(expression: str) -> None:
    products: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "einsum": lambda x, w: torch.einsum("bi,ij->bj", x, w),
        "tensordot": lambda x, w: torch.tensordot(x, w, 1),
        "inner": torch.inner,
        "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w]),
    }
    model = Net(lambda net, x: products[expression](net.first(x).float(), net.second.weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert parted_of(model)(x_of()).dtype == torch.bfloat16
        parted_of(model).verify(x_of()).check(5e-2)


@pytest.mark.parametrize("layer", [nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU, nn.Dropout])
def test_random_layers_repeat_with_the_seed(layer: type[nn.Module]) -> None:
    model = Net(lambda net, x: net.second(net.noise(net.first(x)[:, None])))
    model.noise = layer()
    parted = parted_of(model)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(parted(x_of(60)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    if layer is not nn.RReLU:
        parted.verify(x_of(60)).check(1e-5)


def test_frozen_models_and_sparse_gradients_can_be_verified() -> None:
    model = Net().requires_grad_(False)
    parted_of(model).verify(x_of()).check(1e-5)
    table = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    parted = gp.partition(table, 2, strategy="layer", num_microbatches=2)
    ids = torch.arange(6) % 4
    parted.verify(ids).check(1e-5)
    parted(ids).sum().backward()
    assert table[0].weight.grad.is_sparse


def test_checkpointed_parts() -> None:
    parted_of(Net(lambda net, x: net.second(checkpoint(net.first, x, use_reentrant=False)))).verify(x_of()).check(1e-5)


# --- hooks --------------------------------------------------------------------------------------------------------


def test_a_hook_that_looks_on_sees_values_on_every_call() -> None:
    model = Net()
    parted = parted_of(model)
    parted(x_of())
    seen: list[Tensor] = []
    handle = model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    for i in range(3):
        seen.clear()
        out = parted(x_of() + i)
        torch.testing.assert_close(seen[-1], model.first(x_of() + i))
    del seen[1:]
    (out.sum() + seen[0].square().sum()).backward()
    found = model.first.weight.grad.clone()
    model.zero_grad()
    seen.clear()
    (model(x_of() + 2).sum() + seen[0].square().sum()).backward()
    torch.testing.assert_close(found, model.first.weight.grad)
    handle.remove()
    seen.clear()
    parted(x_of())
    assert not seen


def test_a_hook_that_needs_values_gets_them() -> None:
    model = Net()
    means: list[float] = []
    model.second.register_forward_hook(lambda module, args, output: means.append(output.mean().item()))
    out = parted_of(model)(x_of())
    assert means[-1] == pytest.approx(out.mean().item())


HOOKS: dict[str, Callable[[Net], Any]] = {
    "output": lambda net: net.first.register_forward_hook(lambda module, args, output: output * 2),
    "in place": lambda net: net.first.register_forward_hook(_double),
    "input": lambda net: net.second.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "of the whole": lambda net: net.register_forward_hook(lambda module, args, output: output + args[0]),
    "keywords": lambda net: net.first.register_forward_hook(lambda m, args, kwargs, out: out * 3, with_kwargs=True),
}


def _double(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_something_are_part_of_the_model(name: str) -> None:
    model = Net()
    parted = parted_of(model)
    before = parted(x_of())
    handle = HOOKS[name](model)
    assert_same(parted(x_of()), model(x_of()))
    parted.verify(x_of()).check(1e-5)
    handle.remove()
    assert_same(parted(x_of()), before)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_make_a_weight(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    norm(model.second)
    parted = parted_of(model)
    for _ in range(2):
        parted.verify(x_of()).check(1e-5)


def test_backward_hooks_of_modules_run() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    parted = parted_of(model)
    seen: dict[str, list[Tensor]] = {"plain": [], "parted": []}
    for name, net in (("plain", plain), ("parted", model)):
        net.second.register_full_backward_hook(lambda _, __, given, name=name: seen[name].append(given[0]))
        net.first.register_full_backward_hook(lambda _, given, __: (2 * given[0],) if given[0] is not None else None)
    for net in (plain, parted):
        net(x_of().requires_grad_()).square().sum().backward()
    assert_same(seen["parted"], seen["plain"])
    for name, parameter in plain.named_parameters():
        assert_same(parted.get_parameter(name).grad, parameter.grad)


def test_a_hook_that_counts_its_calls_runs_once_a_call() -> None:
    model = Net()

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        module.calls = getattr(module, "calls", 0) + 1
        return output * module.calls

    plain = copy.deepcopy(model)
    parted = parted_of(model)
    for net in (model, plain):
        net.first.register_forward_hook(scale)
    for _ in range(3):
        assert_same(parted(x_of()), plain(x_of()))
    assert model.first.calls == 3


def test_the_form_of_the_result_may_change() -> None:
    """The operators stay the same."""
    model = Net(lambda net, x: {"y": net.body(x)} if net.as_dict else (net.body(x), net.label))
    model.as_dict, model.label = False, "a"
    parted = parted_of(model)
    for as_dict, label in ((False, "a"), (True, "a"), (False, "b"), (False, "a")):
        model.as_dict, model.label = as_dict, label
        assert_same(parted(x_of()), model(x_of()))


def test_one_object_given_twice_is_one_to_the_model() -> None:
    def function(net: Net, x: Tensor, y: Tensor) -> Tensor:
        return net.body(x) if x is y else net.body(x) - y

    model, x = Net(function), x_of()
    parted = parted_of(model)
    for pair in ((x, x), (x, x.clone()), (x, x)):
        assert_same(parted(*pair), model(*pair))


def test_hooks_on_the_partitioned_model_itself() -> None:
    parted = parted_of(Net())
    seen = []
    parted.register_forward_hook(lambda module, args, output: seen.append((module, output)))
    out = parted(x_of())
    assert seen[0][0] is parted
    assert seen[0][1] is out


# --- transformers -------------------------------------------------------------------------------------------------


def test_varying_lengths_caches_and_generate() -> None:
    pytest.importorskip("transformers")
    model, (ids,), _ = MODELS["gpt2"](4)
    model.eval()
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=2)
    for length in (6, 4, 6, 3):
        parted.verify(ids[:, :length], attention_mask=padding_mask(ids[:, :length])).check(1e-5)
    assert parted._traces.num_traces == 3
    parted.verify(ids, position_ids=torch.arange(6)[None], labels=ids).check(1e-5)
    ours, plain = parted(ids, use_cache=True), model(ids, use_cache=True)
    assert type(ours) is type(plain)
    assert type(ours.past_key_values) is type(plain.past_key_values)
    assert ours.past_key_values.get_seq_length() == 6
    torch.testing.assert_close(ours.past_key_values.layers[1].keys, plain.past_key_values.layers[1].keys)
    with pytest.raises(TraceError, match=r"past_key_values is a .*Cache"):
        parted(ids[:, -1:], past_key_values=plain.past_key_values)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": WORDS["pad_token_id"]}
    assert torch.equal(parted.generate(ids, **options), model.generate(ids, **options))
    parted._state.distributed = True
    with pytest.raises(GraphpartError, match="on several devices"):
        _ = parted.generate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5", "swin", "mixtral"])
def test_later_calls_need_no_more_traces(name: str) -> None:
    pytest.importorskip("transformers")
    model, args, kwargs = MODELS[name](4)
    parted = gp.partition(model, 2, strategy="layer")
    for _ in range(3):
        parted(*args, **kwargs)
    assert parted._traces.num_traces == 1
    assert not any(kept.call.traced.onlookers for kept in parted._traces.calls)


def test_placement_of_a_function_is_checked_before_anything_runs() -> None:
    def strategy(graph: gp.Graph, cluster: gp.Cluster, **_: object) -> gp.Placement:
        return gp.Placement({op.name: (gp.Tile(0, {"nowhere": gp.Intervals.full(2)}),) for op in graph.operators})

    with pytest.raises(GraphpartError, match=r"linear.* cannot be cut along 'nowhere'"):
        gp.partition(nn.Linear(4, 4), 2, strategy=strategy)(torch.randn(2, 4))
