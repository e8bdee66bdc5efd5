"""Operators whose backward leaves the gradients of weights for later.

One backward over a graph that was asked twice, for inputs and then for weights, costs more than one that was asked once
(each pass makes the gradients between them again). Here the operator's own backward makes the gradients of its inputs
and notes what those of its weights need: its input and its result's gradient. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphpart.rules.weights import NUM_PADDED, PADDED
from graphpart.runtime.kernels.operand_gradients import OPERAND_GRADIENTS, OperandGradient
from graphpart.runtime.kernels.tile_kernels import embedding_part, padded
from graphpart.trace.names import resolve


@dataclass(frozen=True)
class Late:
    """The gradient of one weight in one call, still to be made.

    Attributes:
        step: number of the call in its segment.
        edge: where the gradient goes on from the weight.
        made_by: how it is made.
        shape: of the weight.
        gradient: of the call's result.
        operands: of the call, as far as they are needed.
        versions: how often each of these had been changed in place.
    """

    step: int
    edge: GradientEdge
    made_by: OperandGradient
    shape: torch.Size
    gradient: Tensor
    operands: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @torch.no_grad()
    def make(self) -> Tensor:
        """The gradient, in memory of its own.

        Raises:
            RuntimeError: if an operand has been changed in place since.
        """
        self._check()
        return self.made_by.make(self.gradient, self.shape, *self.operands)

    @torch.no_grad()
    def add_to(self, total: Tensor | None, is_own: bool) -> tuple[Tensor, bool]:
        """A sum with the gradient added, and whether it may be changed in place.

        Where the sum may be, and an operator adds in place what it makes, the gradient takes no memory.

        Raises:
            RuntimeError: if an operand has been changed in place since.
        """
        if total is None or not is_own or self.made_by.add is None:
            made = self.make()
            return (made, True) if total is None else (total.add_(made) if is_own else made.add_(total), True)
        self._check()
        self.made_by.add(total, self.gradient, self.shape, *self.operands)
        return total, True

    def _check(self) -> None:
        if tuple(operand._version for operand in self.operands) != self.versions:
            raise RuntimeError("a value needed for the gradient of a weight has been modified by an inplace operation")


def late_gradients(
    late: list[Late], weights: Sequence[Tensor]
) -> tuple[Sequence[Tensor | None], Sequence[Sequence[Late]]]:
    """Gradients of a segment's weights from what its calls have left, in the order of the calls.

    Args:
        late: what they left; taken away one by one, so that memory comes free.
        weights: the segment's own views of its weights.

    Returns:
        Per weight, what is made: where a call's weight is cast or cut from the segment's. And per weight, what a sum
        can take as it is: where a call reads the weight itself.
    """
    late.sort(key=lambda found: found.step, reverse=True)
    direct: dict[int, list[Late]] = {id(weight): [] for weight in weights}
    edges, made = [], []
    while late:
        found = late.pop()
        reads = direct.get(id(getattr(found.edge.node, "variable", None)))
        if reads is not None:
            reads.append(found)
        else:
            edges.append(found.edge)
            made.append(found.make())
    # What lies between a call's weight and the segment's keeps nothing, so it can be passed again.
    rest = torch.autograd.grad(edges, weights, made, allow_unused=True) if edges else (None,) * len(weights)
    return rest, list(direct.values())


def deferring_kernel(target: str) -> Callable[..., Tensor]:
    """The callable for a target whose backward leaves gradients of weights for later.

    Before the target's own arguments it takes the list in which to note them, the number of its step, and the positions
    of its weights.
    """
    if target == "graphpart.embedding_part":
        return _embedding_part
    if target == PADDED:
        return _padded
    return partial(_call, resolve(target), OPERAND_GRADIENTS[target])


def _embedding_part(late: list[Late], step: int, weights: Sequence[int], *args: Any) -> Tensor:
    target = "aten.embedding.default"
    return embedding_part(*args, look_up=partial(deferring_kernel(target), late, step, weights))


def _padded(late: list[Late], step: int, weights: Sequence[int], target: str, *args: Any) -> Any:
    places = [place - NUM_PADDED for place in weights]
    return padded(partial(deferring_kernel(target), late, step, places), *args)


def _call(
    operator: Callable[..., Tensor],
    gradients_of: Callable[..., Sequence[OperandGradient] | None],
    late: list[Late],
    step: int,
    weights: Sequence[int],
    *args: Any,
) -> Tensor:
    """One call; a plain one where its gradients have no formula, so that the first part of the backward makes them."""
    found = gradients_of(*args) if torch.is_grad_enabled() else None
    if found is None:
        return operator(*args)
    operands, options = args[: len(found)], args[len(found) :]
    found = found[: len(operands)]  # a bias may be left out
    edges = {i: get_gradient_edge(operands[i]) for i in weights if operands[i].requires_grad}
    return _Deferring.apply(partial(_plain, operator, options), found, edges, late, step, *operands)


def _plain(operator: Callable[..., Tensor], options: Sequence[Any], *operands: Tensor | None) -> Tensor:
    return operator(*operands, *options)


_NUM_SETTINGS = 5
"""Arguments of the function below that are no operands."""


class _Deferring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., Tensor],
        gradients: Sequence[OperandGradient],
        edges: dict[int, GradientEdge],
        late: list[Late],
        step: int,
        *operands: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.edges, ctx.late, ctx.step = gradients, edges, late, step
        ctx.shapes = [None if operand is None else operand.shape for operand in operands]
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[_NUM_SETTINGS:]) if needs]
        read = {place for i in wanted for place in gradients[i].reads}
        ctx.save_for_backward(*(operand if i in read else None for i, operand in enumerate(operands)))
        return operator(*operands)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.shapes)
        if gradient is not None:
            kept = ctx.saved_tensors
            for i, formula in enumerate(ctx.gradients):
                operands = tuple(kept[place] for place in formula.reads)
                if i in ctx.edges:
                    values = tuple(operand.detach() for operand in operands)  # no hold on the graph behind them
                    versions = tuple(value._version for value in values)
                    ctx.late.append(Late(ctx.step, ctx.edges[i], formula, ctx.shapes[i], gradient, values, versions))
                elif ctx.needs_input_grad[_NUM_SETTINGS + i]:
                    found[i] = formula.make(gradient, ctx.shapes[i], *operands)
        return (*[None] * _NUM_SETTINGS, *found)
