"""A loss of any result: the model's own, or one made of all its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpart.errors import VerificationError
from graphpart.trace.loss import own_loss
from graphpart.trace.tree import tensors_of


def default_loss(result: Any) -> Tensor:
    """A model's own loss, or else the mean square of all its differentiable outputs (if none is: of all)."""
    if (loss := _differentiable_loss(result)) is not None:
        return loss
    real = [t.abs() if t.is_complex() else t for t in _outputs(result)]
    terms = [(t.float() if t.dtype.itemsize < 4 else t).square().mean() for t in real]
    return torch.stack([t.to(terms[0].dtype) for t in terms]).sum()


def projection(result: Any) -> Tensor:
    """A model's own loss, or else the sum of all its differentiable outputs, each number with a weight of its own.

    The weights are normally distributed, and the same every time. A mean square will not do here: where a model ends
    with a norm of its samples, it is the same for all parameters, and its gradients are rounding errors alone.
    """
    if (loss := _differentiable_loss(result)) is not None:
        return loss
    draw = torch.Generator().manual_seed(0)
    terms = []
    for output in _outputs(result):
        real = torch.view_as_real(output) if output.is_complex() else output
        wide = real.float() if real.dtype.itemsize < 4 else real
        weights = torch.randn(real.shape, generator=draw).to(wide)
        terms.append((wide * weights).sum() / max(1, real.numel()) ** 0.5)
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def _differentiable_loss(result: Any) -> Tensor | None:
    """The model's own loss, unless it was detached, as one that is only to be shown."""
    loss = own_loss(result)
    return loss if loss is not None and loss.requires_grad else None


def _outputs(result: Any) -> list[Tensor]:
    """Tensors of a result that a loss may be made of."""
    found = [t for t in tensors_of(result) if t.is_floating_point() or t.is_complex()]
    found = [t for t in found if t.requires_grad] or found
    if not found:
        raise VerificationError("the model gives no output that can be differentiated; pass loss_fn")
    return found
