"""BatchNorm over samples that are cut.

In space, every device normalises its own samples by the statistics of all: two sums per channel are exchanged, and
outputs, gradients and running statistics are those of one device. By microbatch, as an opt-in, each microbatch is
normalised by its own statistics, as GPipe and torchgpipe do, and the running statistics are updated once, from the
sums over all microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphpart.ir.axes import AxisRule, Dim
from graphpart.ir.graph import Graph, Operator, Ref, Symbol, Value
from graphpart.ir.placement import Tile
from graphpart.lower.rewrites.standin import StandIn, fit, stand_in
from graphpart.lower.samples import Samples

TARGET = "aten._native_batch_norm_legit_functional.default"
WITHOUT_STATISTICS = "aten._native_batch_norm_legit.no_stats"
"""The same without running statistics: it normalises by the batch in evaluation too."""


def defer_batch_norm(graph: Graph, samples: Samples) -> tuple[Graph, Mapping[str, str]]:
    """Rewrite every training BatchNorm that carries samples.

    Args:
        graph: the graph.
        samples: its sample axis.

    Returns:
        The rewritten graph, and for each new operator the name of the one it stands in for.
    """
    operators: list[Operator] = []
    stands_for: dict[str, str] = {}
    for op in graph.operators:
        if op.target == TARGET and op.name in samples.barriers and op.args[5]:
            parts = _split(graph, op)
            operators += parts
            stands_for.update((part.name, op.name) for part in parts)
        else:
            operators.append(op)
    return (replace(graph, operators=tuple(operators)), stands_for) if stands_for else (graph, {})


def _split(graph: Graph, op: Operator) -> list[Operator]:
    x, weight, bias, running_mean, running_var, _, momentum, eps = op.args
    out, _, _, new_mean, new_var = op.results
    dims, space, extents = _image(graph, x)
    affine = tuple(_CHANNELS for arg in (weight, bias) if isinstance(arg, Ref))
    local = AxisRule(dict(extents), (dims, *affine), (dims,), whole=space)
    sums = Value(f"{op.name}.sums", (2, extents["c"]), "float64")
    moments: tuple[Dim, ...] = (("moment",), ("c",))
    extents["moment"] = 2
    moment = frozenset({"moment"})
    sum_rule = AxisRule(extents, (dims,), (moments,), sums=frozenset({"n", *space}), whole=moment)
    update = AxisRule(extents, (moments, _CHANNELS, _CHANNELS), (_CHANNELS, _CHANNELS), whole=frozenset(extents))
    count = graph.values[x.name].num_elements // extents["c"]
    args = (Ref(sums.name), running_mean, running_var, count, momentum)
    return [
        stand_in(op, "graphpart.batch_norm_local", (x, weight, bias, eps), (out,), local, saved=op.saved),
        stand_in(op, "graphpart.batch_norm_sums", (x,), (sums,), sum_rule),
        stand_in(op, "graphpart.batch_norm_update", args, (new_mean, new_var), update),
    ]


def share_batch_norm(graph: Graph, op: Operator, tiles: tuple[Tile, ...]) -> list[StandIn]:
    """Mean, then variance about it, each as a sum over cut samples and positions; then a local normalisation.

    Two passes, as in Welford's analysis: the variance keeps its digits where the mean is large.
    """
    x, weight, bias = op.args[:3]
    momentum, eps = op.args[-2:]
    out = op.results[0]
    dims, space, extents = _image(graph, x)
    count = graph.values[x.name].num_elements // extents["c"]
    reduced = frozenset({"n", *space})
    is_half = out.dtype in ("bfloat16", "float16")  # statistics are kept in float32, as torch's own kernels do
    dtype = "float32" if is_half else out.dtype
    total, mean, squares, var = (
        Value(f"{op.name}.{name}", (extents["c"],), dtype, out.requires_grad)
        for name in ("total", "mean", "squares", "var")
    )
    axes = [i for i in range(len(dims)) if i != 1]
    affine = tuple(_CHANNELS for arg in (weight, bias) if isinstance(arg, Ref))
    sum_rule = AxisRule(extents, (dims,), (_CHANNELS,), sums=reduced, linear=() if is_half else ((0,),))
    cast = {"dtype": Symbol("dtype", dtype)} if is_half else {}
    square_rule = AxisRule(extents, (dims, _CHANNELS), (_CHANNELS,), sums=reduced)
    by_count = AxisRule({"c": extents["c"]}, (_CHANNELS,), (_CHANNELS,), linear=((0,),))
    apply = AxisRule(extents, (dims, _CHANNELS, _CHANNELS, *affine), (dims,))
    update = AxisRule({"c": extents["c"]}, (_CHANNELS,) * 4, (_CHANNELS, _CHANNELS))
    channels = fit(tiles, by_count, replicas=True)
    moments = (Ref(mean.name), Ref(var.name))
    normal = (x, *moments, weight, bias, eps)
    made = [
        (stand_in(op, "aten.sum.dim_IntList", (x, axes), (total,), sum_rule, kwargs=cast), tiles),
        (stand_in(op, "aten.div.Tensor", (Ref(total.name), float(count)), (mean,), by_count), channels),
        (
            stand_in(
                op, "graphpart.centered_squares", (x, moments[0]), (squares,), square_rule, saved=_names(x, moments[0])
            ),
            tiles,
        ),
        (stand_in(op, "aten.div.Tensor", (Ref(squares.name), float(count)), (var,), by_count), channels),
        (stand_in(op, "graphpart.batch_norm_apply", normal, (out,), apply, saved=_names(x, *moments, weight)), tiles),
    ]
    if op.target == TARGET:
        running = (*moments, *op.args[3:5], count, momentum)
        made.append((stand_in(op, "graphpart.batch_norm_running", running, op.results[3:], update), channels))
    return [StandIn(operator, own) for operator, own in made]


def _image(graph: Graph, x: Ref) -> tuple[tuple[Dim, ...], frozenset[str], dict[str, int]]:
    """Dimensions of the operand under the names of BatchNorm's own rule; its positions; all extents."""
    shape = graph.values[x.name].shape
    axes = ["n", "c", *(f"s{i}" for i in range(len(shape) - 2))]
    return tuple((axis,) for axis in axes), frozenset(axes[2:]), dict(zip(axes, shape, strict=True))


def _names(*args: Any) -> tuple[str, ...]:
    return tuple(arg.name for arg in args if isinstance(arg, Ref))


_CHANNELS: tuple[Dim, ...] = (("c",),)
