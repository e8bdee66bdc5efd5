"""What a forward changes, and how it keeps gradients out: mixins of one class, by name."""

from __future__ import annotations

import collections
import fractions
import functools
import itertools
import os
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.state_values import WIDTH, Box

TICKS = 0


class Effect:
    """Something that a forward changes; ``set_up`` is called once, ``keep`` by the forward."""

    def set_up(self) -> None:
        """Prepare it."""

    def keep(self, h: Tensor) -> Tensor:
        """Change it."""
        raise NotImplementedError


def effect(set_up: Callable[[Any], Any], keep: Callable[[Any, Tensor], Tensor], **more: Any) -> type[Effect]:
    """An effect of a few lines."""
    return type("Effect", (Effect,), {"set_up": set_up, "keep": keep, **more})


def _nothing(self: Any) -> None:
    pass


def _sets(**values: Callable[[], Any]) -> Callable[[Any], None]:
    def set_up(self: Any) -> None:
        for name, make in values.items():
            setattr(self, name, make())

    return set_up


def _registers(name: str, make: Callable[[], Tensor], persistent: bool = True) -> Callable[[Any], None]:
    return lambda self: self.register_buffer(name, make(), persistent)


def _zeros() -> Tensor:
    return torch.zeros(WIDTH, dtype=torch.float64)


def _count_in_own_dictionary(self: Any, h: Tensor) -> Tensor:
    vars(self)["times"] = vars(self).get("times", 0) + 1
    return h * self.times


def _count_in_environment(self: Any, h: Tensor) -> Tensor:
    os.environ[TIMES] = str((int(os.environ.get(TIMES, "0")) + 1) % 4)
    return h * (1 + int(os.environ[TIMES]))


TIMES = "GRAPHPART_TEST_TIMES"


def _count_in_cached(self: Any, h: Tensor) -> Tensor:
    kept = self.kept(1)
    kept.append(0.5)
    return h * sum(kept)


def _counter(self: Any, h: Tensor) -> Tensor:
    self.steps += 1
    return h * (1 + 0.1 * self.steps)


def _unread_counter(self: Any, h: Tensor) -> Tensor:
    self.steps += 1
    return h * 1.5


def _object_counter(self: Any, h: Tensor) -> Tensor:
    self.clock.value += 1
    return h + self.clock.value


def _tensor_counter(self: Any, h: Tensor) -> Tensor:
    self.count += 1
    return h / self.count


def _ema_assigned(self: Any, h: Tensor) -> Tensor:
    self.ema = self.ema * 0.9 + h.detach().mean(0) * 0.1
    return h - self.ema


def _ema_in_place(self: Any, h: Tensor) -> Tensor:
    if self.training:
        self.ema.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h - self.ema


