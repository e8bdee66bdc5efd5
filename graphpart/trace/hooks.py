"""Forward hooks of modules: those that change something are traced, those that look on are called after every run.

Tracing runs every hook once, on tensors without values. A hook that returns something, or changes a tensor in place, is
part of the model and becomes part of the graph. Any other only looks: what it was given becomes an output of the
graph, and it is called with the values, in order, once the run is over.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules import module as torch_module

from graphpart.errors import GraphpartError, UnsupportedOperatorError
from graphpart.trace.tree import tensors_of


@dataclass(frozen=True)
class Onlooker:
    """One call of a hook that changes nothing.

    Attributes:
        hook: the user's function.
        module: the module it is registered on.
        name: that module's path.
    """

    hook: Callable[..., Any]
    module: nn.Module
    name: str

    def __call__(self, given: tuple[Any, ...]) -> None:
        """Call the hook with values.

        Raises:
            GraphpartError: if it wants to change them after all.
        """
        if self.hook(self.module, *given) is not None:
            raise GraphpartError(
                f"the forward hook {_called(self.hook)} of module {self.name!r} returns something that depends on "
                "the values of tensors, so it could not be traced; write it with torch.where, or put it into the model"
            )


Looks = list[tuple[Onlooker, tuple[Any, ...]]]
"""Onlookers with what they were given, in the order of the calls."""


def hook_ids(module: nn.Module) -> tuple[int, ...]:
    """What tells one set of a module's forward hooks from another: torch numbers every hook it registers."""
    return (*module._forward_pre_hooks, *module._forward_hooks)


def global_hook_ids() -> tuple[int, ...]:
    """Likewise for the hooks that torch calls for every module."""
    return (*torch_module._global_forward_pre_hooks, *torch_module._global_forward_hooks)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, no forward hook of the user's is there."""
    with _replaced_hooks(model, lambda hook: None if _is_the_users(hook) else hook):
        yield


def has_hooks(model: nn.Module) -> bool:
    """Whether there is a forward hook of the user's."""
    return any(_is_the_users(hook) for registry in _registries(model) for hook in registry.values())


def _is_the_users(hook: Any) -> bool:
    return not _belongs_to_library(hook) and not _computes_weights(hook)


def _registries(model: nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """Where torch keeps forward hooks: those of all modules, and those of the model's; empty ones are left out."""
    found = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
    for module in model.modules():
        found += [module._forward_pre_hooks, module._forward_hooks]
    return [registry for registry in found if registry]


def install_library_hooks(model: nn.Module) -> None:
    """Have transformers put its own hooks on a model, which it otherwise does in the model's first call."""
    library = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(library, "maybe_install_capturing_hooks", None)
    if library is not None and install is not None:
        for module in model.modules():
            if any(layer.__code__.co_filename == library.__file__ for layer in _layers_of(type(module).forward)):
                install(module)


def _layers_of(function: Any) -> Iterator[types.FunctionType]:
    """A function and those it is wrapped around."""
    while isinstance(function, types.FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def computed_weights(model: nn.Module) -> frozenset[tuple[int, str]]:
    """Weights that hooks of torch (pruning, weight norm) compute at each call: identity of the module, and the name."""
    return frozenset(
        (id(module), str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")))
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if _computes_weights(hook)
    )


def refuse_backward_hooks(model: nn.Module) -> None:
    """Refuse hooks on the backward of modules, which no worker would run.

    Raises:
        UnsupportedOperatorError: naming the module and the hook.
    """
    for name, module in model.named_modules():
        for hook in (*module._backward_pre_hooks.values(), *module._backward_hooks.values()):
            raise UnsupportedOperatorError(
                f"module {name!r} has the backward hook {_called(hook)}, which would not run on the workers; put a "
                "hook on a parameter (parameter.register_hook) or on what the model returns"
            )


@contextmanager
def watched_hooks(model: nn.Module) -> Iterator[Looks]:
    """While tracing, note the calls of hooks that only look; other threads meanwhile call the hooks themselves."""
    here = threading.get_ident()
    names = {id(module): name for name, module in model.named_modules()}
    looks: Looks = []

    def watch(hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *given: Any) -> Any:
            if threading.get_ident() != here:
                return hook(module, *given)
            changes, stores = _rehearse(hook, module, given)
            if changes:
                return hook(module, *given)
            if stores:
                hook(module, *given)
            seen = tuple(() for _ in given) if _computes_weights(hook) else given
            looks.append((Onlooker(hook, module, names.get(id(module), "")), seen))
            return None

        return watched

    with _replaced_hooks(model, lambda hook: hook if _belongs_to_library(hook) else watch(hook)):
        yield looks


@contextmanager
def _replaced_hooks(model: nn.Module, other: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, every forward hook is another, or is left out where that is None."""
    registries = _registries(model)
    before = [dict(registry) for registry in registries]
    after = [{key: other(hook) for key, hook in hooks.items()} for hooks in before]
    try:
        for registry, hooks in zip(registries, after, strict=True):
            _refill(registry, {key: hook for key, hook in hooks.items() if hook is not None})
        yield
    finally:
        for registry, hooks, others in zip(registries, before, after, strict=True):
            now = dict(registry)
            # One that has removed itself meanwhile stays away, one that has come stays.
            kept = {key: hook for key, hook in hooks.items() if others[key] is None or now.get(key) is others[key]}
            _refill(registry, kept | {key: hook for key, hook in now.items() if key not in hooks})


def _refill(registry: dict[int, Callable[..., Any]], hooks: dict[int, Callable[..., Any]]) -> None:
    registry.clear()
    registry.update(hooks)


def _rehearse(hook: Callable[..., Any], module: nn.Module, given: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether a hook changes what it is given, and whether it stores something on its module: tried off the record."""
    own = [*module._parameters.values(), *module._buffers.values()]
    tensors = [*tensors_of(given), *(t for t in own if t is not None)]
    versions = [t._version for t in tensors]
    attributes = dict(module.__dict__)
    fake_mode = detect_fake_mode(tensors)
    shape_env = fake_mode.shape_env if fake_mode is not None else None
    numbers = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else nullcontext()
    try:
        with disable_proxy_modes_tracing(), numbers:
            result = hook(module, *given)
    except GraphpartError:
        raise
    except Exception:  # it needs values, so it can only look
        return False, False
    changes = result is not None or versions != [t._version for t in tensors]
    stores = any(attributes.get(name) is not value for name, value in module.__dict__.items())
    return changes, stores


def _belongs_to_library(hook: Any) -> bool:
    """Whether it is one of those by which transformers collects a model's outputs: they act while it runs, or never."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _computes_weights(hook: Any) -> bool:
    """Whether it is one of torch's own (pruning, weight norm, spectral norm): they set a weight and see no input."""
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def _called(hook: Any) -> str:
    return repr(getattr(hook, "__qualname__", hook))
