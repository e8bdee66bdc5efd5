"""What a plan's file says is checked here, once: all behind may rely on graphs that are as tracing makes them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from graphpart.errors import GraphError, PlanError
from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.ir.graph import DTYPE_BYTES, Graph, Operator, Source, Value
from graphpart.ir.placement import Placement

KINDS = ("parameter", "buffer", "constant", "input")
MAX_DIMS = 64
MAX_BYTES = 2**60
"""Of one tensor, and the most that an index reaches."""

MIN_PARTS = 20_000
PARTS_PER_CHARACTER = 10
"""A file may ask for so many tiles times microbatches: in proportion to its length, so that no short one runs long."""


def check_graph(graph: Graph) -> None:
    """Refuse a graph that no tracing makes.

    Raises:
        GraphError: naming the operator or the source, and what is wrong with it.
    """
    for source in graph.sources:
        _check_source(source)
    names: set[str] = set()
    for op in graph.operators:
        try:
            _check_operator(op, graph)
        except GraphError as error:
            raise GraphError(f"operator {op}: {error}") from error
        if not op.name or op.name in names:
            raise GraphError(f"two operators are called {op.name!r}" if op.name else "an operator has no name")
        names.add(op.name)
    for source_name, _ in graph.mutations:
        if source_name not in graph.source:
            raise GraphError(f"the update of {source_name!r} is one of no source")
    for name, dim in graph.sample_dims.items():
        if name not in graph.values or not 0 <= dim < len(graph.values[name].shape):
            raise GraphError(f"sample_dims gives {name!r} dimension {dim}, which it does not have")


def check_size(placement: Placement, num_microbatches: int, num_characters: int) -> None:
    """Refuse a plan whose program would be out of proportion to its file.

    Args:
        placement: its tiles.
        num_microbatches: how often each runs.
        num_characters: length of the file.

    Raises:
        PlanError: with both numbers.
    """
    parts = num_microbatches * sum(map(len, placement.tiles.values()))
    most = MIN_PARTS + PARTS_PER_CHARACTER * num_characters
    if parts > most:
        raise PlanError(
            f"{num_microbatches} microbatches make {parts} parts of operators, of a file of {num_characters} "
            f"characters; at most {most} are believed"
        )


def _check_source(source: Source) -> None:
    what = f"source {source.value.name!r}"
    if source.kind not in KINDS:
        raise GraphError(f"{what} is of kind {source.kind!r}; kinds are {', '.join(KINDS)}")
    if not source.names or not _texts(source.names):
        raise GraphError(f"{what} needs names of the model's for it")
    _check_value(source.value, what)


def _check_value(value: Value, what: str) -> None:
    if not value.name:
        raise GraphError(f"{what} makes a value without a name")
    if value.dtype not in DTYPE_BYTES:
        raise GraphError(f"{what} has dtype {value.dtype!r}; known ones are {', '.join(DTYPE_BYTES)}")
    if len(value.shape) > MAX_DIMS or any(extent < 0 for extent in value.shape):
        raise GraphError(f"{what} has the shape {str(list(value.shape))[:80]}")
    if prod(max(extent, 1) for extent in value.shape) * DTYPE_BYTES[value.dtype] > MAX_BYTES:
        raise GraphError(f"{what} has the shape {list(value.shape)}, which no memory holds")


def _check_operator(op: Operator, graph: Graph) -> None:
    for value in op.results:
        _check_value(value, f"result {value.name!r}")
    for name in ("flops_forward", "flops_backward", "saved_extra_bytes"):
        if getattr(op, name) < 0:
            raise GraphError(f"{name} is {getattr(op, name)}, less than nothing")
    if not _texts(op.saved) or not all(name in graph.values for name in op.saved):
        raise GraphError(f"it saves {str(list(op.saved))[:80]}, not all of which there is")
    if op.rule is not None:
        _check_rule(op.rule, op, graph)


def _check_rule(rule: AxisRule, op: Operator, graph: Graph) -> None:
    if any(extent < 0 for extent in rule.extents.values()):
        raise GraphError(f"its axes have the extents {dict(rule.extents)}")
    for words in (rule.sums, rule.whole, rule.rewritten):
        if not rule.extents.keys() >= words:
            raise GraphError(f"its rule names the axes {', '.join(sorted(map(str, words)))}, not all of which it has")
    for what, tensors, values in (
        ("operands", rule.operands, [graph.values[name] for name in op.operands]),
        ("results", rule.results, op.results),
    ):
        if len(tensors) != len(values):
            raise GraphError(f"its rule is one of {len(tensors)} {what}; there are {len(values)}")
        for dims, value in zip(tensors, values, strict=True):
            _check_dims(rule, dims, value)
    if any(not 0 <= position < len(op.operands) for group in rule.linear for position in group):
        raise GraphError(f"its rule calls operands {rule.linear} linear; there are {len(op.operands)}")
    if rule.shape_argument is not None and not 0 <= rule.shape_argument < len(op.args):
        raise GraphError(f"its rule takes argument {rule.shape_argument} for a shape; there are {len(op.args)}")


def _check_dims(rule: AxisRule, dims: tuple[OperandDim, ...], value: Value) -> None:
    for dim in dims:
        axes = (dim.axis,) if isinstance(dim, Window) else dim
        if not _texts(axes) or not rule.extents.keys() >= set(axes):
            raise GraphError(f"its rule has a dimension of axes {axes!r}, not all of which it has")
        if isinstance(dim, Window) and (dim.stride < 1 or dim.size < 1):
            raise GraphError(f"its rule has a window {dim} of stride {dim.stride} and size {dim.size}")
    if rule.shape(dims) != value.shape:
        raise GraphError(f"its rule gives {value.name!r} the shape {list(rule.shape(dims))}, not {list(value.shape)}")


def _texts(items: Iterable[Any]) -> bool:
    return all(isinstance(item, str) for item in items)
