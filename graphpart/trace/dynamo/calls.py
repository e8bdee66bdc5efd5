"""The calls that TorchDynamo follows: of a model alone, and of a model with a loss behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
