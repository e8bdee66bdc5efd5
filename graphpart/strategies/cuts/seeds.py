"""Where cuts begin: samples and positions of the inputs, features of the weights. The rest follows from these."""

from __future__ import annotations

from collections.abc import Iterator

from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Region
from graphpart.strategies.cuts.candidates import Seed, Start
from graphpart.strategies.cuts.inverse_rules import even_cut, shares_of
from graphpart.strategies.cuts.layouts import Geometry


def sample_starts(geometry: Geometry) -> Iterator[Start]:
    """The inputs that carry samples, cut along them in proportion to the devices' shares."""
    for name, dim in geometry.graph.sample_dims.items():
        yield from cut_of_source(geometry, name, dim)


def cut_of_source(geometry: Geometry, name: str, dim: int) -> Iterator[Start]:
    """A source cut along one dimension, if that is long enough."""
    shape = geometry.graph.values[name].shape
    whole = Region.full(shape).dims
    parts = shares_of(shape[dim], geometry.weights)
    if parts is not None:
        yield name, tuple(Region((*whole[:dim], part, *whole[dim + 1 :])) for part in parts)


def image_dims(graph: Graph) -> list[tuple[str, int]]:
    """Inputs that look like images or volumes, ``[batch, channel, ...]``, with each dimension of positions."""
    return [
        (source.value.name, dim)
        for source in graph.inputs
        if len(source.value.shape) in (4, 5) and "float" in source.value.dtype
        for dim in range(2, len(source.value.shape))
    ]


def position_starts(geometry: Geometry) -> Iterator[Start]:
    """Sequences cut along their positions: inputs that carry samples, along the dimension behind these."""
    graph = geometry.graph
    for name, dim in graph.sample_dims.items():
        if len(graph.values[name].shape) in (2, 3) and dim + 1 < len(graph.values[name].shape):
            yield from cut_of_source(geometry, name, dim + 1)


def spatial_starts(geometry: Geometry) -> Iterator[Start]:
    """Images cut along each of their dimensions of positions."""
    for name, dim in image_dims(geometry.graph):
        yield from cut_of_source(geometry, name, dim)


def feature_seeds(geometry: Geometry) -> Iterator[Seed]:
    """Even cuts of the axes of weights."""
    for op, axes in weight_axes(geometry.graph):
        assert op.rule is not None
        for axis in axes:
            cut = even_cut(op.rule, axis, geometry.weights)
            if cut is not None:
                yield op.name, cut


def weight_axes(graph: Graph) -> Iterator[tuple[Operator, list[str]]]:
    """Operators that combine what depends on an input with a weight of two or more dimensions, and the weight's axes.

    A weight is a parameter, or what is made from parameters alone (a cast, a transpose). A table of positions, looked
    up at constants, is none.
    """
    weights = {source.value.name for source in graph.parameters}
    active = {source.value.name for source in graph.inputs}
    for op in graph.operators:
        if not any(name in active for name in op.operands):
            if any(name in weights for name in op.operands):
                weights.update(value.name for value in op.results)
            continue
        active.update(value.name for value in op.results)
        if op.rule is None:
            continue
        linear = {position for group in op.rule.linear for position in group}
        found = {
            axis
            for i, (name, dims) in enumerate(zip(op.operands, op.rule.operands, strict=True))
            if i in linear and name in weights and _is_matrix(graph, name) and _is_mixed(op.rule, dims)
            for dim in dims
            if not isinstance(dim, Window)
            for axis in dim
        }
        legal = [axis for axis in op.rule.cuttable if axis in found]
        if legal:
            yield op, legal


def _is_matrix(graph: Graph, name: str) -> bool:
    return sum(extent > 1 for extent in graph.values[name].shape) >= 2


def _is_mixed(rule: AxisRule, dims: tuple[OperandDim, ...]) -> bool:
    """Whether an operator sums over, or looks up in, an axis of an operand: not merely adds it."""
    made = {axis for tensor in rule.results for dim in tensor for axis in dim}
    return any(axis not in made for dim in dims if not isinstance(dim, Window) for axis in dim)
