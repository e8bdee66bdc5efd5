"""Where TorchDynamo would take a call for another one: guards that it leaves out, and objects that it copies.

It guards what it finds; what it looks for and does not find (an attribute, a key, a method that a class might get) it
mostly does not. It takes a random generator for its state, and looks through what a function has cached.
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
import torch._dynamo.guards as dynamo_guards
from torch import nn
from torch._dynamo import exc, symbolic_convert
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.source import GlobalSource
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import (
    SetVariable,
    VariableTracker,
    builder,
    builtin,
    dicts,
    functions,
    misc,
    tensor,
    user_defined,
)
from torch.utils._python_dispatch import _disable_current_modes

from graphpart.trace.dynamo.surroundings import Surroundings, is_constant, names_in
from graphpart.trace.patches import replaced

GuardBuilder, install_guard = dynamo_guards.GuardBuilder, dynamo_guards.install_guard


@contextmanager
def exact_guards() -> Iterator[None]:
    """Calls that TorchDynamo follows meanwhile are guarded by all that they depend on."""
    builtin.BuiltinVariable.call_function_handler_cache.clear()  # it holds functions that are replaced below
    for module in _OF_CLASSES:
        for value in vars(sys.modules.get(module, types)).values():
            if hasattr(value, "cache_clear") and "_type" in "".join(inspect.signature(value).parameters):
                value.cache_clear()  # what it has kept of a class, which may have got a method since
    with ExitStack() as stack:
        for owner, name, replacement in _REPLACED:
            if name in vars(owner):
                stack.enter_context(replaced(owner, name, replacement))
        yield


# --- numbers ----------------------------------------------------------------------------------------------------------


def _equals(original: Callable[..., None], self: Any, guard: Any, *more: Any, **named: Any) -> None:
    """A guard that a value equals what it was; where that has a zero, it has to be of the same sign, too."""
    original(self, guard, *more, **named)
    value = self.get(guard)
    if _has_zero(value):
        text = repr(value)
        said = [f"repr({self.arg_ref(guard)}) == {text!r}"]
        self.get_guard_manager(guard).add_lambda_guard(lambda now: repr(now) == text, said, guard.user_stack)


def _has_zero(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_zero, value))
    if isinstance(value, complex):
        return value.real == 0 or value.imag == 0
    return isinstance(value, float) and value == 0


# --- names that are found, and that are not ---------------------------------------------------------------------------


def _wrap(original: Callable[..., Any], self: Any, value: Any) -> Any:
    surroundings = Surroundings.of(self.tx.output)
    if isinstance(value, torch.Tensor) and not _is_on_module(self.tx, self.source):
        surroundings.aside.append(value)
    surroundings.add(value)
    return original(self, value)


def _is_on_module(tx: Any, source: Any) -> bool:
    base = getattr(source, "base", None)
    if base is None or base.name.endswith(("._parameters", "._buffers")) or _OF_RECURRENT in base.name:
        return True
    return isinstance(_at(tx, base), nn.Module)


_OF_RECURRENT = "._flat_weight"
"""What ``nn.LSTM`` and its like find their parameters by, which follows what stands for these."""


def _at(tx: Any, source: Any) -> Any:
    """What TorchDynamo found in a place; None where only it can tell."""
    try:
        return eval(source.name, {"L": tx.output.local_scope, "G": tx.output.global_scope})
    except Exception:
        return None


def _type(original: Callable[..., Any], self: Any, tx: Any, *args: Any) -> Any:
    """The class of a tensor, which is another while it is traced; many only write it down."""
    after = tx.instructions[tx.instruction_pointer :][:_COMPARED_WITHIN]
    if isinstance(args[0], tensor.TensorVariable) and not _COMPARING.isdisjoint(i.opname for i in after):
        Surroundings.of(tx.output).asks = True
    return original(self, tx, *args)


_COMPARING, _COMPARED_WITHIN = frozenset({"IS_OP", "COMPARE_OP", "CONTAINS_OP"}), 5


def _identity(original: Callable[..., Any], self: Any, tx: Any, *args: Any) -> Any:
    _refuse_tensor(args[0])
    return original(self, tx, *args)


def _address(_: Callable[..., Any], *args: Any) -> NoReturn:
    _stop("where a tensor lies, or how often it has changed", "that is another while it is traced")


def _load_builtin(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    """A builtin is what a name means as long as no global has it."""
    for scope in (self.f_globals, self.f_builtins):
        Surroundings.of(self.output).scopes[id(scope)] = scope
    return original(self, *args)


def _ambient(original: Callable[..., None], self: Any, guard: Any) -> None:
    """With a guard that every call has, one for its surroundings."""
    original(self, guard)
    output = self.check_fn_manager.output_graph
    holds = Surroundings.of(output).guard(names_in(output.traced_code))
    self.guard_manager.root.add_lambda_guard(holds, ["classes, modules and functions are as they were"], None)


def _tensor_attribute(original: Callable[..., Any], self: Any, tx: Any, name: str) -> Any:
    try:
        return original(self, tx, name)
    except NotImplementedError:
        _guard_attribute(self, name)
        raise


def _has_tensor_attribute(original: Callable[..., Any], self: Any, tx: Any, name: str) -> Any:
    found = original(self, tx, name)
    _guard_attribute(self, name)
    return found


def _guard_attribute(variable: Any, name: str) -> None:
    """Whether a tensor of the user's has an attribute that no tensor has by itself."""
    if variable.source is not None and variable.source.subguards_allowed() and not hasattr(torch.Tensor, name):
        install_guard(variable.make_guard(functools.partial(GuardBuilder.HASATTR, attr=name)))


