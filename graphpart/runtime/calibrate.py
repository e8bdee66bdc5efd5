"""Measuring every task of a fused step alone: all devices run their tasks, but only one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from graphpart.cost.calibration import Calibration
from graphpart.errors import GraphpartError
from graphpart.runtime.local import LocalExecutor
from graphpart.runtime.module import PartitionedModule
from graphpart.runtime.state import ModelState


def calibrate(parted: PartitionedModule, *args: Any, num_rounds: int = 3, **kwargs: Any) -> Calibration:
    """Measure how long each task of a fused training step takes when no other runs.

    ``gp.simulate(parted.plan, calibration)`` then forecasts the step with these times. The step runs as
    ``parted.train_step`` runs it, on the devices of the plan, but one task at a time; a first round warms up.
    Parameters, buffers, gradients and the optimizer's state are put back afterwards; meanwhile there are two of each.

    Args:
        parted: the partitioned model.
        *args: the model's arguments.
        num_rounds: steps to measure; each task's time is the median over them and over microbatches.
        **kwargs: what :meth:`~graphpart.runtime.module.PartitionedModule.train_step` takes. Without ``optimizer``, an
            update only adds up gradients.

    Raises:
        GraphpartError: if the devices are those of several processes.
        AutogradError: if there is nothing to train.
    """
    executor = parted._executor
    if not isinstance(executor, LocalExecutor):
        raise GraphpartError(
            "calibrate lets the devices of one process take turns; under torchrun each has a process of its own"
        )
    timelines = []
    with _put_back(parted._state, kwargs.get("optimizer")), executor.one_at_a_time():
        for _ in range(1 + num_rounds):
            timelines.append(parted.train_step(*args, record=True, **kwargs).timeline)
    assert parted.last_step is not None and parted.last_step.step is not None
    workload = parted.last_step.step.launch.training.workload
    return Calibration.of(workload, timelines[1:])


@contextmanager
def _put_back(state: ModelState, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Leave the model, its gradients, the optimizer and torch's generator as they were."""
    tensors = list(state.tensors.values())
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [tensor.grad for tensor in tensors]
    optimizer_state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value, gradient in zip(tensors, values, gradients, strict=True):
                tensor.copy_(value)
                tensor.grad = gradient
        if optimizer is not None and optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(generator)