def _ema_copied(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.ema.copy_(torch.lerp(self.ema, h.mean(0), 0.3))
    return h + self.ema


def _ema_by_data(self: Any, h: Tensor) -> Tensor:
    self.ema.data = self.ema.data * 0.5 + h.detach().mean(0)
    return h + self.ema


def _log(self: Any, h: Tensor) -> Tensor:
    self.log.append(h.shape[0])
    return h * len(self.log)


def _log_of_tensors(self: Any, h: Tensor) -> Tensor:
    self.log.append(h.detach().mean())
    return h * 2


def _log_read(self: Any, h: Tensor) -> Tensor:
    self.log.append(h.detach().mean(0))
    return h - torch.stack(self.log[-2:]).mean(0)


def _table(self: Any, h: Tensor) -> Tensor:
    self.table_of["n"] = self.table_of.get("n", 0) + 1
    self.table_of["mean"] = h.detach().mean()
    return h * self.table_of["n"]


def _cache(self: Any, h: Tensor) -> Tensor:
    if self.cached is None:
        self.cached = torch.arange(WIDTH, dtype=h.dtype) / 3
    return h + self.cached


def _cache_by_size(self: Any, h: Tensor) -> Tensor:
    n = h.shape[0]
    if n not in self.caches:
        self.caches[n] = torch.linspace(0, 1, n, dtype=h.dtype)[:, None]
    return h + self.caches[n]


def _register(self: Any, h: Tensor) -> Tensor:
    if not hasattr(self, "late"):
        self.register_buffer("late", torch.zeros(WIDTH, dtype=torch.float64))
    self.late += h.detach().mean(0)
    return h + self.late


def _register_without_change(self: Any, h: Tensor) -> Tensor:
    if "late" not in self._buffers:
        self.register_buffer("late", torch.ones(WIDTH, dtype=torch.float64), persistent=False)
    return h + self.late


def _auxiliary(self: Any, h: Tensor) -> Tensor:
    self.auxiliary = h.pow(2).mean()
    return h


def _features(self: Any, h: Tensor) -> Tensor:
    self.features = h
    self.auxiliary = h.softmax(-1).mean(0).pow(2).sum()
    return torch.tanh(h)


def _by_mode(self: Any, h: Tensor) -> Tensor:
    if self.training:
        self.steps += 1
        return h * 2
    self.last_size = tuple(h.shape)
    return h


def _freezes(self: Any, h: Tensor) -> Tensor:
    self.normed.eval()
    return self.normed(h)


def _own_mode(self: Any, h: Tensor) -> Tensor:
    was = self.normed.training
    self.normed.train(False)
    h = self.normed(h)
    self.normed.train(was)
    return h


def _global_counter(self: Any, h: Tensor) -> Tensor:
    global TICKS
    TICKS += 1
    return h * (1 + 0.1 * TICKS)


def _make_closure(self: Any) -> None:
    number = 0

    def tick() -> int:
        nonlocal number
        number += 1
        return number

    self.tick = tick


def _class_counter(self: Any, h: Tensor) -> Tensor:
    type(self).number_of_calls += 1
    return h + type(self).number_of_calls


def _iterator(self: Any, h: Tensor) -> Tensor:
    return h * next(self.numbers)


def _numbers() -> Iterator[float]:
    yield from (1.0, 0.5, 0.25, 2.0, 3.0, 4.0, 5.0, 6.0)


def _window(self: Any, h: Tensor) -> Tensor:
    self.window.append(float(h.shape[0]))
    return h + sum(self.window)


def _hidden(self: Any, h: Tensor) -> Tensor:
    state = torch.tanh(h.mean(0) + self.hidden)
    self.hidden = state.detach()
    return h + state


def _hidden_or_none(self: Any, h: Tensor) -> Tensor:
    before = h.new_zeros(WIDTH) if self.hidden is None else self.hidden
    self.hidden = (before + h.detach().sum(0)).clamp(-1, 1)
    return h + before


def _seen(self: Any, h: Tensor) -> Tensor:
    first = h.shape[0] not in self.seen
    self.seen.add(h.shape[0])
    return h * 2 if first else h


def _toggles(self: Any, h: Tensor) -> Tensor:
    if hasattr(self, "flag"):
        del self.flag
        return -h
    self.flag = True
    return h


def _finally(self: Any, h: Tensor) -> Tensor:
    self.inside = True
    try:
        return h * 2 if self.inside else h
    finally:
        self.inside = False


def _clips(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.gain.clamp_(-0.5, 0.5)
    return h * self.gain


def _array(self: Any, h: Tensor) -> Tensor:
    self.array[0] += 1
    return h * float(self.array[0])


def _array_of_values(self: Any, h: Tensor) -> Tensor:
    self.array = h.detach().mean(0).numpy()
    return h * 2


def _property(self: Any, h: Tensor) -> Tensor:
    self.degree = self.degree + 1
    return h * self.degree


def _set_degree(self: Any, value: int) -> None:
    self._degree = value


def _replaced_tuple(self: Any, h: Tensor) -> Tensor:
    self.history = (*self.history[-1:], h.shape[0])
    return h + sum(self.history)


def _nested(self: Any, h: Tensor) -> Tensor:
    self.nest["a"].append({"n": len(self.nest["a"])})
    return h + len(self.nest["a"])


def _item(self: Any, h: Tensor) -> Tensor:
    self.last_mean = h.detach().mean().item()
    return h * 2


def _branch(self: Any, h: Tensor) -> Tensor:
    if h.detach().mean() > 0:
        self.ups += 1
        return h * 2
    return h


def _hook_stores(self: Any) -> None:
    self.outputs = []
    self.inner = nn.Tanh()
    self.inner.register_forward_hook(lambda module, given, result: self.outputs.append(result.detach()))


def _hook_counts(self: Any) -> None:
    self.inner, self.steps = nn.Tanh(), 0

    def count(module: nn.Module, given: Any) -> Any:
        self.steps += 1
        return (given[0] * self.steps,)

    self.inner.register_forward_pre_hook(count)


def _through_inner(self: Any, h: Tensor) -> Tensor:
    return self.inner(h)


def _many(self: Any, h: Tensor) -> Tensor:
    self.steps += 1
    self.ema = self.ema + h.detach().mean(0)
    self.log.append(self.steps)
    return h * 2 - self.ema


EFFECTS: dict[str, type[Effect]] = {
    "nothing": effect(_nothing, lambda self, h: h),
    "counter": effect(_sets(steps=int), _counter),
    "counter not read": effect(_sets(steps=int), _unread_counter),
    "counter of object": effect(_sets(clock=lambda: Box(0)), _object_counter),
    "counter in buffer": effect(_registers("count", lambda: torch.zeros((), dtype=torch.long)), _tensor_counter),
    "counter in tensor": effect(_sets(count=lambda: torch.zeros(())), _tensor_counter),
    "global counter": effect(_nothing, _global_counter),
    "counter in closure": effect(_make_closure, lambda self, h: h * self.tick()),
    "counter of class": effect(lambda self: setattr(type(self), "number_of_calls", 0), _class_counter),
    "itertools": effect(_sets(numbers=lambda: itertools.cycle([1.0, 0.5])), _iterator),
    "count": effect(_sets(numbers=lambda: itertools.count(1)), _iterator),
    "generator": effect(_sets(numbers=_numbers), _iterator),
    "average assigned": effect(_registers("ema", _zeros), _ema_assigned),
    "average in place": effect(_registers("ema", _zeros, persistent=False), _ema_in_place),
    "average copied": effect(_registers("ema", _zeros), _ema_copied),
    "average by data": effect(_registers("ema", _zeros), _ema_by_data),
    "average in tensor": effect(_sets(ema=_zeros), _ema_assigned),
    "average in tensor in place": effect(_sets(ema=_zeros), _ema_in_place),
    "list": effect(_sets(log=list), _log),
    "list of tensors": effect(_sets(log=list), _log_of_tensors),
    "list of tensors read": effect(_sets(log=list), _log_read),
    "dict": effect(_sets(table_of=dict), _table),
    "set": effect(_sets(seen=set), _seen),
    "deque": effect(_sets(window=lambda: collections.deque(maxlen=2)), _window),
    "tuple": effect(_sets(history=lambda: (0,)), _replaced_tuple),
    "nested": effect(_sets(nest=lambda: {"a": []}), _nested),
    "cache": effect(_sets(cached=lambda: None), _cache),
    "cache by size": effect(_sets(caches=dict), _cache_by_size),
    "registered": effect(_nothing, _register),
    "registered once": effect(_nothing, _register_without_change),
    "auxiliary loss": effect(_nothing, _auxiliary),
    "features": effect(_nothing, _features),
    "by mode": effect(_sets(steps=int, last_size=lambda: None), _by_mode),
    "freezes": effect(_sets(normed=lambda: nn.BatchNorm1d(WIDTH).double()), _freezes),
    "mode for a while": effect(_sets(normed=lambda: nn.BatchNorm1d(WIDTH).double()), _own_mode),
    "hidden": effect(_sets(hidden=_zeros), _hidden),
    "hidden or none": effect(_sets(hidden=lambda: None), _hidden_or_none),
    "toggle": effect(_nothing, _toggles),
    "finally": effect(_sets(inside=bool), _finally),
    "clipped weight": effect(_sets(gain=lambda: nn.Parameter(_zeros() + 2)), _clips),
    "array": effect(_sets(array=lambda: np.zeros(2)), _array),
    "array of values": effect(_sets(array=lambda: None), _array_of_values),
    "property": effect(_sets(_degree=int), _property, degree=property(lambda self: self._degree, _set_degree)),
    "item": effect(_sets(last_mean=float), _item),
    "branch": effect(_sets(ups=int), _branch),
    "hook stores": effect(_hook_stores, _through_inner),
    "hook counts": effect(_hook_counts, _through_inner),
    "many": effect(lambda self: (_registers("ema", _zeros)(self), _sets(steps=int, log=list)(self)), _many),
    "python random": effect(_nothing, lambda self, h: h * random.random()),
    "python coin": effect(_nothing, lambda self, h: h * 2 if random.random() < 0.5 else -h),
    "python choice": effect(_nothing, lambda self, h: h * random.choice([1.0, 2.0, 3.0])),
    "own random": effect(_sets(rng=lambda: random.Random(3)), lambda self, h: h * self.rng.uniform(1, 2)),
    "own randint": effect(_sets(rng=lambda: random.Random(3)), lambda self, h: h * self.rng.randint(1, 9)),
    "own choice": effect(_sets(rng=lambda: random.Random(3)), lambda self, h: h * self.rng.choice([1.0, 2.0, 3.0])),
    "python uniform": effect(_nothing, lambda self, h: h * random.uniform(0.5, 1.0)),
    "python randint": effect(_nothing, lambda self, h: h * random.randint(1, 9)),
    "own dictionary": effect(_nothing, _count_in_own_dictionary),
    "ordered": effect(
        _sets(order=lambda: collections.OrderedDict(a=1.0, b=2.0, c=3.0)),
        lambda self, h: (self.order.move_to_end(next(iter(self.order))), h * next(iter(self.order.values())))[1],
    ),
    "environment": effect(_nothing, _count_in_environment),
    "cached": effect(_sets(kept=lambda: functools.lru_cache(lambda _: [0.5])), _count_in_cached),
    "set of objects": effect(
        _sets(met=set), lambda self, h: (self.met.add(fractions.Fraction(len(self.met) % 3)), h * len(self.met))[1]
    ),
    "number of a tensor": effect(
        _sets(scale=lambda: torch.ones(3)), lambda self, h: (self.scale.add_(0.5), h * self.scale[0].item())[1]
    ),
    "numpy random": effect(_nothing, lambda self, h: h * float(np.random.rand())),
    "numpy coin": effect(_nothing, lambda self, h: h * 2 if np.random.randint(2) else h),
    "numpy generator": effect(_sets(rng=lambda: np.random.default_rng(3)), lambda self, h: h * self.rng.random()),
    "namespace": effect(
        _sets(space=lambda: types.SimpleNamespace(n=0)), lambda self, h: h * (setattr(self.space, "n", 3) or 2)
    ),
}


# --- ways to keep a gradient out --------------------------------------------------------------------------------------


class Stop:
    """A way to keep a gradient out; ``side`` is a trainable layer."""

    side: nn.Linear

    def stop(self, h: Tensor) -> Tensor:
        """Use the side layer without, or partly without, gradients."""
        raise NotImplementedError


def stop(function: Callable[[Any, Tensor], Tensor]) -> type[Stop]:
    """A way of one function."""
    return type("Stop", (Stop,), {"stop": function})


def _no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        g = self.side(h)
    return h + g


def _no_grad_within(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        g = self.side(h)
        with torch.enable_grad():
            k = torch.tanh(self.side(h))
    return g + k


@torch.no_grad()
def _decorated(self: Any, h: Tensor) -> Tensor:
    return self.side(h)


def _inference(self: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        g = self.side(h.detach())
    return h * g.clone()


def _detach_in_place(self: Any, h: Tensor) -> Tensor:
    return h * self.side(h).detach_()


def _switched(self: Any, h: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    g = self.side(h)
    torch.set_grad_enabled(True)
    return h * g


def _by_training(self: Any, h: Tensor) -> Tensor:
    with torch.set_grad_enabled(self.training):
        g = self.side(h)
    return h + g


def _without_autocast(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        g = self.side(h)
    return h + g


def _penalty(self: Any, h: Tensor) -> Tensor:
    leaf = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(self.side(leaf)).sum(), leaf)
    return h + slope


def _forces(self: Any, h: Tensor) -> Tensor:
    if not h.requires_grad:
        return h
    (slope,) = torch.autograd.grad(torch.tanh(self.side(h)).sum(), h, retain_graph=True)
    return h + slope


def _requires(self: Any, h: Tensor) -> Tensor:
    return h + self.side(h.detach().requires_grad_())


def _norm_without(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        size = self.side.weight.norm()
    return self.side(h) / size


def _checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, h: h + checkpoint(lambda x: torch.tanh(self.side(x)), h, use_reentrant=reentrant)


def _frozen_weight(self: Any, h: Tensor) -> Tensor:
    return torch.nn.functional.linear(h, self.side.weight.detach(), self.side.bias)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter wants a gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    yield
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _frozen_for_a_while(self: Any, h: Tensor) -> Tensor:
    with frozen(self.side):
        g = self.side(h)
    return torch.tanh(g)


STOPS: dict[str, type[Stop]] = {
    "nothing": stop(lambda self, h: h + torch.tanh(self.side(h))),
    "no_grad": stop(_no_grad),
    "enable_grad in no_grad": stop(_no_grad_within),
    "decorated": stop(lambda self, h: h * _decorated(self, h)),
    "inference_mode": stop(_inference),
    "detach": stop(lambda self, h: h * self.side(h).detach()),
    "detach_": stop(_detach_in_place),
    "data": stop(lambda self, h: h * self.side(h).data),
    "data of input": stop(lambda self, h: h + self.side(h.data)),
    "data of weight": stop(lambda self, h: h @ self.side.weight.data),
    "straight through": stop(lambda self, h: h + (h.round() - h).data),
    "set_grad_enabled": stop(_switched),
    "gradients in training": stop(_by_training),
    "no autocast, no_grad": stop(_without_autocast),
    "gradient of a leaf": stop(_penalty),
    "gradient of a value": stop(_forces),
    "requires_grad_": stop(_requires),
    "norm without": stop(_norm_without),
    "checkpoint": stop(_checkpointed(False)),
    "reentrant checkpoint": stop(_checkpointed(True)),
    "weight detached": stop(_frozen_weight),
    "weight frozen": stop(_frozen_for_a_while),
}
