"""A few training steps of a partitioned model on generated data, timed beside the plan's forecast."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from graphpart.demo.models import Example
from graphpart.errors import GraphpartError
from graphpart.ir.timeline import Timeline
from graphpart.runtime.module import PartitionedModule
from graphpart.runtime.verify import default_loss

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Training:
    """What some training steps gave.

    Attributes:
        losses: per step.
        times_s: per step, forward and backward, in seconds; the optimizer's own time is not in it.
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


def record(parted: PartitionedModule, example: Example) -> Timeline:
    """The measured timeline of one step, forward and backward, as :func:`train` takes it, without an update.

    Args:
        parted: the partitioned model.
        example: its arguments.
    """
    parted.zero_grad()
    parted.record = True
    default_loss(parted(*example.args, **example.kwargs)).backward()
    parted.record = False
    parted.zero_grad()
    return parted.timeline()


def train(parted: PartitionedModule, example: Example, steps: Iterable[Any], optimizer: str, lr: float) -> Training:
    """Train on the same generated batch, step by step.

    Args:
        parted: the partitioned model.
        example: its arguments.
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
        loss = default_loss(parted(*example.args, **example.kwargs))
        loss.backward()
        times_s.append(time.perf_counter() - start_s)
        updates.step()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            raise GraphpartError(f"the loss is {losses[-1]} after {len(losses)} steps; try a smaller --lr")
    return Training(tuple(losses), tuple(times_s))
