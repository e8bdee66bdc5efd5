"""What a forward reads, and where that lives: kinds of values and places, to be combined as mixins of one class."""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 6


# --- kinds of values ------------------------------------------------------------------------------------------------


class Kind:
    """A kind of value: ``values`` gives fresh ones, the first of them what a model starts with.

    Attributes:
        mutate: changes a value in place, where that is possible.
    """

    mutate: ClassVar[Callable[[Any], None] | None] = None

    @staticmethod
    def values() -> list[Any]:
        """Values to go through."""
        raise NotImplementedError

    def use(self, h: Tensor, value: Any) -> Tensor:
        """What a forward makes of a value."""
        raise NotImplementedError


class Color(enum.Enum):
    """Two ways."""

    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    """Two numbers."""

    LOW = 2
    HIGH = 3


@dataclass
class Config:
    """A mutable configuration."""

    scale: float = 1.0
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Frozen:
    """An immutable one."""

    scale: Any = 1.0


Pair = collections.namedtuple("Pair", "scale shift")


class Scaler:
    """An object that is called, with a property."""

    def __init__(self, by: float) -> None:
        self.by = by

    @property
    def doubled(self) -> float:
        return 2 * self.by

    def __call__(self, h: Tensor) -> Tensor:
        return h * self.doubled

    def shift(self, h: Tensor) -> Tensor:
        """A method to be held."""
        return h + self.by


def kind(values: Callable[[], list[Any]], use: Callable[..., Any], mutate: Any = None) -> type[Kind]:
    """A kind of a line."""
    made = {"values": staticmethod(values), "use": use, "mutate": staticmethod(mutate) if mutate else None}
    return type("Kind", (Kind,), made)


def _typed(self: Any, h: Tensor, v: Any) -> Tensor:
    if isinstance(v, bool):
        return h * 3
    return h / v if isinstance(v, float) else h * v


def _looped(self: Any, h: Tensor, v: int) -> Tensor:
    for i in range(v):
        h = torch.tanh(h + i)
    return h


def _named(self: Any, h: Tensor, v: str) -> Tensor:
    return h.neg() if v == "neg" else getattr(torch, v)(h)


def _colored(self: Any, h: Tensor, v: Color) -> Tensor:
    return h * 2 if v is Color.RED else -h


def _configured(self: Any, h: Tensor, v: Config) -> Tensor:
    return h * v.scale + len(v.names)


def _rescaled(v: Config) -> None:
    v.scale = 7.0


def _fill_first(v: list[Tensor]) -> None:
    v[0].fill_(0.3)


def _by_items(self: Any, h: Tensor, v: dict[str, float]) -> Tensor:
    for name, by in v.items():
        h = h * by + (1.0 if name == "bias" else 0.0)
    return h


def _by_set(self: Any, h: Tensor, v: Any) -> Tensor:
    return h * len(v) + (1.0 if 2 in v else 0.0)


def _maybe(self: Any, h: Tensor, v: Any) -> Tensor:
    return h if v is None else h * v


def _by_each(self: Any, h: Tensor, v: Any) -> Tensor:
    return sum((h * by for by in v), torch.zeros_like(h))


def _by_array(self: Any, h: Tensor, v: Any) -> Tensor:
    return h * torch.from_numpy(v)


def _cast(self: Any, h: Tensor, v: torch.dtype) -> Tensor:
    return (h * 3).to(v).to(h.dtype) + torch.finfo(v).bits


def _scalar(by: float) -> Callable[[Tensor], Tensor]:
    return lambda h: h * by


def _linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, WIDTH).double()


def _full(*numbers: float) -> Callable[[], list[Any]]:
    return lambda: [torch.full((WIDTH,), x, dtype=torch.float64) for x in numbers]


