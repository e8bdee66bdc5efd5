"""Kernels of BatchNorm over parts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, None, None, Tensor, Tensor]:
    """Training BatchNorm with its new running statistics as results, by the same library call as eager's."""
    mean, var = running_mean.clone(), running_var.clone()
    out = torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    return out, None, None, mean, var


def batch_norm_local(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """BatchNorm by the statistics of this part alone."""
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def batch_norm_sums(x: Tensor) -> Tensor:
    """Sum and sum of squares per channel, ``[2, channels]`` in float64 so that their difference keeps its digits."""
    wide = x.detach().double()
    dims = [d for d in range(x.dim()) if d != 1]
    return torch.stack([wide.sum(dims), (wide * wide).sum(dims)])


def batch_norm_update(
    sums: Tensor, running_mean: Tensor, running_var: Tensor, count: int, momentum: float
) -> tuple[Tensor, Tensor]:
    """New running statistics from the sums over all parts (unbiased variance, as PyTorch keeps it)."""
    mean = sums[0] / count
    var = (sums[1] - count * mean * mean) / (count - 1)
    return (
        (1 - momentum) * running_mean + momentum * mean.to(running_mean.dtype),
        (1 - momentum) * running_var + momentum * var.to(running_var.dtype),
    )


def centered_squares(x: Tensor, mean: Tensor) -> Tensor:
    """Per channel, the sum of squares about a mean, ``[channels]``."""
    dims = [d for d in range(x.dim()) if d != 1]
    return (x - _by_channel(mean, x)).square().sum(dims)


def batch_norm_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalise by given statistics, then scale and shift; all per channel, in the statistics' dtype."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    out = (x - _by_channel(mean, x)) * _by_channel(scale, x)
    return (out if bias is None else out + _by_channel(bias, x)).to(x.dtype)


def batch_norm_running(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, count: int, momentum: float
) -> tuple[Tensor, Tensor]:
    """New running statistics from a batch's mean and biased variance (kept unbiased, as PyTorch does)."""
    mean, var = mean.detach(), var.detach() * (count / max(count - 1, 1))
    return (
        (1 - momentum) * running_mean + momentum * mean.to(running_mean.dtype),
        (1 - momentum) * running_var + momentum * var.to(running_var.dtype),
    )


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))
