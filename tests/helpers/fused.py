"""What the oracle needs to run a case as one fused training step: a loss that traces, and any order of its tasks."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from graphpart.ir.schedule import Schedule, Task
from graphpart.ir.workload import Workload
from graphpart.order import SCHEDULES
from graphpart.order.list_scheduler import Durations
from graphpart.planning import fused_step as scheduling
from graphpart.trace.loss import Loss

ANY_ORDER = {"random": "list", "random split": "zero-bubble"}
"""Random orders, and the schedule whose workload each takes: one task a backward, or two."""

FUSED = (*SCHEDULES, "auto", *ANY_ORDER)


def is_split(schedule: str) -> bool | None:
    """Whether a schedule makes gradients of weights apart; None if that is for ``auto`` to say."""
    return None if schedule == "auto" else SCHEDULES[ANY_ORDER.get(schedule, schedule)].split


def any_order(workload: Workload, rng: random.Random) -> Schedule:
    """All tasks of a step in one order that respects what they wait for, and nothing else."""
    waits_for = workload.waits_for
    left, done = list(waits_for), set[Task]()
    lines: list[list[Task]] = [[] for _ in range(workload.program.num_devices)]
    while left:
        task = rng.choice([t for t in left if all(other in done for other in waits_for[t])])
        left.remove(task)
        done.add(task)
        lines[workload.device_of[task]].append(task)
    return Schedule("random", tuple(map(tuple, lines)))


@contextlib.contextmanager
def ordered_by(schedule: str, seed: int) -> Iterator[str]:
    """Gives the name to plan with; where the schedule is a random one, steps planned inside are in any order."""

    def choose(name: str, workload: Workload, durations: Durations | None = None) -> Schedule:
        assert workload.split == SCHEDULES[name].split
        return any_order(workload, random.Random(seed))

    if schedule in ANY_ORDER:
        with mock.patch.object(scheduling, "make_schedule", choose):
            yield ANY_ORDER[schedule]
    else:
        yield schedule


def weighted_sum(result: Any, weights: list[Tensor], indices: tuple[int, ...], way: str) -> Tensor:
    """A loss over some outputs.

    Args:
        result: the model's.
        weights: one for each output that takes part, of its shape.
        indices: places of these among the leaves of the result.
        way: ``sum`` and ``mean`` are additive over samples, ``root`` is not.
    """
    leaves = pytree.tree_leaves(result)
    terms = [leaves[i] * weight for i, weight in zip(indices, weights, strict=True)]
    if way == "sum":
        return torch.stack([term.sum() for term in terms]).sum()
    squares = torch.stack([term.square().mean() for term in terms]).sum()
    return squares if way == "mean" else (squares + 1).sqrt()


@dataclass(frozen=True)
class FusedLoss:
    """What ``train_step`` takes for a loss: either all of it, or nothing where the model's own loss is trained on.

    Attributes:
        options: the arguments.
    """

    options: dict[str, Any]

    @classmethod
    def draw(cls, result: Any, seed: int) -> FusedLoss | None:
        """A random loss over what a model gives; None if no gradient would come of it."""
        rng = random.Random(seed)
        leaves = pytree.tree_leaves(result)
        indices = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.grad_fn is not None]
        own = result.get("loss") if isinstance(result, dict) else leaves[0]
        if own is not None and own.numel() == 1 and own.grad_fn is not None and rng.random() < 0.4:
            return cls({})
        if len(indices) > 1 and rng.random() < 0.4:
            indices = sorted(rng.sample(indices, rng.randint(1, len(indices) - 1)))
        if not indices:
            return None
        draw = torch.Generator().manual_seed(seed)
        weights = [torch.rand(leaves[i].shape, generator=draw, dtype=torch.float64) + 0.5 for i in indices]
        way = rng.choice(["sum", "mean", "root"])
        return cls(
            {
                "loss_fn": functools.partial(weighted_sum, indices=tuple(indices), way=way),
                "target": [weight.to(leaves[i].dtype) for i, weight in zip(indices, weights, strict=True)],
            }
        )

    @property
    def traced(self) -> Loss:
        """What a trace of the step takes."""
        return Loss(self.options.get("loss_fn"), *([self.options["target"]] if self.options else []), with_outputs=True)

    def __call__(self, result: Any) -> Tensor:
        """The loss of the plain model's result."""
        if self.options:
            loss: Tensor = self.options["loss_fn"](result, self.options["target"])
            return loss
        own: Tensor = result["loss"] if isinstance(result, dict) else pytree.tree_leaves(result)[0]
        return own.reshape(())
