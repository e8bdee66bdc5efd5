"""Cross-entropy over classes that are cut, without gathering the scores (Megatron-LM, Shoeybi et al. 2019, section 3).

Every tile gives the logsumexp of its own classes and the score of the label where that is among them. Both are one
number a sample; the loss is the logsumexp of logsumexps less the sum of the picked scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from graphpart.ir.axes import AxisRule, Dim
from graphpart.ir.graph import Graph, Operator, Ref, Symbol, Value
from graphpart.ir.placement import Tile
from graphpart.ir.region import Intervals
from graphpart.lower.rewrites.means import count_labels, quotient, total_of
from graphpart.lower.rewrites.standin import StandIn, fit, stand_in

_NONE, _MEAN = 0, 1  # torch's numbers for reductions
_CLASSES = "c"


def split_classes(graph: Graph, op: Operator, tiles: tuple[Tile, ...]) -> list[StandIn]:
    """Rewrite a cross-entropy with class indices as targets whose tiles cut the classes."""
    assert op.rule is not None
    rule, (result,) = op.rule, op.results
    scores, labels = op.args[:2]
    reduction = op.args[3] if len(op.args) > 3 else _MEAN
    ignored = op.args[4] if len(op.args) > 4 else -100
    score_dims, label_dims = rule.operands[:2]
    classes = score_dims.index((_CLASSES,))
    dims: tuple[Dim, ...] = tuple(d for i, d in enumerate(rule.operands[0]) if i != classes)  # type: ignore[misc]
    shape = tuple(n for i, n in enumerate(graph.values[scores.name].shape) if i != classes)
    sets = list(dict.fromkeys(tile.axes[_CLASSES] for tile in tiles))
    dtype = total_of(op).dtype
    is_narrow = dtype != result.dtype

    def value(name: str, shape: tuple[int, ...]) -> Value:
        return replace(result, name=f"{op.name}.{name}", shape=shape, dtype=dtype)

    parts = value("logsumexps", (len(sets), *shape))
    extents = {**rule.extents, "part": len(sets)}
    part_rule = AxisRule(extents, (score_dims,), ((("part",), *dims),), whole=frozenset({_CLASSES}))
    part_tiles = tuple(
        Tile(
            t.device, {**t.axes, "part": Intervals.indices([sets.index(t.axes[_CLASSES])])} if len(sets) > 1 else t.axes
        )
        for t in tiles
    )
    picked = value("picked", shape)
    pick_rule = AxisRule(rule.extents, (score_dims, label_dims), (dims,), sums=frozenset({_CLASSES}))
    total = value("logsumexp", shape)
    total_rule = AxisRule(extents, ((("part",), *dims),), (dims,), whole=frozenset({"part", _CLASSES}))
    losses = value("losses", shape) if reduction != _NONE else result
    loss_rule = AxisRule({a: n for a, n in rule.extents.items() if a != _CLASSES}, (dims, dims, label_dims), (dims,))
    own = fit(tiles, loss_rule, replicas=False)
    runs = (Intervals.full(rule.extents[_CLASSES]).runs,)

    def made(
        target: str,
        args: tuple[Any, ...],
        result: Value,
        rule: AxisRule,
        tiles: tuple[Tile, ...],
        *saved: str,
        extra: int = 0,
    ) -> StandIn:
        return StandIn(stand_in(op, target, args, (result,), rule, saved=saved, saved_extra_bytes=extra), tiles)

    logs, to = Ref(parts.name), Symbol("dtype", dtype)
    counted = (Ref(total.name), Ref(picked.name), labels, ignored, Symbol("dtype", losses.dtype))
    picking = (scores, labels, classes, rule.extents[_CLASSES], ignored, to, *runs)
    kept = (parts.name,) if is_narrow else (scores.name, parts.name)  # what is narrow is kept as it was widened
    extra = 2 * graph.values[scores.name].size_bytes if is_narrow else 0
    found = [
        made("graphpart.logsumexp_part", (scores, classes, to), parts, part_rule, part_tiles, *kept, extra=extra),
        made("graphpart.pick_class", picking, picked, pick_rule, tiles, labels.name),
        made("aten.logsumexp.default", (logs, [0]), total, total_rule, own, parts.name, total.name),
        made("graphpart.class_losses", counted, losses, loss_rule, own, labels.name),
    ]
    return found if reduction == _NONE else [*found, *_reduced(graph, op, losses, loss_rule, own, tiles)]


def _reduced(
    graph: Graph, op: Operator, losses: Value, loss_rule: AxisRule, own: tuple[Tile, ...], tiles: tuple[Tile, ...]
) -> list[StandIn]:
    """The sum of the losses, and what their mean comes to if that is asked for."""
    (result,) = op.results
    is_mean = len(op.args) <= 3 or op.args[3] == _MEAN
    total = total_of(op) if is_mean else result
    (dims,) = loss_rule.results
    axes = frozenset(axis for dim in dims for axis in dim)
    rule = AxisRule(loss_rule.extents, (dims,), ((),), sums=axes, linear=((0,),))
    cast = {"dtype": Symbol("dtype", total.dtype)} if total.dtype != losses.dtype else {}
    summed = StandIn(stand_in(op, "aten.sum.default", (Ref(losses.name),), (total,), rule, kwargs=cast), own)
    if not is_mean:
        return [summed]
    counting = count_labels(graph, op, tiles)
    return [summed, *counting, quotient(op, result, total, Ref(counting[-1].operator.name), tiles)]
