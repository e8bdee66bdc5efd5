"""A few training steps of a partitioned model on generated data, timed beside the plan's forecast."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphpart.cli.models import Example
from graphpart.errors import GraphpartError
from graphpart.ir.timeline import Timeline
from graphpart.module.losses import default_loss
from graphpart.module.partitioned import PartitionedModule
from graphpart.planning.plan import Plan

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class TrainingRun:
    """What some training steps gave.

    Attributes:
        losses: per step.
        times_s: per step, forward and backward, in seconds. The update is only in that of fused steps.
    """

    losses: tuple[float, ...]
    times_s: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """The median time of a step, the first one left out where there are others."""
        return statistics.median(self.times_s[1:] or self.times_s)


def share_cores(num_workers: int) -> None:
    """Give each of several CPU workers its share of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))


def prepare(parted: PartitionedModule, example: Example, fused: bool) -> Plan:
    """Trace and plan what :func:`train` will run.

    Args:
        parted: the partitioned model.
        example: its arguments.
        fused: whether that is ``train_step``.
    """
    if fused:
        return parted.prepare_step(*example.args, loss_fn=default_loss, **example.kwargs)
    return parted.prepare(*example.args, **example.kwargs)


def record(parted: PartitionedModule, example: Example, fused: bool, optimizer: str) -> Timeline:
    """The measured timeline of one step as :func:`train` takes it; the weights stay as they are.

    Args:
        parted: the partitioned model.
        example: its arguments.
        fused: whether the step is ``train_step``.
        optimizer: whose update a fused step has: ``adamw``, ``momentum`` or ``sgd``.
    """
    parted.zero_grad()
    if fused:
        still = OPTIMIZERS[optimizer]([p for p in parted.parameters() if p.requires_grad], lr=0.0)
        for _ in range(2):  # the first makes the optimizer's state
            step = parted.train_step(
                *example.args, loss_fn=default_loss, optimizer=still, record=True, **example.kwargs
            )
        return step.timeline
    parted.record = True
    default_loss(parted(*example.args, **example.kwargs)).backward()
    parted.record = False
    parted.zero_grad()
    return parted.timeline()


def train(
    parted: PartitionedModule, example: Example, fused: bool, steps: Iterable[Any], optimizer: str, lr: float
) -> TrainingRun:
    """Train on the same generated batch, step by step.

    Args:
        parted: the partitioned model.
        example: its arguments.
        fused: whether a step is ``train_step``.
        steps: one item a step; may be a progress bar.
        optimizer: ``adamw``, ``momentum`` or ``sgd``.
        lr: learning rate.

    Raises:
        GraphpartError: if the loss is not finite.
    """
    updates = OPTIMIZERS[optimizer]([p for p in parted.parameters() if p.requires_grad], lr=lr)
    losses, times_s = [], []
    for _ in steps:
        start_s = time.perf_counter()
        updates.zero_grad()
        if fused:
            loss = parted.train_step(*example.args, loss_fn=default_loss, optimizer=updates, **example.kwargs).loss
            times_s.append(time.perf_counter() - start_s)
        else:
            loss = default_loss(parted(*example.args, **example.kwargs))
            loss.backward()
            times_s.append(time.perf_counter() - start_s)
            updates.step()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            raise GraphpartError(f"the loss is {losses[-1]} after {len(losses)} steps; try a smaller --lr")
    return TrainingRun(tuple(losses), tuple(times_s))
