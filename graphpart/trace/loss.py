"""A loss behind a model, traced with it, so that a training step is one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
        given = (result, *([arguments["target"]] if "target" in arguments else []))
        tensors = arguments.get("loss_fn")
        if self.function is not None and tensors:
            loss = torch.func.functional_call(self.function, tensors, given)  # type: ignore[arg-type]
        else:
            loss = own_loss(result) if self.function is None else self.function(*given)
        return as_loss(loss, self.function is None, result), (result if self.with_outputs else None)


def as_loss(loss: Any, is_own: bool, result: Any) -> Tensor:
    """A loss as one number without dimensions.

    Args:
        loss: what a loss function gave, or what was found in the model's result.
        is_own: whether it was found there.
        result: the model's.

    Raises:
        TraceError: if it is no loss.
    """
    if loss is None and is_own:
        raise TraceError(
            f"the model returns a {type(result).__name__} without a loss of one number; give train_step(..., loss_fn=, "
            "target=), or what makes the model compute its loss (labels=, for models of transformers)"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"a {loss.dtype} tensor of {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TraceError(f"the loss has to be one floating-point number, not {what}; reduce it to a mean or a sum")
    return loss if loss.shape == () else loss.reshape(())


def own_loss(result: Any) -> Tensor | None:
    """The loss in a model's own result; None if it has none.

    The one rule for what is trained, verified, and run by the command line. A loss is one floating-point number: the
    result itself, its entry or attribute ``loss`` (as in transformers), or the first of a tuple.
    """
    found: Any = result
    if isinstance(result, Mapping):
        found = result.get("loss")
    elif not isinstance(result, Tensor):
        found = getattr(result, "loss", None)
        if found is None and isinstance(result, tuple) and result:
            found = result[0]
    is_loss = isinstance(found, Tensor) and found.numel() == 1 and found.is_floating_point()
    return found if is_loss else None
