"""TorchDynamo in front of the tracer: what a call reads, what it changes, and whether it is one graph.

Of TorchDynamo only the interface of backends is public. All else that graphpart uses of it is in this room, and its
flags are in this file, but for the one that ``autograd_ops`` sets.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo as dynamo
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.eval_frame import OptimizeContext, _debug_get_cache_entry_list, reset_code
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from graphpart.ir.gc_pause import no_collection
from graphpart.trace.dynamo.autograd_ops import followed_derivatives
from graphpart.trace.dynamo.changes import RESULT, TENSOR, Effect, Store, effects_of_call
from graphpart.trace.dynamo.exact import exact_guards
from graphpart.trace.dynamo.piece import form_of
from graphpart.trace.dynamo.surroundings import sees_stand_ins
from graphpart.trace.hooks import without_hooks
from graphpart.trace.origin import user_line_of
from graphpart.trace.patches import numbers_kept, quiet

Bindings = Mapping[str, Any]
"""A call: the arguments of the function that was watched, by name."""


@dataclass(frozen=True)
class Read:
    """A tensor that a call reads beside its arguments, the model's parameters and its buffers.

    Attributes:
        expression: where it is found, as in ``L['model'].scales[0]``.
        tensor: what was there.
    """

    expression: str
    tensor: Any


@dataclass(frozen=True)
class Watched:
    """What a call was seen to depend on, and to do.

    Attributes:
        guards: whether another call would do the same; none are known while attributes are to be set.
        stores: attributes that it sets to constants.
        effects: what else it changes beside tensors in place.
        reads: the tensors it reads from elsewhere.
        form: what is computed, and how the result is made of it: calls of equal forms do the same.
        is_plain: whether the form says all, as each tensor of the result is computed, and no two are the same.
        reads_numbers: whether Python reads a number of one of those tensors, which the trace would take for given.
        sees_stand_ins: whether it would see that others stand for its tensors while it is exported.
        has_hooks: whether hooks of modules are part of all that.
    """

    guards: Guards
    stores: tuple[Store, ...]
    effects: tuple[Effect, ...]
    reads: tuple[Read, ...]
    form: tuple[Any, ...]
    is_plain: bool
    reads_numbers: bool = False
    sees_stand_ins: bool = False
    has_hooks: bool = True

    @property
    def is_described(self) -> bool:
        """Whether what the result is made of is known, as no number in it depends on data."""
        return self.form[-1] is not None


class Guards:
    """Tells whether a call meets all that was found when a function was watched.

    Args:
        function: what was watched; TorchDynamo keeps the conditions with its code.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        entries = _debug_get_cache_entry_list(function.__code__)
        self._manager = entries[0].guard_manager if entries else None  # no call is known to go as one not followed

    def hold(self, bindings: Bindings) -> bool:
        """Whether the call would go as the one that was watched."""
        return self._manager is not None and bool(self._manager.check(bindings))

    def broken(self, bindings: Bindings) -> str:
        """The first condition that does not hold, as TorchDynamo writes it; empty if all do, or none is known."""
        if self._manager is None:
            return ""
        found = self._manager.check_verbose(bindings)
        return "" if found.result else "; ".join(part.split("#")[0].strip() for part in found.verbose_code_parts)

    def value(self, expression: str, bindings: Bindings) -> Any:
        """What is found there now."""
        return eval(expression, {"L": bindings, "G": self._function.__globals__})


RAISES = "Observed exception"
"""Said of a call that raises an exception by itself."""


class GraphBreak(Exception):
    """A call is not one graph; the text says why."""


class CallError(Exception):
    """A call fails by itself, as it would without graphpart."""


class _Seen(Exception):
    """Raised in place of the first operator, when all that was wanted is known."""


class _Unsettled(Exception):
    """Raised before guards are made, which would not hold once what the call sets is set."""


