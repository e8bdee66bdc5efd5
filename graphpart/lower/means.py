"""Rewrite means over samples as a sum and a count, so that parts of a batch add up exactly.

The mean of two microbatches' means is not the batch's mean where labels are ignored. A mean loss becomes
``sum(loss) / count``: the sum is partial per microbatch, the count depends on the labels alone, and a division
by a whole value is linear in its numerator, so the parts of the quotient add up too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from typing import Any

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Graph, Operator, Ref, Symbol, Value
from graphpart.lower.samples import Samples
from graphpart.rules import rule_for

_MEAN, _SUM = 1, 2  # torch's numbers for reductions


@dataclass(frozen=True, slots=True)
class _Loss:
    """A loss with a ``reduction`` argument: its position, and where its class weights and ignored label are."""

    reduction: int
    weight: int | None = None
    ignore_index: int | None = None


_LOSSES: Mapping[str, _Loss] = {
    "aten.cross_entropy_loss.default": _Loss(3, weight=2, ignore_index=4),
    "aten.nll_loss.default": _Loss(3, weight=2, ignore_index=4),
    "aten.nll_loss_nd.default": _Loss(3, weight=2, ignore_index=4),
    "aten.nll_loss2d.default": _Loss(3, weight=2, ignore_index=4),
    "aten.mse_loss.default": _Loss(2),
    "aten.l1_loss.default": _Loss(2),
    "aten.smooth_l1_loss.default": _Loss(2),
    "aten.huber_loss.default": _Loss(2),
    "aten.binary_cross_entropy.default": _Loss(3),
    "aten.binary_cross_entropy_with_logits.default": _Loss(4),
    "aten.soft_margin_loss.default": _Loss(2),
    "aten.kl_div.default": _Loss(2),
}
_MEANS = {"aten.mean.default", "aten.mean.dim"}


def expose_means(graph: Graph, samples: Samples) -> tuple[Graph, Mapping[str, str]]:
    """Rewrite every mean that reduces over samples.

    Args:
        graph: the traced graph.
        samples: its sample axis.

    Returns:
        The rewritten graph, and for each new operator the name of the one it stands in for.
    """
    operators: list[Operator] = []
    stands_for: dict[str, str] = {}
    for op in graph.operators:
        parts: list[Operator] = [op]
        # float16 sums overflow where the mean would not; such a mean stays whole.
        if op.name in samples.barriers and op.rule is not None and op.results[0].dtype != "float16":
            if op.target in _MEANS:
                parts = _split_mean(graph, op)
            elif op.target in _LOSSES and _argument(op, _LOSSES[op.target].reduction, _MEAN) == _MEAN:
                parts = _split_loss(graph, op, _LOSSES[op.target])
        operators += parts
        stands_for.update((part.name, op.name) for part in parts if part is not op)
    if not stands_for:
        return graph, {}
    return replace(graph, operators=tuple(operators)), stands_for


def _split_mean(graph: Graph, op: Operator) -> list[Operator]:
    (result,) = op.results
    count = graph.values[op.operands[0]].num_elements // max(result.num_elements, 1)
    total = replace(result, name=f"{op.name}.sum")
    target = "aten.sum.default" if op.target == "aten.mean.default" else "aten.sum.dim_IntList"
    return [
        _reduction(graph, op, total, target, op.args),
        _quotient(op, result, total, float(count)),
    ]


def _split_loss(graph: Graph, op: Operator, loss: _Loss) -> list[Operator]:
    (result,) = op.results
    total = replace(result, name=f"{op.name}.sum")
    args = op.args + (None,) * (loss.reduction - len(op.args))
    args = (*args[: loss.reduction], _SUM, *args[loss.reduction + 1 :])
    parts = [_reduction(graph, op, total, op.target, args)]
    scores, labels = (graph.values[name] for name in op.operands[:2])
    if loss.ignore_index is None:
        elements = prod(max(pair) for pair in zip_longest(scores.shape[::-1], labels.shape[::-1], fillvalue=1))
        return [*parts, _quotient(op, result, total, float(elements))]
    if labels.dtype.startswith(("float", "bfloat")):  # labels are probabilities: the mean is over all but the classes
        classes = scores.shape[1 if len(scores.shape) > 1 else 0]
        return [*parts, _quotient(op, result, total, float(scores.num_elements // classes))]
    count = _count_labels(graph, op, labels, loss, Value(f"{op.name}.count", (), result.dtype))
    return [*parts, count, _quotient(op, result, total, Ref(count.name))]


def _count_labels(graph: Graph, op: Operator, labels: Value, loss: _Loss, result: Value) -> Operator:
    """How many labels count, or the sum of their classes' weights; it depends on no score."""
    axes = {f"l{i}": extent for i, extent in enumerate(labels.shape)}
    operands: list[tuple[tuple[str, ...], ...]] = [tuple((axis,) for axis in axes)]
    ignored = _argument(op, loss.ignore_index or 0, -100)
    args: tuple[Any, ...] = (Ref(labels.name), ignored, Symbol("dtype", result.dtype))
    weight = _argument(op, loss.weight or 0, None)
    if isinstance(weight, Ref):
        args += (weight,)
        operands.append((("classes",),))
        extents = {**axes, "classes": graph.values[weight.name].shape[0]}
    else:
        extents = axes
    rule = AxisRule(extents, tuple(operands), ((),), sums=frozenset(axes), whole=frozenset(extents) - frozenset(axes))
    return _stand_in(op, result, "graphpart.count_labels", args, rule)


def _reduction(graph: Graph, op: Operator, result: Value, target: str, args: tuple[Any, ...]) -> Operator:
    """The same reduction as a sum; it has all of the mean's cost."""
    shape_of = lambda name: graph.values[name].shape  # noqa: E731
    rule = rule_for(target, args, op.kwargs, shape_of, [result.shape], False)
    return replace(op, name=result.name, target=target, args=args, results=(result,), rule=rule)


def _quotient(op: Operator, result: Value, total: Value, count: Ref | float) -> Operator:
    """``total / count``: linear in the total, so partial totals give partial quotients."""
    axes = {f"r{i}": extent for i, extent in enumerate(result.shape)}
    dims = tuple((axis,) for axis in axes)
    operands = (dims, ()) if isinstance(count, Ref) else (dims,)
    rule = AxisRule(axes, operands, (dims,), linear=((0,),))
    return _stand_in(op, result, "aten.div.Tensor", (Ref(total.name), count), rule)


def _stand_in(op: Operator, result: Value, target: str, args: tuple[Any, ...], rule: AxisRule) -> Operator:
    return replace(
        op,
        name=result.name,
        target=target,
        args=args,
        kwargs={},
        results=(result,),
        rule=rule,
        flops_forward=0.0,
        flops_backward=0.0,
        saved=(),
        saved_extra_bytes=0,
    )


def _argument(op: Operator, position: int, default: Any) -> Any:
    return op.args[position] if len(op.args) > position else default
