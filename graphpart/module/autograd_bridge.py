"""Tie a step to the caller's autograd, so that ``loss.backward()`` runs the program's backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphpart.errors import AutogradError


@dataclass
class Pending:
    """A forward whose backward may come.

    Attributes:
        run_backward: takes gradients of outputs by wire, gives one per source; None once it has run, which frees all.
        seeds: gradients of outputs that have arrived.
    """

    run_backward: Callable[[dict[str, Tensor]], Sequence[Tensor | None]] | None
    seeds: dict[str, Tensor] = field(default_factory=dict)


class _Program(torch.autograd.Function):
    """All of a step's backward as one node. Its output is a CPU scalar, so the node runs on the calling thread and
    never blocks the autograd thread of a GPU that a worker needs.
    """

    @staticmethod
    def forward(ctx: Any, pending: Pending, *sources: Tensor) -> Tensor:
        ctx.pending = pending
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        pending: Pending = ctx.pending
        _refuse_second_use(pending)
        run, pending.run_backward = pending.run_backward, None
        seeds, pending.seeds = pending.seeds, {}
        assert run is not None
        return (None, *run(seeds))


class _Output(torch.autograd.Function):
    """Hands the gradient of one output over to the step."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, pending: Pending, wire: str, output: Tensor) -> Tensor:
        ctx.pending, ctx.wire = pending, wire
        return output.detach()  # no view to autograd, so that the caller may change it in place; yet changes are seen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        _refuse_second_use(ctx.pending)
        ctx.pending.seeds[ctx.wire] = gradient
        return torch.zeros(()), None, None, None


def attach(pending: Pending, sources: Sequence[Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs that, when differentiated, run the step's backward and give gradients to the sources.

    Args:
        pending: the step.
        sources: parameters and inputs that want a gradient.
        outputs: differentiable outputs by wire.
    """
    token = _Program.apply(pending, *sources)
    return {wire: _Output.apply(token, pending, wire, output) for wire, output in outputs.items()}


def _refuse_second_use(pending: Pending) -> None:
    if torch.is_grad_enabled():
        raise AutogradError(
            "create_graph=True (double backward) cannot cross the bridges of a partitioned model, since its workers "
            "keep no graph of their backward; compute the penalty's gradient on the unpartitioned module"
        )
    if torch._C._autograd._get_current_graph_task_keep_graph():
        raise AutogradError(
            "retain_graph=True cannot cross the bridges of a partitioned model, since its workers free their values in "
            "the backward; add up the losses and call backward once, or call the model again for each loss"
        )
    if pending.run_backward is None:
        raise AutogradError(
            "the backward of this call has already run and has freed its values; add up the losses and call backward "
            "once, or call the model again for each loss"
        )
