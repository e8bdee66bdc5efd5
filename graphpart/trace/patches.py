"""What torch keeps for the whole process and a trace changes: changed for the tracing thread alone.

Functions of torch are replaced for one thread, and the flags by which ``torch.export`` says that it is at work hold for
that thread. ``torch.compile`` in another thread waits meanwhile, and is waited for: both write the same tables.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import ClassMethodDescriptorType, ModuleType
from typing import Any

import torch
import torch.export._trace
import torch.export.exported_program
import torch.fx._symbolic_trace
from torch._C import _functorch as functorch
from torch._dynamo.convert_frame import compile_lock
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import OpOverload
from torch.fx import GraphModule

_LOCK = threading.Lock()
_HERE = threading.local()  # .replacements: per switch, what this thread calls in its place


class _Switch:
    """Stands in a place of torch's as long as any thread replaces it; ``users`` counts these.

    Args:
        owner: a class or a module.
        name: of its function or class method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.users = 0
        self.owner, self.name = owner, name
        self.before = vars(owner)[name]
        is_method_of_class = isinstance(self.before, (classmethod, ClassMethodDescriptorType))
        original = _with_class(self.before) if is_method_of_class else self.before

        @wraps(original)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            replacement = getattr(_HERE, "replacements", {}).get(self)
            return original(*args, **kwargs) if replacement is None else replacement(original, *args, **kwargs)

        self.placed = classmethod(dispatch) if is_method_of_class else dispatch
        setattr(owner, name, self.placed)

    def remove(self) -> None:
        """Put back what was there, unless somebody else has replaced it since: then this only passes calls on."""
        if vars(self.owner)[self.name] is self.placed:
            setattr(self.owner, self.name, self.before)


def _with_class(method: Any) -> Callable[..., Any]:
    """A class method as a function that is given the class; one in C has no function of its own."""
    if isinstance(method, classmethod):
        return method.__func__
    return lambda cls, *args, **kwargs: method.__get__(None, cls)(*args, **kwargs)


_SWITCHES: dict[tuple[Any, str], _Switch] = {}


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of torch for what this thread does inside.

    Args:
        owner: a class or a module.
        name: of its function or class method.
        replacement: called with the original and the arguments; a class method's begin with the class.
    """
    key = (owner, name)
    with _LOCK:
        switch = _SWITCHES.get(key)
        if switch is None:
            switch = _SWITCHES[key] = _Switch(owner, name)
        switch.users += 1
    before = getattr(_HERE, "replacements", {})
    _HERE.replacements = {**before, switch: replacement}
    try:
        yield
    finally:
        _HERE.replacements = before
        with _LOCK:
            switch.users -= 1
            if not switch.users:
                del _SWITCHES[key]
                switch.remove()


class _OnlyHere:
    """A flag of torch that is true for the thread that made it alone; in all that is computed of it, a boolean."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __xor__(self, other: Any) -> Any:
        return bool(self) ^ other

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__

    def __hash__(self) -> int:
        return hash(bool(self))

    def __index__(self) -> int:
        return int(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))


def _claim(module: ModuleType, flags: Iterable[str]) -> None:
    """Let what torch has set for the process hold for this thread alone."""
    for name in flags:
        if vars(module).get(name) is True:  # later torch keeps some of them for each thread
            setattr(module, name, _OnlyHere())


@contextmanager
def _exporting(original: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While torch.export is at work, ``is_compiling()`` is no word about other threads."""
    with original():
        _claim(torch.compiler, ("_is_compiling_flag", "_is_exporting_flag"))
        yield


def _arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a tracer does last before it runs what it traces; compiled functions would refuse to run meanwhile."""
    _claim(torch.fx._symbolic_trace, ("_is_fx_tracing_flag",))
    return original(*args, **kwargs)


@contextmanager
def quiet(*prefixes: str) -> Iterator[None]:
    """What this thread does inside is not logged by torch, which writes pages about what it then raises.

    Args:
        prefixes: starts of loggers' names.
    """
    here = threading.get_ident()
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith(prefixes)]
    logs = [logging.getLogger(name) for name in names]

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != here

    for log in logs:
        log.addFilter(of_others)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(of_others)


