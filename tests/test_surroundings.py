"""What a call looks for beside its arguments: classes, modules, functions, dictionaries, found and not found."""

from __future__ import annotations

import builtins
import collections
import functools
import os
import random
import types
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from tests.helpers.zoo import MODELS

ELSEWHERE = types.ModuleType("elsewhere")


class Plain:
    """An object."""

    def scale(self) -> float:
        """A number."""
        return 2.0

    @classmethod
    def size(cls) -> float:
        """A number."""
        return 3.0


def function() -> None:
    """A function."""


def default(value: float = 1.5) -> float:
    """Its argument."""
    return value


def _tried(table: Any) -> float:
    try:
        return table["key"]
    except KeyError:
        return 1.0


def _attribute(owner: Any) -> float:
    try:
        return owner.level
    except AttributeError:
        return 1.0


def _name() -> float:
    try:
        return LEVEL  # type: ignore[name-defined]
    except NameError:
        return 1.0


class Net(nn.Module):
    """Two layers, and a factor between them for each place that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Hardtanh()
        self.box, self.table = Plain(), {}

    def forward(self, x: Tensor) -> Tensor:
        """The layers; shape (samples, 4)."""
        h = self.act(self.a(x))
        h = h * (2 if hasattr(ELSEWHERE, "level") else 1) * getattr(ELSEWHERE, "more", 1.0)
        h = h * _attribute(Plain) * _attribute(function) * (2 if hasattr(function, "flag") else 1)
        h = h * vars(self.box).get("hidden", 1.0) * (2 if "own" in self.__dict__ else 1) * (1 + len(vars(self.box)))
        h = h * _tried(self.table) * float(os.environ.get("GRAPHPART_TEST_LEVEL", "1"))
        h = h * self.box.scale() * Plain.size() * default() * _name()
        h = h * (2 if self.box else 1) * (2 if self.box == 5 else 1)
        h = h * (2 if hasattr(self.b.weight, "tag") else 1) * getattr(self.b.weight, "factor", 1.0)
        return self.b(h * len("abc"))


CHANGES: dict[str, Callable[[Net, pytest.MonkeyPatch], Any]] = {
    "attribute of a module": lambda net, m: m.setattr(ELSEWHERE, "level", 1, raising=False),
    "default of a module's attribute": lambda net, m: m.setattr(ELSEWHERE, "more", 3.0, raising=False),
    "attribute of a class": lambda net, m: m.setattr(Plain, "level", 0.5, raising=False),
    "attribute of a function": lambda net, m: m.setattr(function, "level", 0.7, raising=False),
    "flag of a function": lambda net, m: m.setattr(function, "flag", 1, raising=False),
    "an object's own dictionary": lambda net, m: setattr(net.box, "hidden", 0.9),
    "the model's own dictionary": lambda net, m: setattr(net, "own", 1),
    "size of an own dictionary": lambda net, m: setattr(net.box, "other", 1),
    "key": lambda net, m: net.table.update(key=0.8),
    "environment": lambda net, m: m.setenv("GRAPHPART_TEST_LEVEL", "1.3"),
    "method": lambda net, m: m.setattr(Plain, "scale", lambda self: 0.4),
    "class method": lambda net, m: m.setattr(Plain, "size", classmethod(lambda cls: 0.6)),
    "default": lambda net, m: m.setattr(default, "__defaults__", (0.3,)),
    "name of a builtin": lambda net, m: m.setattr(builtins, "LEVEL", 1.1, raising=False),
    "truth": lambda net, m: m.setattr(Plain, "__bool__", lambda self: False, raising=False),
    "equality": lambda net, m: m.setattr(Plain, "__eq__", lambda self, other: True, raising=False),
    "attribute of a parameter": lambda net, m: setattr(net.b.weight, "tag", 1),
    "number at a parameter": lambda net, m: setattr(net.b.weight, "factor", 0.9),
    "forward of a torch module": lambda net, m: m.setattr(nn.Hardtanh, "forward", lambda self, x: x * 0.5),
    "class of a submodule": lambda net, m: setattr(net.act, "__class__", nn.Tanh),
    "a builtin's name": lambda net, m: m.setitem(globals(), "len", lambda _: 2),
}


@pytest.mark.slow
def test_what_is_looked_for_is_found_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, net = Net(), Net()
    parted, x = gp.partition(net, 2, strategy="layer"), torch.randn(3, 4)
    torch.testing.assert_close(parted(x), plain(x))
    for name, change in CHANGES.items():
        for one in (plain, net):
            change(one, monkeypatch)
        torch.testing.assert_close(parted(x), plain(x), msg=lambda text, name=name: f"{name}: {text}")


def test_the_attributes_of_parameters_and_arguments_are_there_from_the_start() -> None:
    class Tagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.weight.tag = 2.0  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * getattr(self.a.weight, "tag", 1.0)
            return self.b(y if hasattr(self.b.weight, "tag") or not hasattr(x, "mark") else -y)

    x = torch.randn(3, 4)
    x.mark = True  # type: ignore[attr-defined]
    torch.testing.assert_close(gp.partition(Tagged(), 2, strategy="layer")(x), Tagged()(x))


class Aside(nn.Module):
    """Two layers, of which a parameter is also found elsewhere."""

    def __init__(self, put: Callable[[nn.Parameter], Any], use: Callable[[Any, nn.Parameter, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__.update(found=put(self.a.weight), use=use)

    def forward(self, x: Tensor) -> Tensor:
        """The layers; shape (samples, 4)."""
        return self.b(self.use(self.found, self.a.weight, self.a(x)))


FOUND: dict[str, tuple[Callable[[nn.Parameter], Any], Callable[[Any, nn.Parameter, Tensor], Tensor]]] = {
    "used from a list": (lambda w: [w], lambda found, w, h: h @ found[0]),
    "used from a closure": (lambda w: lambda h: h @ w, lambda found, w, h: found(h)),
    "used from a partial": (lambda w: functools.partial(nn.functional.linear, weight=w), lambda found, w, h: found(h)),
    "is that of a list": (lambda w: [w], lambda found, w, h: h * 2 if found[0] is w else h),
    "is one of": (lambda w: [w], lambda found, w, h: h * 2 if any(one is w for one in found) else h),
    "key": (lambda w: {w: 3.0}, lambda found, w, h: h * found.get(w, 1.0)),
    "identity": (lambda w: {id(w): 3.0}, lambda found, w, h: h * found.get(id(w), 1.0)),
    "address": (lambda w: {w.data_ptr(): 3.0}, lambda found, w, h: h * found.get(w.data_ptr(), 1.0)),
    "class": (lambda w: nn.Parameter, lambda found, w, h: h * 2 if type(w) is found else h),
    "class of a result": (lambda w: Tensor, lambda found, w, h: h * 2 if type(h) is found else h),
    "weak reference": (lambda w: weakref.ref(w), lambda found, w, h: h * 2 if found() is w else h),
    "changes": (lambda w: w, lambda found, w, h: h * (1 + found._version)),
}


@pytest.mark.parametrize("strategy", ("layer", pytest.param("feature", marks=pytest.mark.slow)))
@pytest.mark.parametrize("case", FOUND)
def test_a_parameter_is_itself_wherever_it_is_found(case: str, strategy: str) -> None:
    plain, net = Aside(*FOUND[case]), Aside(*FOUND[case])
    parted = gp.partition(net, 2, strategy=strategy)
    x = torch.randn(3, 4)
    for call in range(2):
        results = []
        for one, called in ((plain, plain), (net, parted)):
            with torch.no_grad():
                one.a.weight.add_(call)
            result = called(x)
            result.sum().backward()
            results.append((result, [p.grad for p in one.parameters()]))
        torch.testing.assert_close(results[1], results[0])


class Recurrent(nn.Module):
    """Two recurrent layers, which find their parameters by ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTM(4, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The states; shape (samples, 3, 4)."""
        return self.b(self.a(x)[0])[0]


@pytest.mark.parametrize("name", ("gpt2", "resnet", "lstm"))
def test_models_that_ask_nothing_are_traced_whole(name: str) -> None:
    sample = MODELS[name](2)
    parted = gp.partition(sample.model, 2, strategy="layer")
    parted(*sample.args, **sample.kwargs)
    assert not parted.coverage.breaks
    recurrent = gp.partition(Recurrent(), 2, strategy="layer")
    recurrent(torch.randn(2, 3, 4))
    assert not recurrent.coverage.breaks


class Stateful(nn.Module):
    """Two layers, and between them what an object with a state of its own gives."""

    def __init__(self, make: Callable[[], Any], draw: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept, self.draw = make(), draw

    def forward(self, x: Tensor) -> Tensor:
        """The layers; shape (samples, 4)."""
        return self.b(self.draw(self.kept, self.a(x)))


def _moved(kept: Any, h: Tensor) -> Tensor:
    kept.move_to_end(next(iter(kept)))
    return h * next(iter(kept.values()))


def _grown(kept: Any, h: Tensor) -> Tensor:
    found = kept(2)
    found.append(1.0)
    return h * sum(found)


def _met(kept: Any, h: Tensor) -> Tensor:
    kept.add(uuid.UUID(int=len(kept) + 1))
    return h * len(kept)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "own uniform": (lambda: random.Random(1), lambda kept, h: h * kept.uniform(1, 2)),
    "own number": (lambda: random.Random(1), lambda kept, h: h * kept.randint(1, 9)),
    "own coin": (lambda: random.Random(1), lambda kept, h: h * 2 if kept.random() < 0.5 else h),
    "new generator": (lambda: None, lambda kept, h: h * random.Random(7).random()),
    "Python's uniform": (lambda: None, lambda kept, h: h * random.uniform(1, 2)),
    "Python's numbers": (lambda: None, lambda kept, h: h * random.randint(1, 9) + random.uniform(0, 1)),
    "order": (lambda: collections.OrderedDict(a=1.0, b=2.0, c=3.0), _moved),
    "cached list": (lambda: functools.lru_cache(lambda _: [0.5]), _grown),
    "set of objects": (set, _met),
    "number of a tensor": (lambda: torch.ones(2), lambda kept, h: (kept.add_(1), h * kept[0].item())[1]),
}


@pytest.mark.parametrize(
    "case", [case if case == "own coin" else pytest.param(case, marks=pytest.mark.slow) for case in STATES]
)
def test_an_object_with_a_state_goes_on(case: str) -> None:
    found = []
    for is_plain in (True, False):
        random.seed(5)
        net = Stateful(*STATES[case])
        called = net if is_plain else gp.partition(net, 2, strategy="layer")
        torch.manual_seed(1)
        found.append([called(torch.randn(3, 4)).detach() for _ in range(3)] + [torch.tensor(random.random())])
    torch.testing.assert_close(found[1], found[0])


def test_a_function_that_keeps_its_results_stays_in_the_graph() -> None:
    @functools.lru_cache
    def positions(number: int) -> Tensor:
        return torch.arange(number, dtype=torch.float32)

    @functools.lru_cache
    def width(number: int) -> int:
        return number // 2

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) * positions(x.shape[1])
            return self.b(h[:, : width(h.shape[1])])

    parted, x = gp.partition(Cached(), 2, strategy="layer"), torch.randn(3, 4)
    for _ in range(2):
        torch.testing.assert_close(parted(x), Cached()(x))
    assert parted.coverage.share == 1.0 and not parted.coverage.breaks
    assert type(positions(4)) is Tensor
    positions(4).add_(1)
    torch.testing.assert_close(parted(x), Cached()(x))
