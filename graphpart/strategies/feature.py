"""Feature splits: every product with a weight is cut along the weight's axes, as Megatron-LM does."""

from __future__ import annotations

from collections.abc import Iterator

from graphpart.errors import PlacementError
from graphpart.ir.axes import AxisRule, OperandDim, Window
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement
from graphpart.strategies.candidates import Seed, propagate
from graphpart.strategies.finish import finish
from graphpart.strategies.geometry import Geometry
from graphpart.strategies.pricing import Prices
from graphpart.strategies.regions import even_cut
from graphpart.strategies.shares import speeds
from graphpart.strategies.tiling import choose_cuts, domains


def feature(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    optimizer_bytes_per_element: float = 8,
    memory_reserve: float = 0.0,
) -> Placement:
    """Cut every product with a weight along the weight's axes, with the least traffic.

    A linear layer before a pointwise one and another linear layer comes out cut by columns, then by rows, with one
    all-reduce forward and one backward and nothing between (M. Shoeybi et al., "Megatron-LM", arXiv:1909.08053,
    section 3); attention by heads; an embedding and a cross-entropy by vocabulary; convolutions by channels. What has
    no weight is whole on every device where that saves traffic.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get parts in proportion to their speed.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element; AdamW by default.
        memory_reserve: part of each device's memory to leave free, in ``[0, 1)``.

    Raises:
        PlacementError: if no product of the model can be cut into so many parts.
        OutOfMemoryError: if the split does not fit.
    """
    devices = range(len(cluster))
    geometry = Geometry(graph, speeds(graph, cluster))
    found = propagate(geometry, feature_seeds(geometry))
    weighted = {op.name for op, _ in weight_axes(graph)}
    if len(cluster) > 1 and not any(name in found for name in weighted):
        raise PlacementError(
            f"{graph.name} has no weight with an axis of at least {len(cluster)} that can be cut; use fewer devices, "
            "or strategy='batch' or 'layer'"
        )
    allowed = domains(graph, found, len(cluster), lambda op, cut: op.name in weighted)
    prices = Prices(geometry, cluster, devices, num_microbatches, count_latency=False)
    tiling = choose_cuts(prices, allowed, weigh_compute=False)
    return finish(
        graph,
        cluster,
        tiling,
        num_microbatches=num_microbatches,
        optimizer_bytes_per_element=optimizer_bytes_per_element,
        memory_reserve=memory_reserve,
    )


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