@contextmanager
def unchanged(tensors: Iterable[Any]) -> Iterator[None]:
    """Tensors are inside and afterwards what they were before.

    Export takes parameters, buffers and arguments without their values; an operator on other tensors alone it executes.
    """
    plain = tuple(x for x in tensors if isinstance(x, torch.Tensor) and not x.is_inference())
    before = [(x, x._version, x.detach().clone()) for x in plain]
    with torch.autograd._unsafe_preserve_version_counter(plain):  # a change that is undone is none to autograd
        try:
            yield
        finally:
            for tensor, version, value in before:
                if tensor._version != version:
                    tensor.detach().copy_(value)


@contextmanager
def modes_kept() -> Iterator[None]:
    """If something fails inside, this thread is afterwards in the modes that it was in.

    A graph enters and leaves modes by operators of their own, so one that fails between them would stay in them.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    levels = functorch.get_dynamic_layer_stack_depth()
    hooks = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _autocasting()}
    depth = autocast_depth()
    try:
        yield
    except BaseException:
        while functorch.get_dynamic_layer_stack_depth() > levels:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(levels)
        if hooks is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        for kind, (is_on, dtype) in autocast.items():
            torch.set_autocast_enabled(kind, is_on)
            torch.set_autocast_dtype(kind, dtype)
        while autocast_depth() > depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        if torch.is_inference_mode_enabled() != inference:
            torch.autograd.grad_mode._enter_inference_mode(inference)
        torch._C._set_grad_enabled(grad)
        raise


def _autocasting() -> tuple[str, ...]:
    """Kinds of devices that have an autocast of their own here."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def autocast_depth() -> int:
    """How many autocast regions the caller is in."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


@contextmanager
def undisturbing() -> Iterator[None]:
    """While this thread exports, and decomposes what it exported, others go on as if it did not."""
    with (
        compile_lock,
        modes_kept(),
        numbers_kept(),
        replaced(torch.export._trace, "_compiling_state_context", _exporting),
        replaced(torch.fx._symbolic_trace.Tracer, "create_args_for_root", _arguments),
        replaced(torch.export._trace, "get_class_if_classified_error", _without_graph),
    ):
        yield


@contextmanager
def numbers_kept() -> Iterator[None]:
    """What a model draws while it is only looked at, Python and NumPy give again when it runs."""
    numpy = sys.modules.get("numpy")
    ours, theirs = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        if numpy is not None:
            numpy.random.set_state(theirs)


def _without_graph(original: Callable[[Exception], Any], reason: Exception) -> Any:
    """What export does with an error first. The graph that hangs on it would be printed; what is wrong is said."""
    vars(reason).pop("partial_fx_graph", None)
    return original(reason)


_INTO_PLAIN = frozenset(
    f"aten::{name}"
    for name in (
        "T", "adjoint", "batch_norm", "chunk", "contiguous", "dropout", "expand_as", "flatten", "mH", "mT", "moveaxis",
        "movedim", "narrow", "numpy_T", "reshape", "reshape_as", "swapaxes", "swapdims", "to", "type_as", "unflatten",
        "view_as",
    )
)  # fmt: skip
"""Composite operators that never stay whole, and come apart into operators that are no composites."""


def composites_of(graph: GraphModule) -> AbstractContextManager[None]:
    """While this thread decomposes a graph, torch looks at no other composite operators than its own.

    Every composite operator that is to stay whole (there are over a thousand) is given another kernel meanwhile. This
    takes most of the time that a small model takes, and other threads see it. Where the graph has a composite operator
    that might come apart into others, all are looked at, as without this.
    """
    present = {
        node.target
        for module in graph.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, OpOverload)
    }
    composites = {op for op in present if _is_cia_op(op)}
    whole = {op for op in composites if _is_preservable_cia_op(op)}
    are_known = all(op._schema.name in _INTO_PLAIN for op in composites - whole)

    def those(original: Callable[[], set[Any]]) -> set[Any]:
        return whole if are_known else original()

    return replaced(torch.export.exported_program, "_collect_all_valid_cia_ops", those)
