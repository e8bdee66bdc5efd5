"""What users hang on parameters and optimizers counts in a fused step as it does in a plain one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp


def halve(gradient: Tensor) -> Tensor:
    return gradient * 0.5


def halve_sum(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def hook_on_gradient(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    next(model.parameters()).register_hook(halve)


def hook_after_sum(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    next(model.parameters()).register_post_accumulate_grad_hook(halve_sum)


def own_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All gradients shrink together before the step: each needs those of all devices."""
    step = optimizer.step

    def shrunk(closure: Any = None) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        size = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients:
            gradient.div_(size)
        step()

    optimizer.step = shrunk  # type: ignore[method-assign]


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("hang", [hook_on_gradient, hook_after_sum, own_step, scheduled])
def test_what_hangs_on_parameters_and_optimizers_counts(hang: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
    parted = gp.partition(copy.deepcopy(plain), 2, strategy="layer", num_microbatches=2)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (parted, plain))
    hang(parted, ours)
    hang(plain, theirs)
    for step in range(4):
        x = torch.randn(4, 6, dtype=torch.float64)
        F.mse_loss(plain(x), x).backward()
        last = step % 2 == 1
        parted.train_step(x, target=x, loss_fn=F.mse_loss, optimizer=ours if last else None)
        if last:
            theirs.step()
            theirs.zero_grad()
        for a, b in zip(parted.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