def watch(
    function: Any, bindings: Bindings, own: Collection[Tensor], *, unguarded: bool, without: nn.Module | None = None
) -> Watched:
    """Follow a call without running any of its operators.

    Args:
        function: whose arguments the bindings are; it leaves a description of its result with :data:`RESULT`.
        bindings: arguments by name.
        own: parameters and buffers.
        unguarded: whether guards say nothing about these, as they are not there in truth.
        without: a model whose forward hooks are left out, and whose guards say nothing about hooks.

    Raises:
        GraphBreak: if it does what one graph cannot hold, or calls no operator.
        CallError: if the call itself fails.
    """
    found: list[_AllSeen] = []
    known = set(map(id, own)) | {id(x) for x in pytree.tree_leaves(dict(bindings)) if isinstance(x, Tensor)}

    def backend(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append(_seen(graph, known, set(map(id, own))))
        if not all(store.has_happened() for store in found[0][0]):
            raise _Unsettled

        def stop(*_: Any) -> Any:
            raise _Seen

        return stop

    identities = frozenset(map(id, own if unguarded else ()))

    def is_wanted(guards: Sequence[Any]) -> Sequence[bool]:
        return [
            not (guard.has_value and id(guard.value) in identities and guard.guard_type != "HASATTR")
            and not (without is not None and "_hooks" in guard.name)
            for guard in guards
        ]

    # Guards that are looked through are made twice, and not for all values.
    options: Any = {"guard_filter_fn": is_wanted} if identities or without is not None else None
    apart = copied(function)
    compiled = torch.compile(apart, backend=backend, fullgraph=True, dynamic=False, options=options)
    hooks = contextlib.nullcontext() if without is None else without_hooks(without)
    with settings(), no_collection(), numbers_kept(), hooks:
        try:
            compiled(**bindings)
        except _Seen:
            return Watched(Guards(apart), *found[0])
        except dynamo.exc.BackendCompilerFailed as reason:
            if not isinstance(reason.inner_exception, _Unsettled):
                raise GraphBreak(_in_words(reason)) from reason
            return Watched(Guards(apart), *found[0])
        except (dynamo.exc.TorchRuntimeError, IndexError, AssertionError) as reason:
            raise CallError(_in_words(reason)) from reason
        except (dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as reason:
            raise GraphBreak(_in_words(reason)) from reason
    raise GraphBreak("it calls no operator")


_AllSeen = tuple[tuple[Store, ...], tuple[Effect, ...], tuple[Read, ...], tuple[Any, ...], bool, bool, bool]


def _seen(graph: GraphModule, known: Collection[int], own: Collection[int]) -> _AllSeen:
    """All of :class:`Watched` but guards, of the call being compiled."""
    stores, effects = effects_of_call()
    description = next((store.value for store in stores if store.owner is RESULT), None)
    num_tensors = pytree.tree_leaves(description).count(TENSOR)
    outputs = next(iter(reversed(graph.graph.nodes))).all_input_nodes
    form = (form_of(graph), places_of(graph), description)
    changed = (tuple(s for s in stores if s.owner is not RESULT), tuple(e for e in effects if e.owner is not RESULT))
    is_plain, takes_numbers = len(outputs) == num_tensors, _reads_numbers(graph, known)
    sees = sees_stand_ins(InstructionTranslator.current_tx().output, own)
    return *changed, _reads(graph, known), form, is_plain, takes_numbers, sees


def copied(function: Any) -> types.FunctionType:
    """The same function with code and globals of its own, for TorchDynamo keeps what it knows with these."""
    scope = {"__builtins__": builtins, **function.__globals__}
    made = types.FunctionType(function.__code__.replace(), scope, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@contextlib.contextmanager
def settings(**more: Any) -> Iterator[None]:
    """TorchDynamo's flags as graphpart needs them; they are the calling thread's own.

    Hooks of modules are guarded, numbers are constants, nothing is given up after so many traces, loggers are passed
    over, and what shapes depend on data does not by itself break a graph. What NumPy draws stays NumPy's: a graph would
    have it drawn by torch, or once for all calls. What TorchDynamo says of its own troubles is left out; warnings of
    the model's own code are not.
    """
    wanted = {
        "skip_nnmodule_hook_guards": False,
        "recompile_limit": 1 << 20,
        "accumulated_recompile_limit": 1 << 20,
        "specialize_float": True,
        "allow_rnn": True,
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "use_numpy_random_stream": True,
        "ignore_logging_functions": _LOGGING | _logging_functions(),
        "ignore_logger_methods": _LOGGING | _logging_functions(),
        **more,
    }
    known = {name: value for name, value in wanted.items() if hasattr(config, name)}
    if "ignore_logging_functions" in known:  # the other is its former name
        known.pop("ignore_logger_methods", None)
    with config.patch(**known), warnings.catch_warnings(), quiet(*_LOUD), followed_derivatives(), exact_guards():
        warnings.filterwarnings("ignore", module=r"torch\._")
        yield


def cut_up(function: types.FunctionType, backend: Callable[..., Any]) -> Any:
    """The function, which TorchDynamo cuts into graphs that the backend is given.

    Flags are set only while a frame is cut up: they take longer to set than a graph to find, and what the model itself
    does to flags, such as filters of warnings, is left alone.
    """
    made = dynamo.optimize(backend, dynamic=False)
    if isinstance(made, OptimizeContext):  # anything else leaves the function as it is
        made.callback = _with_settings(made.callback)
    return made(function)


def _with_settings(convert: Any) -> Any:
    @functools.wraps(convert)  # by whose attributes TorchDynamo tells backends apart
    def convert_frame(*args: Any, **kwargs: Any) -> Any:
        with settings(suppress_errors=True):
            return convert(*args, **kwargs)

    return convert_frame


_LOUD = ("torch._guards", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""Loggers that write pages about what TorchDynamo cannot follow, before it runs as it is or raises."""


@contextlib.contextmanager
def without_modes(*, our_own: bool = False) -> Iterator[None]:
    """A dispatch mode of the user's, such as one that counts FLOPs, sees nothing of what is done inside.

    Under one, TorchDynamo follows no call, and no guard holds.

    Args:
        our_own: whether modes that TorchDynamo does not mind are left out, too.
    """
    if is_in_torch_dispatch_mode(include_infra_modes=our_own):
        with _disable_current_modes():
            yield
    else:
        yield


_LOGGING = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning, logging.Logger.error}


def _logging_functions() -> set[Any]:
    """What libraries have put on loggers, such as ``warning_once``."""
    return {value for name, value in vars(logging.Logger).items() if "once" in name or "advice" in name}


def code_being_compiled() -> types.CodeType:
    """The code of the frame that is being compiled; only a backend, while it is called, can ask."""
    code = InstructionTranslator.current_tx().output.root_tx.f_code
    assert isinstance(code, types.CodeType)
    return code


def forget(codes: Iterable[types.CodeType]) -> None:
    """Let TorchDynamo forget what it has made of some functions; it makes it again when they are called."""
    for code in set(codes):
        reset_code(code)


def places_of(graph: GraphModule) -> tuple[str, ...]:
    """Per input of a graph, where TorchDynamo found it, as an expression; only a backend, while it is called, can ask.

    Empty for what is no tensor.
    """
    return tuple("" if argument is None else argument.source.name for argument in _inputs(graph))


def _reads(graph: GraphModule, known: Collection[int]) -> tuple[Read, ...]:
    """What comes into a graph and is not known by identity."""
    found = (argument for argument in _inputs(graph) if argument is not None and id(argument.example) not in known)
    return tuple(Read(argument.source.name, argument.example) for argument in found)


def _reads_numbers(graph: GraphModule, known: Collection[int]) -> bool:
    """Whether a number is taken of what comes into a graph and is not known by identity."""
    reached: set[Any] = set()
    for node in graph.graph.nodes:
        argument = node.meta.get("grapharg") if node.op == "placeholder" else None
        if (argument is not None and id(argument.example) not in known) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if node.target == "item":
                return True
    return False


def _inputs(graph: GraphModule) -> list[Any]:
    """Per input of a graph, what TorchDynamo has noted of it; None for what is no tensor."""
    return [node.meta.get("grapharg") for node in graph.graph.nodes if node.op == "placeholder"]


def _in_words(reason: BaseException) -> str:
    """What TorchDynamo says, in one line, behind the user's line where it knows that."""
    text = str(reason).strip().splitlines()
    line = user_line_of(getattr(reason, "real_stack", None) or ())
    first = text[0].rstrip(".") if text else type(reason).__name__
    return f"{line}: {first}" if line is not None else first