def _own_item(original: Callable[..., Any], self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """An item of an object's own dictionary, as torch has it before 2.12."""
    if self.name == "__dict__" and self.obj.source is not None and args and args[0].is_python_constant():
        key = args[0].as_python_constant()
        install_guard(self.obj.source.make_guard(functools.partial(GuardBuilder.HASATTR, attr=key)))
    return original(self, tx, name, args, kwargs)


# --- keys that are found, and that are not ----------------------------------------------------------------------------


def _item(original: Callable[..., Any], self: Any, tx: Any, key: Any) -> Any:
    _refuse_tensor(key)
    try:
        return original(self, tx, key)
    except exc.ObservedException:
        self.install_dict_contains_guard(tx, [key])
        raise


def _contains(original: Callable[..., None], self: Any, tx: Any, args: Sequence[Any]) -> None:
    """A key that is no constant, such as a tensor or a module, is another at each call."""
    _refuse_tensor(args[0])
    original(self, tx, args)
    if not args[0].is_python_constant():
        self.install_dict_keys_match_guard()


def _refuse_tensor(key: Any) -> None:
    if isinstance(key, tensor.TensorVariable):
        _stop("a tensor as a key", "it is another object while it is traced")


def _hash(_: Callable[..., Any], self: Any, *args: Any) -> NoReturn:
    _stop("an object as a key", "which key it is like, its class decides")


def _attributes_contain(_: Callable[..., None], self: Any, tx: Any, args: Sequence[Any]) -> None:
    """What is in an object's own dictionary is guarded as in any other."""
    dicts.ConstDictVariable.install_dict_contains_guard(self, tx, list(args))


def _attributes_match(_: Callable[..., None], self: Any) -> None:
    dicts.ConstDictVariable.install_dict_keys_match_guard(self)


def _ordered(original: Callable[..., Any], self: Any, tx: Any, name: str, *args: Any) -> Any:
    """A key that moves to the end changes an OrderedDict, though it has the same items."""
    result = original(self, tx, name, *args)
    if name == "move_to_end":
        (getattr(self, "_base_vt", None) or self).should_reconstruct_all = True
    return result


def _write_back(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    """Sets that a call changes come out right as far as they hold constants."""
    for changed in self._get_modified_vars():
        if isinstance(changed, SetVariable) and changed.source is not None:
            for key in changed.set_items:
                if not (key.vt.is_python_constant() and isinstance(key.vt.as_python_constant(), _AS_IN_SETS)):
                    _stop("a set of objects", "which of them are the same, their classes decide")
    return original(self, *args)


_AS_IN_SETS = (type(None), bool, int, float, complex, str, bytes, tuple, enum.Enum, torch.dtype, torch.device)


# --- objects with a state of their own --------------------------------------------------------------------------------


def _stop(what: str, why: str) -> NoReturn:
    exc.unimplemented(gb_type=what, context="", explanation=why, hints=[])


def _random(_: Callable[..., Any], self: Any, tx: Any, name: str, *args: Any) -> NoReturn:
    _stop(f"random.Random.{name}", "a graph would draw the same numbers at each call")


def _new_random(_: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    _stop("random.Random", "a graph would draw the same numbers at each call")


def _cached_call(
    original: Callable[..., Any], self: Any, tx: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A function that keeps its results is called, as on one device; what it gives is an object from outside."""
    function = self.wrapper_obj
    owner = getattr(getattr(function, self.attr_to_trace, None), "__module__", None) or ""
    if not hasattr(function, "cache_info") or owner.partition(".")[0] == "torch":
        return original(self, tx, args, kwargs)
    values = tuple(_real(tx, x) for x in (*self.self_args(), *args))
    named = {name: _real(tx, x) for name, x in kwargs.items()}
    try:
        with _disable_current_modes():
            result = function(*values, **named)
    except Exception as reason:
        _stop("a function that keeps its results", f"it raises {type(reason).__name__}")
    Surroundings.of(tx.output).cached.append((function, values, named, result))
    if is_constant(result):
        return VariableTracker.build(tx, result)
    name = tx.output.install_global_by_id("cached", result)
    return VariableTracker.build(tx, result, GlobalSource(name))


def _real(tx: Any, variable: Any) -> Any:
    """The object that a variable stands for, where it is the same at each call."""
    if variable.is_python_constant():
        return variable.as_python_constant()
    if variable.source is not None and not isinstance(variable, tensor.TensorVariable):
        value = _at(tx, variable.source)
        if type(value).__hash__ is object.__hash__ or isinstance(value, nn.Module):
            return value
    _stop("a function that keeps its results", "whether it has been called so before hangs on its arguments")


_OF_CLASSES = ("torch._dynamo.variables.base", "torch._dynamo.variables.object_protocol")

_REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (dynamo_guards, "profile_guard_manager", lambda original, *_: 0.0),  # it would empty the processor's caches
    (GuardBuilder, "EQUALS_MATCH", _equals),
    (GuardBuilder, "GRAD_MODE", _ambient),
    (builder.VariableBuilder, "__call__", _wrap),
    (InstructionTranslatorBase, "load_builtin_from_argval", _load_builtin),
    (symbolic_convert, "is_stdlib", lambda original, module: original(module) and module is not os),
    (tensor.TensorVariable, "dynamic_getattr", _tensor_attribute),
    (tensor.TensorVariable, "call_obj_hasattr", _has_tensor_attribute),
    (misc.GetAttrVariable, "call_method", _own_item),
    (dicts.ConstDictVariable, "getitem_const_raise_exception_if_absent", _item),
    (dicts.ConstDictVariable, "install_dict_contains_guard", _contains),
    (builtin.BuiltinVariable, "call_type", _type),
    (builtin.BuiltinVariable, "call_id", _identity),
    (tensor.TensorVariable, "method_attr__version", _address),
    (tensor.TensorVariable, "method_data_ptr", _address),
    (tensor.TensorVariable, "hash_impl", _address),
    (tensor.TensorVariable, "get_python_hash", _address),
    (user_defined.UserDefinedObjectVariable, "hash_impl", _hash),
    (user_defined.UserDefinedObjectVariable, "get_python_hash", _hash),  # its former name
    (SideEffects, "codegen_update_mutated", _write_back),
    (misc.RandomVariable, "call_method", _random),
    (misc.RandomClassVariable, "call_function", _new_random),
    (functions.WrapperUserFunctionVariable, "call_function", _cached_call),
    # What torch has of these differs between its versions.
    *(
        (vars(dicts)[name], method, replacement)
        for name, method, replacement in (
            ("DunderDictVariable", "install_dict_contains_guard", _attributes_contain),
            ("DunderDictVariable", "install_dict_keys_match_guard", _attributes_match),
        )
        if name in vars(dicts)
    ),
    (vars(user_defined).get("OrderedDictVariable", dicts.ConstDictVariable), "call_method", _ordered),
)
