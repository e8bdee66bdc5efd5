"""Opt-in: BatchNorm by microbatch, with running statistics deferred to the step's end.

Each microbatch is normalised by its own statistics, as GPipe and torchgpipe do; the running statistics are then
updated once, from the sums over all microbatches, so they come out as on one device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphpart.ir.axes import AxisRule, Dim
from graphpart.ir.graph import Graph, Operator, Ref, Value
from graphpart.lower.samples import Samples

_TARGET = "aten._native_batch_norm_legit_functional.default"


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
        if op.target == _TARGET and op.name in samples.barriers and op.args[5]:
            parts = _split(graph, op)
            operators += parts
            stands_for.update((part.name, op.name) for part in parts)
        else:
            operators.append(op)
    return (replace(graph, operators=tuple(operators)), stands_for) if stands_for else (graph, {})


def _split(graph: Graph, op: Operator) -> list[Operator]:
    x, weight, bias, running_mean, running_var, _, momentum, eps = op.args
    out, _, _, new_mean, new_var = op.results
    image = graph.values[x.name]
    axes = ["samples", "channels", *(f"space{i}" for i in range(len(image.shape) - 2))]
    extents = dict(zip(axes, image.shape, strict=True))
    dims: tuple[Dim, ...] = tuple((axis,) for axis in axes)
    channels: tuple[Dim, ...] = (("channels",),)
    affine = tuple(channels for arg in (weight, bias) if isinstance(arg, Ref))
    space = frozenset(axes[2:])
    local = AxisRule(dict(extents), (dims, *affine), (dims,), whole=space)
    sums = Value(f"{op.name}.sums", (2, image.shape[1]), "float64")
    moments: tuple[Dim, ...] = (("moment",), ("channels",))
    extents["moment"] = 2
    moment = frozenset({"moment"})
    sum_rule = AxisRule(extents, (dims,), (moments,), sums=frozenset({"samples", *space}), whole=moment)
    update = AxisRule(extents, (moments, channels, channels), (channels, channels), whole=moment | set(axes))
    count = image.num_elements // image.shape[1]
    return [
        _stand_in(op, op.name, "graphpart.batch_norm_local", (x, weight, bias, eps), (out,), local, op.flops_forward),
        _stand_in(op, sums.name, "graphpart.batch_norm_sums", (x,), (sums,), sum_rule),
        _stand_in(
            op,
            f"{op.name}.update",
            "graphpart.batch_norm_update",
            (Ref(sums.name), running_mean, running_var, count, momentum),
            (new_mean, new_var),
            update,
        ),
    ]


def _stand_in(
    op: Operator,
    name: str,
    target: str,
    args: tuple[Any, ...],
    results: tuple[Value, ...],
    rule: AxisRule,
    flops_forward: float = 0.0,
) -> Operator:
    backward = op.flops_backward if flops_forward else 0.0
    saved = op.saved if flops_forward else ()
    return replace(
        op,
        name=name,
        target=target,
        args=args,
        kwargs={},
        results=results,
        rule=rule,
        flops_forward=flops_forward,
        flops_backward=backward,
        saved=saved,
        saved_extra_bytes=0,
    )
