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
from graphpart.ir.graph import Graph, Operator, Ref, Symbol, Value, map_refs
from graphpart.ir.placement import Tile
from graphpart.lower.rewrites.standin import StandIn, fit, stand_in
from graphpart.rules import rule_for
from graphpart.rules.local.wide import NARROW, QUOTIENT, WIDE

_SUM = 2  # torch's number for a sum


@dataclass(frozen=True, slots=True)
class _Loss:
    """A loss with a ``reduction`` argument: its position, and where its class weights and ignored label are."""

    reduction: int
    weight: int | None = None
    ignore_index: int | None = None


LOSSES: Mapping[str, _Loss] = {
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
MEANS = ("aten.mean.default", "aten.mean.dim")


def split_mean(graph: Graph, op: Operator, tiles: tuple[Tile, ...]) -> list[StandIn]:
    """``sum(x) / count``."""
    (result,) = op.results
    count = graph.values[op.operands[0]].num_elements // max(result.num_elements, 1)
    total = total_of(op)
    target = "aten.sum.default" if op.target == "aten.mean.default" else "aten.sum.dim_IntList"
    return [_total(graph, op, total, target, op.args, tiles), quotient(op, result, total, float(count), tiles)]


def split_loss(graph: Graph, op: Operator, tiles: tuple[Tile, ...]) -> list[StandIn]:
    """``sum of losses / how many count``."""
    loss, (result,) = LOSSES[op.target], op.results
    total = total_of(op)
    args = op.args + (None,) * (loss.reduction - len(op.args))
    args = (*args[: loss.reduction], _SUM, *args[loss.reduction + 1 :])
    parts = [_total(graph, op, total, op.target, args, tiles)]
    scores, labels = (graph.values[name] for name in op.operands[:2])
    if loss.ignore_index is None:
        elements = prod(max(pair) for pair in zip_longest(scores.shape[::-1], labels.shape[::-1], fillvalue=1))
        return [*parts, quotient(op, result, total, float(elements), tiles)]
    if labels.dtype.startswith(("float", "bfloat")):  # labels are probabilities: the mean is over all but the classes
        classes = scores.shape[1 if len(scores.shape) > 1 else 0]
        return [*parts, quotient(op, result, total, float(scores.num_elements // classes), tiles)]
    counting = count_labels(graph, op, tiles)
    return [*parts, *counting, quotient(op, result, total, Ref(counting[-1].operator.name), tiles)]


def count_labels(graph: Graph, op: Operator, tiles: tuple[Tile, ...]) -> list[StandIn]:
    """How many labels count, or the sum of their classes' weights, as the last of some operators.

    It depends on no score, and is computed once, from all labels: where these are made from an input, they are made
    again, so that the count waits for no microbatch and a microbatch's part of the loss is known when its scores are.
    """
    loss, device = LOSSES[op.target], tiles[0].device
    made, labels = _made_again(graph, op, device)
    result = Value(f"{op.name}.labels.count", (), total_of(op).dtype)
    axes = {f"l{i}": extent for i, extent in enumerate(labels.shape)}
    operands: list[tuple[tuple[str, ...], ...]] = [tuple((axis,) for axis in axes)]
    ignored = _argument(op, loss.ignore_index or 0, -100)
    args: tuple[Any, ...] = (Ref(labels.name), ignored, Symbol("dtype", result.dtype))
    weight = _argument(op, loss.weight or 0, None)
    extents = dict(axes)
    if isinstance(weight, Ref):
        args += (weight,)
        operands.append((("classes",),))
        extents["classes"] = graph.values[weight.name].shape[0]
    rule = AxisRule(extents, tuple(operands), ((),), whole=frozenset(extents))
    count = stand_in(op, "graphpart.count_labels", args, (result,), rule)
    return [*made, StandIn(count, (Tile(device),))]


def _made_again(graph: Graph, op: Operator, device: int) -> tuple[list[StandIn], Value]:
    """The operators between an input and a loss's labels, once more and whole; and the labels that they make."""
    name, chain = op.operands[1], []
    while (maker := graph.producer.get(name)) is not None:
        if maker.random or len(maker.operands) != 1 or len(maker.results) != 1:
            return [], graph.values[op.operands[1]]
        chain.append(maker)
        name = maker.operands[0]
    labels = graph.values[name]
    if graph.source[name].kind != "input":
        return [], graph.values[op.operands[1]]
    made = []
    for maker in reversed(chain):
        result = replace(maker.results[0], name=f"{op.name}.labels.{maker.name}")
        args, kwargs = map_refs((maker.args, dict(maker.kwargs)), lambda _, name=labels.name: Ref(name))  # type: ignore[misc]
        again = stand_in(maker, maker.target, args, (result,), None, kwargs=kwargs)
        made.append(StandIn(again, (Tile(device),)))
        labels = result
    return made, labels


def quotient(op: Operator, result: Value, total: Value, count: Ref | float, tiles: tuple[Tile, ...]) -> StandIn:
    """``total / count``: linear in the total, so partial totals give partial quotients.

    One number is divided once; a larger result on every device that the operator was on.
    """
    assert op.rule is not None
    dims = op.rule.results[0]
    axes = {axis: op.rule.extents[axis] for dim in dims for axis in dim}
    operands = (dims, ()) if isinstance(count, Ref) else (dims,)
    rule = AxisRule(axes, operands, (dims,), linear=((0,),))
    target = "aten.div.Tensor"
    args: tuple[Any, ...] = (Ref(total.name), count)
    if result.dtype != total.dtype:
        target, args = QUOTIENT, (*args, Symbol("dtype", result.dtype))
    made = stand_in(op, target, args, (result,), rule)
    return StandIn(made, fit(tiles, rule, replicas=result.num_elements > 1))


def total_of(op: Operator) -> Value:
    """The sum that a mean comes from; a half-precision mean's is float32, for its sum may be too large."""
    (result,) = op.results
    return replace(result, name=f"{op.name}.sum", dtype=WIDE if result.dtype in NARROW else result.dtype)


def _total(
    graph: Graph, op: Operator, result: Value, target: str, args: tuple[Any, ...], tiles: tuple[Tile, ...]
) -> StandIn:
    """The same reduction as a sum; its backward keeps what the mean's does, and it has the mean's tiles."""
    rule = rule_for(target, args, op.kwargs, lambda name: graph.values[name].shape, [result.shape], False)
    kwargs, extra = dict(op.kwargs), op.saved_extra_bytes
    if result.dtype != op.results[0].dtype and target in LOSSES:
        target, args = "graphpart.wide", (target, *args)
        extra += sum(2 * graph.values[name].size_bytes for name in op.saved if graph.values[name].dtype in NARROW)
    elif result.dtype != op.results[0].dtype:
        kwargs["dtype"] = Symbol("dtype", result.dtype)
    made = stand_in(op, target, args, (result,), rule, kwargs=kwargs, saved=op.saved, saved_extra_bytes=extra)
    return StandIn(made, tiles)


def _argument(op: Operator, position: int, default: Any) -> Any:
    return op.args[position] if len(op.args) > position else default
