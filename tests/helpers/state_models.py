"""Small models that read, change and stop what a state case says, and what may happen to them between calls."""

from __future__ import annotations

import functools
import os
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers import state_effects
from tests.helpers.state_effects import EFFECTS, STOPS
from tests.helpers.state_values import KINDS, PLACES, WIDTH

INPUTS = 4


@dataclass(frozen=True)
class Spec:
    """What one module does beside its layer; empty names stand for nothing.

    Attributes:
        kind: of a value that it reads.
        place: where that lives.
        effect: what it changes.
        stop: how it keeps a gradient out.
    """

    kind: str = ""
    place: str = ""
    effect: str = ""
    stop: str = ""

    def __str__(self) -> str:
        parts = [
            f"reads {self.kind} in {self.place}" if self.kind else "",
            f"changes {self.effect}" * bool(self.effect),
        ]
        return ", ".join([p for p in parts if p] + [f"stops by {self.stop}"] * bool(self.stop)) or "plain"


@dataclass(frozen=True)
class Names:
    """What a model calls its parts.

    Attributes:
        child: the module below.
        buffer: a buffer.
        parameter: a parameter.
    """

    child: str = "below"
    buffer: str = "shift"
    parameter: str = "gain_of"


class Host(nn.Module):
    """A layer with what its mixins add, and a module below."""

    names: Names
    looks = ""

    def __init__(self, names: Names, below: nn.Module | None, width: int = WIDTH) -> None:
        super().__init__()
        self.names = names
        self.lin = nn.Linear(width, WIDTH)
        self.register_buffer(names.buffer, torch.linspace(0.5, 1.5, WIDTH))
        self.register_parameter(names.parameter, nn.Parameter(torch.linspace(1.0, 0.5, WIDTH)))
        if below is not None:
            self.add_module(names.child, below)

    def through(self, h: Tensor, given: Any) -> Tensor:
        """All that a module does."""
        h = torch.tanh(self.lin(h)) * getattr(self, self.names.parameter) + getattr(self, self.names.buffer)
        h = self.use(h, self.held(given))
        h = self.stop(h)
        if self.names.child in self._modules:
            h = getattr(self, self.names.child)(h, given)
        return self.finish(self.keep(h))

    def forward(self, h: Tensor, given: Any = None) -> Tensor:
        """A layer."""
        return self.through(h, given)

    def held(self, given: Any) -> Any:
        """What is read."""
        return None

    def use(self, h: Tensor, value: Any) -> Tensor:
        """What is made of it."""
        return h

    def stop(self, h: Tensor) -> Tensor:
        """What has no gradient."""
        return h

    def keep(self, h: Tensor) -> Tensor:
        """What is changed."""
        return h

    def finish(self, h: Tensor) -> Tensor:
        """A method that may be patched."""
        return h


class Root(Host):
    """A model of several layers: what is read of its arguments' memory is said by ``looks``."""

    def __init__(self, names: Names, below: nn.Module | None, looks: str) -> None:
        super().__init__(names, below, INPUTS)
        self.looks = looks
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.outlet = nn.Linear(WIDTH, INPUTS)

    def forward(self, x: Tensor, y: Tensor | None = None, given: Any = None) -> Tensor:
        """The model's result."""
        h = x if y is None else x + 0.5 * y
        if self.looks == "stride":
            h = h * 2 if x.is_contiguous() else h
        elif self.looks == "alias":
            h = h * 2 if y is x else h
        elif self.looks == "in place" and y is not None and not x.requires_grad:
            x.add_(1.0)
            h = h + y
        h = self.through(h, given)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.outlet(self.norm(h))


class Loss:
    """A loss function with what its mixins read."""

    def __call__(self, result: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return self.use((result - target).pow(2).mean(-1, keepdim=True).expand(-1, WIDTH), self.held(None)).mean()

    held, use = Host.held, Host.use


class LossModule(Loss, nn.Module):
    """The same as a module."""

    def forward(self, result: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        return Loss.__call__(self, result, target)

    __call__ = nn.Module.__call__


@functools.cache
def class_of(base: type, spec: Spec) -> type[Any]:
    """A class with the mixins of a spec; the same for the same."""
    mixins = [
        table[name]
        for table, name in ((KINDS, spec.kind), (PLACES, spec.place), (EFFECTS, spec.effect), (STOPS, spec.stop))
        if name
    ]
    return type(f"{base.__name__}Case", (*mixins, base), {})


def reset(classes: list[type[Any]], seed: int) -> None:
    """What outlives a model is as it was before any."""
    for one in classes:
        for name in [n for n in vars(one) if n in ("finish", "shared", "number_of_calls")]:
            delattr(one, name)
    state_effects.TICKS = 0
    os.environ.pop(state_effects.TIMES, None)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def built(root: Spec, body: Spec, core: Spec, names: Names, looks: str) -> tuple[nn.Module, list[Any]]:
    """A model, and its modules that specs are about, the root first."""
    hosts: list[Any] = [class_of(Host, core)(Names(), None)]
    hosts.insert(0, class_of(Host, body)(Names(buffer=names.buffer), hosts[0]))
    hosts.insert(0, class_of(Root, root)(names, hosts[0], looks))
    for host, spec in zip(hosts, (root, body, core), strict=True):
        host.double()
        if spec.stop:
            host.side = nn.Linear(WIDTH, WIDTH).double()
        if spec.effect:
            host.set_up()
        if spec.kind:
            host.put(host.values()[0])
    return hosts[0], hosts


# --- what happens to a model between calls ----------------------------------------------------------------------------

Event = Callable[[Any, list[Any], list[Any]], None]
"""Of a model, its modules (see :func:`built`), and a list for handles of hooks of all modules."""


def _linear(width: int = WIDTH, seed: int = 5) -> nn.Linear:
    made = nn.Linear(WIDTH, width).double()
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, seed / 3, made.weight.numel()).view_as(made.weight))
    return made


