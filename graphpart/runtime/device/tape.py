"""What a segment keeps from one of its tasks for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphpart.ir.program import Segment
from graphpart.runtime.device.ordered_sum import are_own, plus
from graphpart.runtime.kernels.deferred import Late


@dataclass
class Tape:
    """What a segment keeps from its forward for its backward.

    Attributes:
        leaves: its own views of the wires that it reads and that may get a gradient, by name.
        edges: where gradients of its outputs go in, by name.
        late: where its backward leaves gradients of weights to be made apart.
    """

    leaves: Mapping[str, Tensor]
    edges: Mapping[str, GradientEdge]
    late: list[Late]

    @classmethod
    def of(cls, segment: Segment, inputs: Sequence[Tensor], outputs: Sequence[Tensor], late: list[Late]) -> Tape:
        """From what a segment read and made, and where its backward will leave what is late."""
        leaves = {n: t for n, t in zip(segment.inputs, inputs, strict=True) if t.requires_grad}
        edges = {n: get_gradient_edge(t) for n, t in zip(segment.outputs, outputs, strict=True) if t.requires_grad}
        return cls(leaves, edges, late)


@dataclass
class Unfinished:
    """What a segment keeps from its backward for the gradients of its weights.

    Attributes:
        leaves: its own views of them, by name.
        late: what is still to be made.
        begun: what its backward has made already (a weight may be read in more ways than one), with whether it may be
            changed in place.
    """

    leaves: Mapping[str, Tensor]
    late: list[Late]
    begun: Mapping[str, tuple[Tensor | None, bool]]

    def terms(self, gradients: Sequence[Tensor | None]) -> dict[str, tuple[Tensor | None, bool]]:
        """The gradients of the weights together with what was begun, and whether each may be changed in place.

        Args:
            gradients: what was made since.
        """
        found = {}
        for name, gradient, is_own in zip(self.leaves, gradients, are_own(gradients, ()), strict=True):
            begun, begun_is_own = self.begun[name]
            if gradient is None or begun is None:
                found[name] = (begun, begun_is_own) if gradient is None else (gradient, is_own)
            else:
                found[name] = plus(gradient, is_own, begun, begun_is_own)
        return found