KINDS: dict[str, type[Kind]] = {
    "bool": kind(lambda: [False, True], lambda self, h, v: h * 2 if v else h),
    "int": kind(lambda: [1, 2, 3], _looped),
    "float": kind(lambda: [1.0, 0.3, 2.5], lambda self, h, v: h * v),
    "float sign": kind(lambda: [0.0, -0.0, float("inf")], lambda self, h, v: h.new_full((1,), v).atan2(-h.exp()) + h),
    "number type": kind(lambda: [2, 2.0, True, 1, 1.0], _typed),
    "complex": kind(lambda: [1j, 2 + 0j], lambda self, h, v: h * (v * v).real),
    "str": kind(lambda: ["tanh", "neg", "sigmoid"], _named),
    "bytes": kind(lambda: [b"a", b"abc"], lambda self, h, v: h * len(v)),
    "none": kind(lambda: [None, 2.0, 0.0], _maybe),
    "enum": kind(lambda: [Color.RED, Color.BLUE], _colored),
    "int enum": kind(lambda: [Level.LOW, Level.HIGH], lambda self, h, v: h * int(v)),
    "dataclass": kind(lambda: [Config(), Config(0.5), Config(1.0, ("a", "b"))], _configured, _rescaled),
    "namespace": kind(
        lambda: [types.SimpleNamespace(u=1.0), types.SimpleNamespace(u=0.4)],
        lambda self, h, v: h * v.u,
        lambda v: setattr(v, "u", 5.0),
    ),
    "named tuple": kind(lambda: [Pair(1.0, 0.0), Pair(1.0, 2.0)], lambda self, h, v: h * v.scale + v.shift),
    "tuple": kind(lambda: [(1.0, 2.0), (1.0,), (2.0, 1.5)], _by_each),
    "list": kind(lambda: [[1.0, 2.0], [1.0], [0.5, 0.7]], _by_each, lambda v: v.append(3.0)),
    "deque": kind(lambda: [collections.deque([1.0]), collections.deque([0.3])], _by_each, lambda v: v.append(2.0)),
    "dict": kind(lambda: [{"w": 2.0}, {"w": 1.0, "bias": 3.0}], _by_items, lambda v: v.update(w=0.1)),
    "dict order": kind(
        lambda: [{"w": 2.0, "bias": 3.0}, {"bias": 3.0, "w": 2.0}], _by_items, lambda v: v.update(w=v.pop("w"))
    ),
    "ordered dict": kind(
        lambda: [collections.OrderedDict(w=2.0, bias=3.0), collections.OrderedDict(bias=3.0, w=2.0)],
        _by_items,
        lambda v: v.move_to_end("w"),
    ),
    "default dict": kind(
        lambda: [collections.defaultdict(float, w=2.0), collections.defaultdict(float, w=0.5)],
        _by_items,
        lambda v: v.update(bias=2.0),
    ),
    "set": kind(lambda: [{1, 2}, {1}, {1, 3}], _by_set, lambda v: v.add(9)),
    "frozenset": kind(lambda: [frozenset({1, 2}), frozenset({1, 3})], _by_set),
    "dtype": kind(lambda: [torch.float64, torch.float32], _cast),
    "size": kind(lambda: [torch.Size([2]), torch.Size([3, 2])], lambda self, h, v: h * h.new_ones(v).sum()),
    "device": kind(
        lambda: [torch.device("cpu"), torch.device("meta")], lambda self, h, v: h * 2 if v.type == "cpu" else h
    ),
    "range": kind(lambda: [range(2), range(3), range(0, 3, 2)], _by_each),
    "slice": kind(lambda: [slice(0, 3), slice(1, 6, 2)], lambda self, h, v: h + h[:, v].sum(1, keepdim=True)),
    "numpy scalar": kind(lambda: [np.float64(1.0), np.float64(0.3)], lambda self, h, v: h * float(v)),
    "numpy number": kind(lambda: [np.float32(1.5), np.int64(2), np.bool_(True)], lambda self, h, v: h * v),
    "numpy array": kind(lambda: [np.ones(WIDTH), np.full(WIDTH, 0.3)], _by_array, lambda v: v.fill(0.2)),
    "function": kind(lambda: [F.gelu, torch.tanh, F.silu], lambda self, h, v: v(h)),
    "lambda": kind(lambda: [_scalar(1.0), _scalar(0.2), lambda h: h + 1], lambda self, h, v: v(h)),
    "partial": kind(
        lambda: [functools.partial(F.leaky_relu, negative_slope=s) for s in (0.1, 0.9)], lambda self, h, v: v(h)
    ),
    "object": kind(lambda: [Scaler(1.0), Scaler(0.4)], lambda self, h, v: v(h), lambda v: setattr(v, "by", 3.0)),
    "method": kind(lambda: [Scaler(1.0).shift, Scaler(0.4).shift], lambda self, h, v: v(h)),
    "class": kind(lambda: [nn.ReLU, nn.Tanh], lambda self, h, v: v()(h)),
    "tensor": kind(_full(1.0, 0.3, 2.0), lambda self, h, v: h * v, lambda v: v.mul_(1.5)),
    "tensor shape": kind(
        lambda: [torch.ones(WIDTH).double(), torch.ones(1).double(), torch.ones(1, 1).double() * 2],
        lambda self, h, v: h * v / v.numel(),
    ),
    "trainable tensor": kind(
        lambda: [torch.ones(WIDTH).double().requires_grad_(), torch.ones(WIDTH).double()], lambda self, h, v: h * v
    ),
    "tensors": kind(
        lambda: [[torch.ones(WIDTH).double()], [torch.ones(WIDTH).double() * 2] * 2], _by_each, _fill_first
    ),
    "tensor by name": kind(
        lambda: [{"w": torch.ones(WIDTH).double()}, {"w": torch.ones(WIDTH).double() * 2, "bias": torch.ones(1)}],
        _by_items,
        lambda v: v["w"].fill_(0.3),
    ),
    "module": kind(lambda: [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.3)], lambda self, h, v: v(h)),
    "trainable module": kind(lambda: [_linear(1), _linear(2), nn.Tanh()], lambda self, h, v: v(h)),
    "nested": kind(
        lambda: [{"a": [Config(), 1.0]}, {"a": [Config(2.0), 1.0]}],
        lambda self, h, v: h * v["a"][0].scale * v["a"][1],
        lambda v: setattr(v["a"][0], "scale", 0.3),
    ),
}