def _toggled(net: Any, hosts: list[Any], _: list[Any]) -> None:
    hosts[1].lin.weight.requires_grad_(not hosts[1].lin.weight.requires_grad)


def _buffer_replaced(net: Any, hosts: list[Any], _: list[Any]) -> None:
    name = hosts[1].names.buffer
    setattr(hosts[1], name, getattr(hosts[1], name) * 1.3 + 1)


def _filled(net: Any, hosts: list[Any], _: list[Any]) -> None:
    with torch.no_grad():
        net.outlet.weight.mul_(1.3)
        getattr(hosts[-1], hosts[-1].names.buffer).add_(0.2)


def _extended(net: Any, hosts: list[Any], _: list[Any]) -> None:
    net.layers.append(_linear(seed=len(net.layers)))


def _shortened(net: Any, hosts: list[Any], _: list[Any]) -> None:
    del net.layers[-1]


def _reordered(net: Any, hosts: list[Any], _: list[Any]) -> None:
    net.layers.insert(0, _linear(seed=9)) if len(net.layers) < 2 else net.layers.__setitem__(0, net.layers[-1])


def _changes(module: nn.Module, given: Any, result: Tensor) -> Tensor:
    return result * 1.5


def _looks(module: nn.Module, given: Any, result: Tensor) -> None:
    if not hasattr(module, "looked"):
        module.looked = []
    module.looked.append(result.detach().clone())


def _hooked(net: Any, hosts: list[Any], handles: list[Any]) -> None:
    handles.append(hosts[1].register_forward_hook(_changes))


def _unhooked(net: Any, hosts: list[Any], handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _patched(net: Any, hosts: list[Any], _: list[Any]) -> None:
    net.layers[0].forward = types.MethodType(lambda self, h: h * 2 + self.bias, net.layers[0])


def _tied(net: Any, hosts: list[Any], _: list[Any]) -> None:
    net.layers[0].weight = hosts[-1].lin.weight


def _loaded(net: Any, hosts: list[Any], _: list[Any]) -> None:
    net.load_state_dict({name: value * 1.1 for name, value in net.state_dict().items()})


def _global_hook(net: Any, hosts: list[Any], handles: list[Any]) -> None:
    handles.append(
        nn.modules.module.register_module_forward_hook(
            lambda m, _, out: out * 2 if isinstance(m, nn.LayerNorm) else None
        )
    )


EVENTS: dict[str, Event] = {
    "freeze": _toggled,
    "parameter": lambda net, *_: setattr(net.outlet, "bias", nn.Parameter(torch.ones(INPUTS).double())),
    "parameter data": lambda net, *_: setattr(net.outlet.weight, "data", net.outlet.weight.data * 0.5),
    "buffer": _buffer_replaced,
    "filled": _filled,
    "eval": lambda net, *_: net.eval(),
    "train": lambda net, *_: net.train(),
    "body eval": lambda _, hosts, __: hosts[1].eval(),
    "eps": lambda net, *_: setattr(net.norm, "eps", net.norm.eps + 0.5),
    "layers extended": _extended,
    "layers shortened": _shortened,
    "layers reordered": _reordered,
    "outlet": lambda net, *_: setattr(net, "outlet", _linear(INPUTS)),
    "norm": lambda net, *_: setattr(net, "norm", nn.Identity()),
    "hook": _hooked,
    "pre-hook": lambda _, hosts, handles: handles.append(
        hosts[-1].register_forward_pre_hook(lambda m, given: (given[0] + 1, *given[1:]))
    ),
    "hook with kwargs": lambda _, hosts, handles: handles.append(
        hosts[1].register_forward_hook(lambda m, args, kwargs, out: out - 1, with_kwargs=True)
    ),
    "onlooking hook": lambda _, hosts, handles: handles.append(hosts[1].register_forward_hook(_looks)),
    "global hook": _global_hook,
    "unhooked": _unhooked,
    "forward": _patched,
    "class": lambda _, hosts, __: setattr(type(hosts[1]), "finish", lambda self, h: h * 2 + 1),
    "tied": _tied,
    "loaded": _loaded,
}
