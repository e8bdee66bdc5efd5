"""TorchDynamo in front of the tracer: what a call reads, what it changes, and whether it is one graph.

Of TorchDynamo only the interface of backends is public. All else that graphpart uses of it, its flags above all, is in
this file and in ``autograd_ops``.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo as dynamo
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo import config
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.side_effects import AttributeMutationNew, ValueMutationNew
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.lists import DequeVariable
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from graphpart.ir.gc_pause import no_collection
from graphpart.trace.dynamo.autograd_ops import followed_derivatives
from graphpart.trace.hooks import without_hooks
from graphpart.trace.origin import user_line_of
from graphpart.trace.patches import quiet
from graphpart.trace.tree import CONSTANTS

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


NOTHING = object()
"""The value of an attribute that is not there."""


@dataclass(frozen=True)
class Store:
    """An attribute that a call sets to the same constant whenever its guards hold.

    Attributes:
        owner: whose attribute it is.
        name: the attribute's.
        value: the constant.
    """

    owner: Any
    name: str
    value: Any

    def has_happened(self) -> bool:
        """Whether the attribute has the value."""
        found = getattr(self.owner, self.name, NOTHING)
        return type(found) is type(self.value) and found == self.value

    def repeat(self) -> None:
        """Set it, or take it away."""
        if self.has_happened():
            return
        if self.value is NOTHING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.value)


@dataclass(frozen=True)
class Effect:
    """What a call changes and only TorchDynamo can repeat.

    Attributes:
        owner: whose attributes it sets; None for other changes.
        names: the attributes.
        place: what it is, as an expression.
    """

    owner: Any
    names: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Watched:
    """What a call was seen to depend on, and to do.

    Attributes:
        guards: whether another call would do the same.
        stores: attributes that it sets to constants.
        effects: what else it changes beside tensors in place.
        reads: the tensors it reads from elsewhere.
        has_hooks: whether hooks of modules are part of all that.
    """

    guards: Guards
    stores: tuple[Store, ...]
    effects: tuple[Effect, ...]
    reads: tuple[Read, ...]
    has_hooks: bool = True


class Guards:
    """Tells whether a call meets all that was found when a function was watched.

    Args:
        function: what was watched; TorchDynamo keeps the conditions with its code.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        self._manager = _debug_get_cache_entry_list(function.__code__)[0].guard_manager

    def hold(self, bindings: Bindings) -> bool:
        """Whether the call would go as the one that was watched."""
        return bool(self._manager.check(bindings))

    def broken(self, bindings: Bindings) -> str:
        """The first condition that does not hold, as TorchDynamo writes it; empty if all do."""
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


