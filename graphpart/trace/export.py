"""Export a model with ``torch.export``, and notice on the way what export would lose without a word."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from graphpart.errors import GraphpartError, TraceError, UnsupportedOperatorError
from graphpart.trace.checkpoint import marked_checkpoints
from graphpart.trace.derivatives.chain_rule import write_out
from graphpart.trace.derivatives.mark import marked_derivatives
from graphpart.trace.origin import mark_regions, restore_origin, user_line
from graphpart.trace.patches import autocast_depth, composites_of, quiet, replaced, undisturbing

_IN_PLACE = frozenset(f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior"))
_COMPARING = frozenset(
    f"{name}_"
    for name in ("gt", "ge", "lt", "le", "eq", "ne", "greater", "less", "logical_not", "logical_and", "logical_or")
)
_HARMLESS = frozenset({"requires_grad_", "retain_grad_"})


@contextlib.contextmanager
def notice_lost_gradients() -> Iterator[None]:
    """Refuse by name what export drops silently: custom backward functions and tensor hooks.

    Export records only the forward of a custom ``autograd.Function`` and forgets tensor hooks, so gradients
    would come out wrong without a warning. Where no gradient is wanted (``torch.no_grad``) both are harmless.

    Raises:
        UnsupportedOperatorError: from inside the traced forward, naming the function and the user's line.
    """

    def apply(original: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
        # A custom operator's registered backward is part of the operator, which stays one in the graph.
        if torch.is_grad_enabled() and cls.__module__ != "torch._library.autograd":
            raise UnsupportedOperatorError(
                f"{user_line()}: the custom autograd.Function {cls.__qualname__!r} has a backward of its own, which "
                "tracing would lose. Write it with differentiable operators, or run it under torch.no_grad(); for "
                "activation checkpointing pass use_reentrant=False"
            )
        return original(cls, *args, **kwargs)

    def hook(original: Callable[..., Any], tensor: torch.Tensor, hook: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedOperatorError(
                f"{user_line()}: the model registers a tensor hook ({getattr(hook, '__qualname__', hook)!r}) in its "
                "forward, which tracing would lose. Put hooks on parameters, or on what the model returns"
            )
        return original(tensor, hook)

    with (
        replaced(torch.autograd.Function, "apply", apply),
        replaced(torch.Tensor, "register_hook", hook),
    ):
        yield


class _KeepModes(TorchFunctionMode):
    """Puts into the graph what export forgets of modes.

    Under autocast, products and recurrent layers that tracing keeps whole take what autocast casts to inside them.
    Export drops ``inference_mode``, and ``no_grad`` inside of an autocast region: what operators give there is
    detached.
    """

    _COMPOSITES = frozenset({
        torch.einsum, torch.tensordot, torch.inner, torch.Tensor.inner, torch.linalg.multi_dot, torch.chain_matmul,
        torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._depth_outside = autocast_depth()
        self._inference_outside = torch.is_inference_mode_enabled()
        self._detached: dict[int, Any] = {}  # storages that a detached tensor shares with one that has a gradient

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._COMPOSITES:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _autocast, (args, kwargs))
        self._refuse_hidden_change(func, args)
        if func is torch.Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2 and not kwargs:
            args[0].diagonal().fill_(args[1])  # by name: its own form goes by strides, of which a view has others
            return args[0]
        result = func(*args, **(kwargs or {}))
        is_kept = torch.is_inference_mode_enabled() == self._inference_outside
        if torch.is_grad_enabled() or (is_kept and autocast_depth() == self._depth_outside):
            return result
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)

    def _refuse_hidden_change(self, func: Any, args: Any) -> None:
        """Autograd overlooks a change in place under ``no_grad`` or through ``detach``; a functional graph cannot."""
        if not args or not isinstance(args[0], torch.Tensor):
            return
        name, tensor = getattr(func, "__name__", ""), args[0]
        if tensor.requires_grad and name == "detach":
            storage = tensor.untyped_storage()
            self._detached[storage._cdata] = storage  # held, so that no later storage gets its address
        if name == "detach_" and tensor.requires_grad:
            raise UnsupportedOperatorError(
                f"{user_line()}: detach_ takes a tensor that has a gradient out of the graph, which a functional graph "
                "cannot; take a tensor of its own instead: x = x.detach()"
            )
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
        if not in_place:
            return
        if tensor.requires_grad and torch.is_grad_enabled() and name in _COMPARING:
            raise UnsupportedOperatorError(
                f"{user_line()}: {name} writes truth values over a tensor that has a gradient, which would become zero "
                "on one device and none here; use its functional form: (y > z).to(y.dtype)"
            )
        under_no_grad = tensor.requires_grad and not torch.is_grad_enabled()
        if under_no_grad or (not tensor.requires_grad and tensor.untyped_storage()._cdata in self._detached):
            how = "under torch.no_grad()" if under_no_grad else "through detach()"
            raise UnsupportedOperatorError(
                f"{user_line()}: {name} changes a tensor that has a gradient, in place and {how}, so its gradient "
                "would pretend nothing had changed. Change a copy instead: x.detach().clone()"
            )


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """What autocast would make of an operand of a product."""
    kind = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if eligible else x


def export(
    model: torch.nn.Module, flat: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, has_loss: bool = False
) -> ExportedProgram:
    """Export at the composite ATen level, functional, with ``no_grad`` regions kept.

    Args:
        model: the module; its parameters may be on the meta device.
        flat: the module as a function of tensors alone.
        tensors: what to call that with.
        has_loss: whether a loss is traced behind the model.

    Raises:
        UnsupportedOperatorError: if the model does what tracing would lose, or decides on data.
        TraceError: if ``torch.export`` fails; its own error is the cause.
    """
    with undisturbing(), warnings.catch_warnings(), inductor.patch(fallback_random=True):  # nothing drawn is left out
        warnings.simplefilter("ignore")
        try:
            with notice_lost_gradients(), marked_checkpoints(), marked_derivatives(), _KeepModes(), quiet(*_LOUD):
                exported = torch.export.export(flat, (), dict(tensors), strict=False)
            _detach_no_grad_regions(exported.graph_module)
            origin = mark_regions(exported.graph_module)
            with composites_of(exported.graph_module):
                decomposed = exported.run_decompositions({})
            restore_origin(decomposed.graph, origin)
            write_out(decomposed.graph)
            return decomposed
        except GraphpartError:
            raise
        except Exception as reason:
            raise _explain(model, reason, has_loss) from reason


_LOUD = ("torch.export", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
"""Loggers that write pages about a failing operator before it raises."""

_DATA_DEPENDENT = ("data-dependent", "DataDependent", "DynamicOutputShape")


def _explain(model: torch.nn.Module, reason: Exception, has_loss: bool) -> TraceError:
    """The error for a failed export, with the user's line where there is one."""
    line = user_line(reason.__traceback__)
    first = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    text = f"{type(reason).__name__}: {reason}"
    where = f"{line}: " if line is not None else ""
    what = type(model).__name__ + (" with its loss" if has_loss else "")
    if any(sign in text for sign in _DATA_DEPENDENT):
        outside = ". A loss may stay outside: call the model, and loss.backward()" if has_loss else ""
        return UnsupportedOperatorError(
            f"{where}{what} decides on the values of tensors ({first}). A graph needs one path for "
            f"all data: use torch.where, or take the decision outside the model{outside}"
        )
    call = "loss_fn(model(*args, **kwargs), target)" if has_loss else "model(*args, **kwargs)"
    return TraceError(
        f"{where}{what} could not be traced: {type(reason).__name__}: {first.rstrip('.')}. "
        f"Does {call} run on its own with these arguments?"
    )


def _detach_no_grad_regions(module: torch.fx.GraphModule) -> None:
    """Put ``detach`` on what leaves a ``no_grad`` region, since decomposition inlines the region and forgets it."""
    for inner in module.modules():
        if isinstance(inner, torch.fx.GraphModule):
            for node in list(inner.graph.nodes):
                if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and node.args[0] is False:
                    for item in list(node.users):
                        _detach(inner.graph, item)
            inner.recompile()


def _detach(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return
    with graph.inserting_after(node):
        detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
