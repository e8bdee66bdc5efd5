"""Segments that run again for their backward: their forward keeps what it reads and nothing that it makes.

T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016), with the groups of a
placement in place of segments of equal length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from graphpart.errors import ExecutionError
from graphpart.ir.program import Segment, Wire
from graphpart.runtime.device.offload import Shelf, Shelved, is_worth_it


@contextmanager
def keeping_nothing(active: bool) -> Iterator[None]:
    """Inside, autograd keeps no tensor for a backward.

    Gradients stay on, so that the same kernels run as when something is kept: some choose by whether an operand needs
    a gradient, and would give other bits under ``no_grad``.

    Args:
        active: whether to do anything at all.
    """
    if not active:
        yield
        return
    with saved_tensors_hooks(_forget, _refuse):
        yield


def _forget(_: Tensor) -> None:
    return None


def _refuse(_: Any) -> NoReturn:
    raise AssertionError("a segment that keeps nothing was asked for its backward")


@dataclass
class Rerun:
    """What a segment needs to run again: its inputs, by reference or put away.

    Attributes:
        tensors: its inputs; None for one that was put away.
        versions: how often each had been changed in place when the segment first ran.
        away: inputs that were put away, and whether they want a gradient, by position.
    """

    tensors: list[Tensor | None]
    versions: tuple[int, ...]
    away: dict[int, tuple[Shelved, bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, segment: Segment, inputs: Collection[Tensor], overwritten: Collection[str]) -> Rerun:
        """From a segment's inputs.

        Args:
            segment: the segment that is about to run.
            inputs: what it reads, by its inputs.
            overwritten: wires of sources that change before its backward; they are copied.
        """
        kept = [
            tensor.detach().clone().requires_grad_(tensor.requires_grad) if name in overwritten else tensor
            for name, tensor in zip(segment.inputs, inputs, strict=True)
        ]
        return cls([*kept], tuple(tensor._version for tensor in kept))

    def put_away(
        self, segment: Segment, wires: Mapping[str, Wire], shelf: Shelf, shelved: MutableMapping[str, Shelved]
    ) -> None:
        """Put away what segments made; sources stay where they are anyway.

        Args:
            segment: the segment, which has run forward.
            wires: every wire by name.
            shelf: where to.
            shelved: wires that are there already, for other segments that read them.
        """
        for place, name in enumerate(segment.inputs):
            tensor = self.tensors[place]
            if tensor is None or not wires[name].segment or not is_worth_it(tensor):
                continue
            if (found := shelved.get(name)) is None:
                found = shelved[name] = shelf.put(tensor.detach())
            self.away[place] = (found, tensor.requires_grad)
            self.tensors[place] = None

    def inputs(self, segment: Segment) -> tuple[Tensor, ...]:
        """The inputs, as the segment read them.

        Raises:
            ExecutionError: if one was changed since: the segment would make other values than it did.
        """
        found = []
        for place, (name, tensor, version) in enumerate(zip(segment.inputs, self.tensors, self.versions, strict=True)):
            if tensor is None:
                shelved, wants_gradient = self.away[place]
                tensor = shelved.back().requires_grad_(wants_gradient)
            elif tensor._version != version:
                raise ExecutionError(
                    f"segment {segment.name} is to run again for its backward, but {name!r}, which it read, was "
                    "changed in place since; change it after the backward, or partition with recompute='none'"
                )
            found.append(tensor)
        return tuple(found)
