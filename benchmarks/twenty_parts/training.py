"""What is done with one model: trained on one device and partitioned, from the same values, on the same batches."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import graphpart as gp
from graphpart.errors import GraphpartError
from graphpart.module.verify import FLOOR, relative_difference

WORKERS = 3
NUM_STEPS = 20
TOLERANCE = 1e-5
"""Largest relative difference, of a loss and of a parameter, after all steps in float32."""

MODES: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "layer": ({"strategy": "layer"}, False),
    "hybrid": ({"strategy": "hybrid"}, False),
    "feature": ({"strategy": "feature"}, False),
    "layer, fused": ({"strategy": "layer"}, True),
    "hybrid, fused": ({"strategy": "hybrid"}, True),
}
"""Choices, and whether steps are ``train_step``; else ``loss.backward()`` and ``optimizer.step()``."""


@dataclass(frozen=True)
class Training:
    """A model and what it is trained on.

    Attributes:
        model: in training mode, and without dropout, whose masks another device would draw differently.
        batches: keyword arguments of calls, which take turns.
        loss: of a result; None where the model returns its loss.
        optimizer: over parameters.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Any]]
    loss: Callable[[Any], Tensor] | None
    optimizer: Callable[[Any], torch.optim.Optimizer]


Maker = Callable[[], Training]


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind: the loss of each step, and parameters and buffers at the end."""

    losses: list[float]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Compared:
    """A partitioned training beside the plain one.

    Attributes:
        status: ``equal``, ``wrong``, ``refused`` (by a named error) or ``error``.
        loss_difference: the largest of a step, relative.
        state_difference: the largest of a parameter or buffer at the end, relative to its largest element, or to a
            hundredth of the largest of all, as some parameters are nothing but rounding.
        share: of the FLOPs of a forward, those in planned graphs; or of the elements of parameters, those that graphs
            and islands read, if that is less.
        devices: workers that compute.
        time_s: of all steps.
        reason: what differs most, or the error; else what is not planned.
    """

    status: str
    loss_difference: float = 0.0
    state_difference: float = 0.0
    share: float = 0.0
    devices: int = 0
    time_s: float = 0.0
    reason: str = ""


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW whose steps do not make something of gradients that are nothing but rounding."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)


def compare(training: Training, plain: Trained, mode: str, num_steps: int = NUM_STEPS) -> Compared:
    """Train partitioned, and say what differs."""
    choices, fused = MODES[mode]
    start_s = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parted = gp.partition(copy.deepcopy(training.model), WORKERS, **choices)
            found = train(parted, training, num_steps, fused)
    except GraphpartError as reason:
        return Compared("refused", reason=_first_line(reason))
    except Exception as reason:
        return Compared("error", reason=f"{type(reason).__name__}: {_first_line(reason)}")
    spent_s = time.monotonic() - start_s
    losses = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found.losses, plain.losses, strict=True)]
    floor = FLOOR * max(float(x.abs().max()) for x in plain.state.values() if x.numel())
    state = {name: relative_difference(found.state[name], value, floor) for name, value in plain.state.items()}
    coverage = parted.coverage
    devices = {segment.device for plan in coverage.plans for segment in plan.program.segments}
    reason, status = _first_line("; ".join(coverage.notes)), "equal"
    worst = max(state, key=state.__getitem__)
    if not (max(losses) <= TOLERANCE and state[worst] <= TOLERANCE and found.state.keys() == plain.state.keys()):
        status, late = "wrong", next((i for i, x in enumerate(losses) if not x <= TOLERANCE), None)
        reason = f"loss of step {late} off first; at the end most: {worst}"
    share = min(coverage.share, 1 - coverage.unread_share)
    return Compared(status, max(losses), state[worst], share, len(devices), round(spent_s, 1), reason)


def train(model: nn.Module, training: Training, num_steps: int, fused: bool = False) -> Trained:
    """So many steps, as anyone would write them."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    optimizer = training.optimizer(model.parameters())
    losses = []
    for i in range(num_steps):
        batch = tree_map_only(Tensor, Tensor.clone, dict(training.batches[i % len(training.batches)]))
        if fused:
            loss = model.train_step(optimizer=optimizer, loss_fn=training.loss, **batch).loss  # type: ignore[operator]
        else:
            result = model(**batch)
            loss = result.loss if training.loss is None else training.loss(result)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return Trained(losses, {name: value.detach().clone() for name, value in model.state_dict().items()})


def _first_line(reason: object) -> str:
    return " ".join(str(reason).split())[:300]
