"""What a step does with the gradients that a device makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from graphpart.ir.program import Wire
from graphpart.runtime.device.device_code import BackwardCode
from graphpart.runtime.device.ordered_sum import OrderedSum


class Collector(Protocol):
    """Takes gradients of parameters, on the workers' threads."""

    def keep(self, wire: Wire, gradient: Tensor, is_own: bool) -> None:
        """Take the gradient of a parameter's wire, and whether nobody else has its memory."""


class StepWork(Collector, Protocol):
    """What a fused step does with gradients, on the workers' threads."""

    def update(self, device: int) -> None:
        """Update the parameters whose last gradient came from a device."""

    def update_early(self, gradients: Sequence[tuple[Wire, Tensor]]) -> None:
        """Update parameters that a device has to itself, by some of their gradients."""


class Gradients:
    """The gradients of one backward pass under way on one device.

    Attributes:
        code: this device's part of the backward pass.
        seeds: gradients of live wires, as given.
        collector: takes the gradients of parameters at home here.
        sums: per wire, what this device's segments have made of its gradient so far.
        kept: whether those of parameters at home here have gone to the collector.
    """

    def __init__(self, code: BackwardCode, seeds: Mapping[str, Tensor], collector: Collector) -> None:
        self.code, self.seeds, self.collector = code, seeds, collector
        self.sums = {name: OrderedSum(len(own)) for name, own in code.position.items() if own}
        self.kept = False