# --- places ---------------------------------------------------------------------------------------------------------


@dataclass
class Box:
    """An object that holds something."""

    value: Any = None
    more: dict[str, Any] = field(default_factory=dict)

    def get(self) -> Any:
        """A method to be held."""
        return self.value


class Slotted:
    """One without a dictionary."""

    __slots__ = ("value",)


class Place:
    """Where a value lives: ``put`` sets it, ``held`` is how a forward reads it, ``drop`` takes it away first."""

    def put(self, value: Any) -> None:
        """Set the value."""
        raise NotImplementedError

    def held(self, given: Any) -> Any:
        """Read it; ``given`` is what the call was given besides."""
        raise NotImplementedError

    def drop(self) -> None:
        """Take it away."""


HELD: Any = None
ELSEWHERE = types.ModuleType("elsewhere")
CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("held")


def _set_global(self: Any, value: Any) -> None:
    global HELD
    HELD = value


def _in_closure(self: Any, value: Any) -> None:
    if not hasattr(self, "setter"):
        cell = None

        def getter() -> Any:
            return cell

        def setter(new: Any) -> None:
            nonlocal cell
            cell = new

        self.getter, self.setter = getter, setter
    self.setter(value)


def _in_default(self: Any, value: Any) -> None:
    if not hasattr(self, "getter"):

        def getter(held: Any = None, *, named: Any = None) -> Any:
            return held if named is None else named

        self.getter = getter
    self.getter.__defaults__ = (value,)


def _in_kw_default(self: Any, value: Any) -> None:
    _in_default(self, None)
    self.getter.__kwdefaults__ = {"named": value}


def _tried(table: dict[str, Any]) -> Any:
    try:
        return table["v"]
    except KeyError:
        return None


def _in_function_attribute(self: Any, value: Any) -> None:
    if not hasattr(self, "getter"):

        def getter() -> None:
            return None

        self.getter = getter
    self.getter.value = value


def _in_slots(self: Any, value: Any) -> None:
    self.slotted = getattr(self, "slotted", None) or Slotted()
    self.slotted.value = value


def _in_box(self: Any, value: Any) -> None:
    if not hasattr(self, "box"):
        self.box = Box(Box())
    self.box.more["v"] = [value]
    self.box.value.value = value


def _in_frozen(self: Any, value: Any) -> None:
    self.frozen = replace(getattr(self, "frozen", Frozen()), scale=value)


def _in_table(self: Any, value: Any) -> None:
    if not hasattr(self, "table"):
        self.table = {"v": value}
    self.table["v"] = value


def _in_items(self: Any, value: Any) -> None:
    if not hasattr(self, "items"):
        self.items = [0, value]
    self.items[1] = value


def _on_neighbour(self: Any, value: Any) -> None:
    if not hasattr(self, "neighbours"):
        self.neighbours = [nn.Identity()]  # in a list, so no submodule
    self.neighbours[0].value = value


def place(put: Callable[..., None], held: Callable[..., Any], drop: Any = None, **more: Any) -> type[Place]:
    """A place of a line."""
    found = {"put": put, "held": held, **({"drop": drop} if drop else {}), **more}
    return type("Place", (Place,), found)


