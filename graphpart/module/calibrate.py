"""Measuring how long every task of a fused step takes, for forecasts that rest on this machine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphpart.cost.time.calibration import Calibration
from graphpart.errors import ArgumentError
from graphpart.module.partitioned import PartitionedModule
from graphpart.runtime.parameters.model_state import ModelState


def calibrate(
    parted: PartitionedModule, *args: Any, num_rounds: int = 3, alone: bool = False, **kwargs: Any
) -> Calibration:
    """Measure how long each task of a fused training step takes.

    ``gp.simulate(parted.plan, calibration)`` then forecasts the step with these times, also by another schedule of the
    same tasks. Where an earlier call had other shapes, the plan of these steps is ``parted.last_step.plan``. They run
    as ``parted.train_step`` runs them; a first round warms up. Parameters, buffers, gradients and the optimizer's state
    are put back afterwards; meanwhile there are two of each. Under torchrun every process calls this, and all get the
    same.

    Args:
        parted: the partitioned model.
        *args: the model's arguments.
        num_rounds: steps to measure; each task's time is the median over them and over microbatches.
        alone: whether only one task runs at a time. Workers on one CPU slow each other through its caches and memory;
            by default that counts, since they will.
        **kwargs: what :meth:`~graphpart.module.partitioned.PartitionedModule.train_step` takes. Without ``optimizer``,
            an update only adds up gradients.

    Raises:
        ArgumentError: if the model is not partitioned, nothing is to be measured, or tasks are to run alone and the
            devices are those of several processes.
        AutogradError: if there is nothing to train.
    """
    if not isinstance(parted, PartitionedModule):
        raise ArgumentError(f"calibrate() takes what graphpart.partition() gave, not a {type(parted).__name__}")
    if isinstance(num_rounds, bool) or not isinstance(num_rounds, int) or num_rounds < 1:
        raise ArgumentError(f"num_rounds={num_rounds!r}; give a whole number from 1 up")
    executor, timelines = parted._traces.executor, []
    turns = executor.one_at_a_time() if alone else nullcontext()
    with _put_back(parted._state, kwargs.get("optimizer")), turns:
        for _ in range(1 + num_rounds):
            timelines.append(parted.train_step(*args, record=True, **kwargs).timeline)
    assert parted.last_step is not None
    workload = parted.last_step.plan.training.workload
    return Calibration.of(workload, itertools.chain.from_iterable(executor.gather(timelines[1:])))


@contextmanager
def _put_back(state: ModelState, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Leave the model, its gradients, the optimizer and torch's generator as they were."""
    tensors = list(state.tensors.values())
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [tensor.grad for tensor in tensors]
    states = {} if optimizer is None else {p: _copied(state) for p, state in optimizer.state.items()}
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
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(states)
        torch.set_rng_state(generator)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state of one parameter; of a tiled one its tensors are tiled, too, which can only be cloned."""
    return {name: value.clone() if isinstance(value, Tensor) else copy.copy(value) for name, value in state.items()}
