"""The calls that TorchDynamo follows: of a model alone, and of a model with a loss behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.trace.dynamo.changes import RESULT, TENSOR
from graphpart.trace.dynamo.piece import mark_loss
from graphpart.trace.loss import NO_TARGET, Loss, as_loss, own_loss


def plain_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's result."""
    return model(*args, **kwargs)


def step_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any, given: tuple[Any, ...]
) -> tuple[Tensor, Any]:
    """The loss, marked, and the model's result."""
    result = model(*args, **kwargs)
    loss = own_loss(result) if function is None else function(result, *given)
    return mark_loss(as_loss(loss, function is None, result)), result


def watched_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As :func:`plain_call`, to be watched: TorchDynamo does not guard what is only passed on, so it is looked at."""
    result = model(*args, **kwargs)
    RESULT.description = _described(result)
    return result


def watched_step(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any, given: tuple[Any, ...]
) -> tuple[Tensor, Any]:
    """As :func:`step_call`, to be watched."""
    loss, result = step_call(model, args, kwargs, function, given)
    RESULT.description = (TENSOR, _described(result))
    return loss, result


def _described(value: Any) -> Any:
    """What a result consists of, in texts."""
    if isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, Mapping):
        return tuple([(f"{key!r}", _described(part)) for key, part in value.items()])
    if isinstance(value, (list, tuple)):
        return tuple([_described(part) for part in value])
    if hasattr(type(value), "__dataclass_fields__"):
        return tuple([_described(getattr(value, name)) for name in type(value).__dataclass_fields__])
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return f"{value!r}"  # its value, not only its type
    return "nothing" if value is None else "an object"


def bindings_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss | None) -> dict[str, Any]:
    """The arguments of :func:`plain_call`, or of :func:`step_call` where there is a loss."""
    found = {"model": model, "args": args, "kwargs": kwargs}
    if loss is not None:
        found |= {"function": loss.function, "given": () if loss.target is NO_TARGET else (loss.target,)}
    return found


def loss_tensors(loss: Loss | None) -> list[torch.Tensor]:
    """Parameters and buffers of a loss that is a module: each call brings them along as arguments."""
    function = None if loss is None else loss.function
    return [*function.parameters(), *function.buffers()] if isinstance(function, nn.Module) else []