PLACES: dict[str, type[Place]] = {
    "attribute": place(
        lambda self, v: setattr(self, "value", v), lambda self, _: self.value, lambda self: delattr(self, "value")
    ),
    "getattr": place(lambda self, v: setattr(self, "v1", v), lambda self, _: getattr(self, f"v{1}")),
    "hasattr": place(
        lambda self, v: setattr(self, "value", v),
        lambda self, _: self.value if hasattr(self, "value") else None,
        lambda self: delattr(self, "value"),
    ),
    "object": place(_in_box, lambda self, _: self.box.value.value),
    "method of object": place(_in_box, lambda self, _: self.box.value.get()),
    "list in dict": place(_in_box, lambda self, _: self.box.more["v"][0]),
    "dict": place(_in_table, lambda self, _: self.table["v"], lambda self: self.table.pop("v")),
    "dict get": place(_in_table, lambda self, _: self.table.get("v"), lambda self: self.table.clear()),
    "list": place(_in_items, lambda self, _: self.items[-1], lambda self: self.items.append(None)),
    "tuple": place(lambda self, v: setattr(self, "pair", (0, v)), lambda self, _: self.pair[1]),
    "frozen dataclass": place(_in_frozen, lambda self, _: self.frozen.scale),
    "slots": place(_in_slots, lambda self, _: self.slotted.value),
    "global": place(_set_global, lambda self, _: HELD),
    "other module": place(lambda self, v: setattr(ELSEWHERE, "value", v), lambda self, _: ELSEWHERE.value),
    "closure": place(_in_closure, lambda self, _: self.getter()),
    "default": place(_in_default, lambda self, _: self.getter()),
    "keyword default": place(_in_kw_default, lambda self, _: self.getter()),
    "function attribute": place(_in_function_attribute, lambda self, _: self.getter.value),
    "lambda": place(lambda self, v: setattr(self, "getter", lambda: v), lambda self, _: self.getter()),
    "partial": place(
        lambda self, v: setattr(self, "getter", functools.partial(_same, v)), lambda self, _: self.getter()
    ),
    "bound method": place(lambda self, v: setattr(self, "getter", Box(v).get), lambda self, _: self.getter()),
    "class": place(lambda self, v: setattr(type(self), "shared", v), lambda self, _: self.shared),
    "type": place(lambda self, v: setattr(type(self), "shared", v), lambda self, _: type(self).shared),
    "property": place(
        lambda self, v: setattr(self, "_level", v),
        lambda self, _: self.level,
        level=property(lambda self: self._level),
    ),
    "neighbour": place(_on_neighbour, lambda self, _: self.neighbours[0].value),
    "context variable": place(lambda self, v: CONTEXT.set(v), lambda self, _: CONTEXT.get()),
    "environment": place(
        lambda self, v: os.environ.__setitem__("STATE_CASE", v), lambda self, _: os.environ["STATE_CASE"]
    ),
    "argument": place(lambda self, v: setattr(self, "to_give", v), lambda self, given: given),
    "own dictionary": place(
        lambda self, v: setattr(self, "value", v),
        lambda self, _: vars(self).get("value"),
        lambda self: delattr(self, "value"),
    ),
    "class or not": place(
        lambda self, v: setattr(type(self), "shared", v),
        lambda self, _: getattr(type(self), "shared", None),
        lambda self: delattr(type(self), "shared"),
    ),
    "function or not": place(
        _in_function_attribute,
        lambda self, _: getattr(self.getter, "value", None),
        lambda self: delattr(self.getter, "value"),
    ),
    "other module or not": place(
        lambda self, v: setattr(ELSEWHERE, "value", v),
        lambda self, _: getattr(ELSEWHERE, "value", None),
        lambda self: delattr(ELSEWHERE, "value"),
    ),
    "dict or not": place(_in_table, lambda self, _: _tried(self.table), lambda self: self.table.pop("v")),
    "environment or not": place(
        lambda self, v: os.environ.__setitem__("STATE_CASE", v),
        lambda self, _: os.environ.get("STATE_CASE"),
        lambda self: os.environ.pop("STATE_CASE"),
    ),
}

GIVEN = ("bool", "int", "float", "number type", "str", "none", "dtype", "tuple", "tensor", "tensors", "dataclass")
"""Kinds of arguments that a call takes."""

NOT_CLASS_ATTRIBUTES = ("function", "lambda", "partial", "property")
"""Functions as attributes of a class are methods, which take the module too."""


def _same(value: Any) -> Any:
    return value


def is_possible(kind_name: str, place_name: str) -> bool:
    """Whether a value of the kind can live there."""
    if place_name in ("environment", "environment or not"):
        return kind_name == "str"
    if place_name == "argument":
        return kind_name in (
            "bool",
            "int",
            "float",
            "number type",
            "str",
            "none",
            "dtype",
            "tuple",
            "tensor",
            "tensors",
        )
    if place_name in ("class", "type", "class or not"):
        return kind_name not in NOT_CLASS_ATTRIBUTES
    return True
