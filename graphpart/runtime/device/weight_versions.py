"""Weights that a device updates while microbatches are under way."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from graphpart.ir.workload import Workload


class Versions:
    """What the segments of one device read of its own weights, and how stale their gradients are.

    Attributes:
        weights: wires of the weights that are updated within the step.
        scale: what their gradients are multiplied by, so that each update is one of a batch of its own: the loss is a
            mean over all microbatches, and an update takes only some of them.
        num_updates: updates so far.
        staleness: per number of updates between a task's forward and its backward, how many tasks had so many.

    Args:
        workload: the tasks of the step.
        device: index of the device.
    """

    def __init__(self, workload: Workload, device: int) -> None:
        assert workload.update_every is not None
        self.weights = workload.local_weights(device)
        self.scale = max(1.0, workload.program.num_microbatches / workload.update_every)
        self.num_updates = 0
        self.staleness: Counter[int] = Counter()
        self._stash = workload.stash_weights
        self._own = frozenset(self.weights)
        self._copies: dict[str, Tensor] = {}
        self._begun: dict[str, int] = {}

    @classmethod
    def of(cls, workload: Workload, device: int) -> Versions | None:
        """Those of a device; None where nothing is updated within the step."""
        return None if workload.update_every is None else cls(workload, device)

    def read(self, name: str, weight: Tensor) -> Tensor:
        """A source as a segment is to see it: a copy of this version, or the memory that updates will change."""
        if name not in self._own:
            return weight
        if not self._stash:
            return weight.data  # with a version counter of its own: backward takes the weights of its time
        if name not in self._copies:
            self._copies[name] = weight.detach().clone()
        return self._copies[name]

    def began(self, segment: str) -> None:
        """Note that a segment goes forward."""
        self._begun[segment] = self.num_updates

    def came_back(self, segment: str) -> None:
        """Note that a segment goes backward."""
        self.staleness[self.num_updates - self._begun.pop(segment)] += 1

    def updated(self) -> None:
        """Note an update; copies of the old version live as long as a microbatch holds them."""
        self.num_updates += 1
        self._copies.clear()

    def scaled(self, name: str, gradient: Tensor, is_own: bool) -> tuple[Tensor, bool]:
        """A gradient as an update takes it."""
        if name not in self._own or self.scale == 1.0:
            return gradient, is_own
        return (gradient.mul_(self.scale) if is_own else gradient * self.scale), True
