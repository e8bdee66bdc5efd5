"""A loss behind a model, traced with it, so that a training step is one graph."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphpart.errors import TraceError

LossFunction = Callable[..., Tensor]


class _Missing:
    def __repr__(self) -> str:
        return "no target"


NO_TARGET = _Missing()
"""What stands for a target that was not given; None is one that was."""


@dataclass(frozen=True)
class Loss:
    """What a training step computes behind the model.

    Attributes:
        function: takes the model's result, and the target if there is one; None where the model's result is the loss
            or has it, as transformers' do.
        target: tensors in any containers, cut into microbatches as the inputs are.
        with_outputs: whether the model's own result is wanted, too.
    """

    function: LossFunction | None = None
    target: Any = NO_TARGET
    with_outputs: bool = False

    def __post_init__(self) -> None:
        if self.function is not None and not callable(self.function):
            raise TraceError(f"loss_fn={self.function!r} cannot be called; give a function of the model's result")
        if self.function is None and self.target is not NO_TARGET:
            raise TraceError("target= needs loss_fn=, which takes the model's result and the target")
        if isinstance(self.function, nn.Module) and any(p.requires_grad for p in self.function.parameters()):
            raise TraceError(
                f"loss_fn is a {type(self.function).__name__} with parameters of its own, which no device would keep; "
                "make it a submodule of the model, and let the model return its loss"
            )

    @property
    def arguments(self) -> dict[str, Any]:
        """What a call brings along beside the model's arguments: the target, and the tensors of the loss function."""
        found = {} if self.target is NO_TARGET else {"target": self.target}
        if isinstance(self.function, nn.Module):
            tensors = {**dict(self.function.named_parameters()), **dict(self.function.named_buffers())}
            if tensors:
                found["loss_fn"] = {name: tensor.detach() for name, tensor in tensors.items()}
        return found

    def __call__(self, result: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss, and the model's result if it is wanted.

        Args:
            result: the model's.
            arguments: as :attr:`arguments`.

        Raises:
            TraceError: if there is no loss, or it is not one number.
        """
        if self.function is None:
            loss = _own_loss(result)
        else:
            given = (result, *([arguments["target"]] if "target" in arguments else []))
            tensors = arguments.get("loss_fn")
            if tensors:
                loss = torch.func.functional_call(self.function, tensors, given)  # type: ignore[arg-type]
            else:
                loss = self.function(*given)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = (
                f"a {loss.dtype} tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            )
            raise TraceError(f"the loss has to be one floating-point number, not {what}; reduce it to a mean or a sum")
        return (loss if loss.shape == () else loss.reshape(())), (result if self.with_outputs else None)

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for losses that trace alike: a lambda written anew for every step is the same one.

        Raises:
            TraceError: if the function reads a tensor from around it, which a trace would freeze.
        """
        return (_function_key(self.function), self.with_outputs)


def _own_loss(result: Any) -> Tensor:
    """The loss in a model's own result."""
    if isinstance(result, Tensor) and result.numel() == 1:
        return result
    found = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if found is None and isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        found = result[0] if result[0].numel() == 1 else None
    if not isinstance(found, Tensor):
        raise TraceError(
            f"the model returns a {type(result).__name__} without a loss; give train_step(..., loss_fn=, target=), or "
            "what makes the model compute its loss (labels=, for models of transformers)"
        )
    return found


class _Same:
    """An object that equals itself alone, and is kept alive by being held here."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _function_key(function: Any) -> Hashable:
    if isinstance(function, functools.partial):
        arguments = (*function.args, *function.keywords.items())
        return (_function_key(function.func), *(_part_key(a, "its arguments") for a in arguments))
    if isinstance(function, types.MethodType):
        return (_function_key(function.__func__), _Same(function.__self__))
    if isinstance(function, types.FunctionType):
        around = inspect.getclosurevars(function)
        read = {**around.globals, **around.nonlocals}
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())
        parts = (*sorted(read.items(), key=lambda item: item[0]), *defaults)
        return (function.__code__, *(_part_key(part, function.__qualname__) for part in parts))
    if isinstance(function, nn.Module):
        plain = tuple((n, v) for m in function.modules() for n, v in vars(m).items() if type(v) in _PLAIN)
        return (_Same(function), plain)
    return _Same(function)


def _part_key(part: Any, where: str) -> Hashable:
    tensors = [x for x in pytree.tree_leaves(part) if isinstance(x, Tensor)]
    if tensors:
        raise TraceError(
            f"the loss function ({where}) reads a tensor of {list(tensors[0].shape)} that is none of its arguments; a "
            "trace would freeze its values; pass it as target=, any containers of tensors will do"
        )
    if isinstance(part, tuple):
        return tuple(_part_key(p, where if i == 0 else str(part[0])) for i, p in enumerate(part))
    return part if isinstance(part, _PLAIN) else _Same(part)
