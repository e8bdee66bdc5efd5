"""What a call has to do with beside its arguments: classes, modules, functions, and what they hold."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphpart.trace.tree import CONSTANTS


@dataclass
class Surroundings:
    """What a call has to do with beside its arguments.

    Attributes:
        classes: by identity, as all below.
        modules: of the model.
        functions: those with defaults.
        scopes: what modules, functions and globals hold.
        cached: calls of functions that keep their results, with these.
        aside: tensors that are found elsewhere than on a module.
        asks: whether it asks for the class of a tensor.
    """

    classes: dict[int, type] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    scopes: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    cached: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    aside: list[torch.Tensor] = field(default_factory=list)
    asks: bool = False

    @staticmethod
    def of(output: Any) -> Surroundings:
        """Those of the call being compiled."""
        found: Surroundings = vars(output).setdefault("graphpart_surroundings", Surroundings())
        return found

    def add(self, value: Any) -> None:
        """Note an object that the call meets."""
        if isinstance(value, (types.ModuleType, types.FunctionType)):
            self.scopes[id(vars(value))] = vars(value)
            if isinstance(value, types.FunctionType) and (value.__defaults__ or value.__kwdefaults__):
                self.functions[id(value)] = value
            return
        if isinstance(value, nn.Module):
            self.modules[id(value)] = value
        for cls in value.__mro__ if isinstance(value, type) else type(value).__mro__:
            if not cls.__flags__ & _IMMUTABLE:
                self.classes[id(cls)] = cls

    def guard(self, names: frozenset[str]) -> Callable[[Any], bool]:
        """Whether all is still found as it is now, of these names; called before each call, so that it is flat."""
        in_class = names | _SPECIAL
        members = [vars(cls) for cls in self.classes.values()]
        scopes = [*self.scopes.values(), *members]
        sizes = list(map(len, scopes))
        of_class = [False] * len(self.scopes) + [True] * len(members)
        present = [
            (in_class if special else names) & scope.keys() for scope, special in zip(scopes, of_class, strict=True)
        ]
        methods = [(scope, name) for scope in members for name in in_class & scope.keys() if _is_method(scope[name])]
        gets, keys = [scope.get for scope, _ in methods], [name for _, name in methods]
        values = [scope[name] for scope, name in methods]
        # A guard lives as long as the code does, and no model is kept for it.
        modules, kinds = list(map(weakref.ref, self.modules.values())), list(map(type, self.modules.values()))
        functions, defaults = (
            list(map(weakref.ref, self.functions.values())),
            list(map(_DEFAULTS, self.functions.values())),
        )
        cached = tuple(self.cached)

        def holds(_: Any) -> bool:
            if list(map(len, scopes)) != sizes:
                for i, scope in enumerate(scopes):
                    if (in_class if of_class[i] else names) & scope.keys() != present[i]:
                        return False
                    sizes[i] = len(scope)
            return (
                list(map(operator.call, gets, keys)) == values
                and all(map(_is_of, modules, kinds))
                and all(map(_has_defaults, functions, defaults))
                and all(_gives(*call) for call in cached)
            )

        return holds


_IMMUTABLE = 1 << 8
"""The flag of classes that nobody can change, as Python has it."""

_SPECIAL = frozenset(name for owner in (int, dict, type) for name in dir(owner) if name.startswith("__")) | {
    "__bool__", "__enter__", "__exit__", "__get__", "__getattr__", "__next__", "__set__", "__torch_function__",
    "forward",
}  # fmt: skip
"""Methods that are called without being named, by which it is told what an object can."""

_METHODS = (types.FunctionType, property, classmethod, staticmethod, functools.partialmethod, functools.cached_property)
_DEFAULTS = operator.attrgetter("__defaults__", "__kwdefaults__")


def _is_method(value: Any) -> bool:
    return isinstance(value, _METHODS)


def _is_of(module: Callable[[], Any], kind: type) -> bool:
    found = module()
    return found is None or type(found) is kind


def _has_defaults(function: Callable[[], Any], before: Sequence[Any]) -> bool:
    found = function()  # None once it is gone: what took its place is guarded where it is found
    return found is None or all(map(operator.is_, _DEFAULTS(found), before))


def _gives(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> bool:
    """Whether a function that keeps its results gives what it gave."""
    try:
        value = function(*args, **kwargs)
    except Exception:  # which the call will raise, as it does on one device
        return False
    return value is before or (is_constant(value) and type(value) is type(before) and repr(value) == repr(before))


def is_constant(value: Any) -> bool:
    """Whether nobody can change a value."""
    return all(map(is_constant, value)) if type(value) is tuple else isinstance(value, CONSTANTS)


def names_in(codes: Sequence[types.CodeType]) -> frozenset[str]:
    """What code mentions: attributes, globals, and text that may be a name."""
    found: set[str] = set()
    for code in codes:
        found.update(code.co_names)
        for value in code.co_consts:
            if isinstance(value, str):
                found.add(value)
            elif isinstance(value, types.CodeType):
                found |= names_in([value])
    return frozenset(found)


def sees_stand_ins(output: Any, own: Collection[int]) -> bool:
    """Whether the call being compiled can tell its tensors from others that stand for them while it is exported.

    Args:
        output: TorchDynamo's record of the call.
        own: identities of parameters and buffers.
    """
    found = Surroundings.of(output)
    return found.asks or any(id(tensor) in own for tensor in found.aside)