def watch(
    function: Any, bindings: Bindings, own: Collection[Tensor], *, unguarded: bool, without: nn.Module | None = None
) -> Watched:
    """Follow a call without running any of its operators.

    Args:
        function: whose arguments the bindings are.
        bindings: arguments by name.
        own: parameters and buffers.
        unguarded: whether guards say nothing about these, as they are not there in truth.
        without: a model whose forward hooks are left out, and whose guards say nothing about hooks.

    Raises:
        GraphBreak: if it does what one graph cannot hold, or calls no operator.
        CallError: if the call itself fails.
    """
    found: list[tuple[tuple[Store, ...], tuple[Effect, ...], tuple[Read, ...]]] = []
    known = set(map(id, own)) | {id(x) for x in pytree.tree_leaves(dict(bindings)) if isinstance(x, Tensor)}

    def backend(graph: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append((*_effects(), _reads(graph, known)))

        def stop(*_: Any) -> Any:
            raise _Seen

        return stop

    identities = frozenset(map(id, own if unguarded else ()))

    def is_wanted(guards: Sequence[Any]) -> Sequence[bool]:
        return [
            not (guard.has_value and id(guard.value) in identities)
            and not (without is not None and "_hooks" in guard.name)
            for guard in guards
        ]

    # Guards that are looked through are made twice, and not for all values.
    options: Any = {"guard_filter_fn": is_wanted} if identities or without is not None else None
    apart = copied(function)
    compiled = torch.compile(apart, backend=backend, fullgraph=True, dynamic=False, options=options)
    with settings(), no_collection(), contextlib.nullcontext() if without is None else without_hooks(without):
        try:
            compiled(**bindings)
        except _Seen:
            return Watched(Guards(apart), *found[0])
        except (dynamo.exc.TorchRuntimeError, IndexError, AssertionError) as reason:
            raise CallError(_in_words(reason)) from reason
        except (dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as reason:
            raise GraphBreak(_in_words(reason)) from reason
    raise GraphBreak("it calls no operator")


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
    with (
        config.patch(**known),
        warnings.catch_warnings(),
        quiet("torch._guards", "torch._dynamo"),
        followed_derivatives(),
    ):
        warnings.filterwarnings("ignore", module=r"torch\._")
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """A dispatch mode of the user's, such as one that counts FLOPs, sees nothing of what is done inside.

    Under one, TorchDynamo follows no call, and no guard holds.
    """
    if is_in_torch_dispatch_mode(include_infra_modes=False):
        with _disable_current_modes():
            yield
    else:
        yield


_LOGGING = {logging.Logger.debug, logging.Logger.info, logging.Logger.warning, logging.Logger.error}


def _logging_functions() -> set[Any]:
    """What libraries have put on loggers, such as ``warning_once``."""
    return {value for name, value in vars(logging.Logger).items() if "once" in name or "advice" in name}


def _effects() -> tuple[tuple[Store, ...], tuple[Effect, ...]]:
    """What the call being compiled changes beside tensors: constants set as attributes, and the rest."""
    stores: list[Store] = []
    others: list[Effect] = []
    effects = InstructionTranslator.current_tx().output.side_effects
    for changed in effects._get_modified_vars():
        if isinstance(changed.mutation_type, (AttributeMutationNew, ValueMutationNew)):
            continue  # made by the call, so that nobody else sees it unless it is put somewhere
        owner = getattr(changed, "value", None)
        written = effects.store_attr_mutations.get(changed, {})
        whole = getattr(changed, "is_base_vt_modified", lambda _: False)(effects)
        is_plain = owner is not None and written and not whole and all(map(_is_fixed, written.values()))
        if is_plain:
            stores += [Store(owner, name, value.as_python_constant()) for name, value in written.items()]
        else:
            place = changed.source.name if changed.source is not None else type(changed).__name__
            names = () if whole else tuple(written)
            others.append(Effect(owner, names, ".".join((place, *names[:1]))))
    if getattr(effects, "tensor_hooks", None):
        others.append(Effect(None, (), "a hook on a tensor"))
    return tuple(stores), tuple(others)


def changes_bounded_deque() -> bool:
    """Whether the call being compiled changes a deque of limited length: TorchDynamo forgets the limit while it runs.

    Only a backend, while it is called, can ask.
    """
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope}
    for changed in output.side_effects._get_modified_vars():
        if isinstance(changed, DequeVariable) and changed.source is not None:
            try:
                value = eval(changed.source.name, scope)
            except (NameError, SyntaxError):  # found by means of TorchDynamo's own
                return True
            if getattr(value, "maxlen", None) is not None:
                return True
    return False


def _is_fixed(variable: Any) -> bool:
    """Whether a value that is set is the same, and cannot change, whenever the guards hold."""
    if not variable.is_python_constant():
        return False
    leaves = pytree.tree_leaves(value) if isinstance(value := variable.as_python_constant(), tuple) else [value]
    return all(isinstance(leaf, CONSTANTS) for leaf in leaves)


def places_of(graph: GraphModule) -> tuple[str, ...]:
    """Per input of a graph, where TorchDynamo found it, as an expression; only a backend, while it is called, can ask.

    Empty for what is no tensor.
    """
    return tuple("" if argument is None else argument.source.name for argument in _inputs(graph))


def _reads(graph: GraphModule, known: Collection[int]) -> tuple[Read, ...]:
    """What comes into a graph and is not known by identity."""
    found = (argument for argument in _inputs(graph) if argument is not None and id(argument.example) not in known)
    return tuple(Read(argument.source.name, argument.example) for argument in found)


def _inputs(graph: GraphModule) -> list[Any]:
    """Per input of a graph, what TorchDynamo has noted of it; None for what is no tensor."""
    return [node.meta.get("grapharg") for node in graph.graph.nodes if node.op == "placeholder"]


def _in_words(reason: BaseException) -> str:
    """What TorchDynamo says, in one line, behind the user's line where it knows that."""
    text = str(reason).strip().splitlines()
    line = user_line_of(getattr(reason, "real_stack", None) or ())
    first = text[0].rstrip(".") if text else type(reason).__name__
    return f"{line}: {first}" if line is not None else first
