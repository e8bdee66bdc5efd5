"""The kinds of cuts that a group of devices is divided by: along features of weights, samples, positions."""

from __future__ import annotations

from collections.abc import Sequence

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import CutChoice, choose_cuts, domains, is_plain
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import (
    feature_seeds,
    position_starts,
    sample_starts,
    spatial_starts,
    weight_axes,
)


def feature_cuts(
    graph: Graph,
    cluster: Cluster,
    devices: Sequence[int],
    weights: Sequence[float],
    num_microbatches: int,
    *,
    sequence: bool = False,
) -> CutChoice:
    """Every product with a weight cut along the weight's axes, with the least traffic.

    Args:
        graph: the traced model.
        cluster: the devices.
        devices: indices of those that share every operator.
        weights: the share of each.
        num_microbatches: parts of the batch.
        sequence: cut what has no weight along positions, where it carries any, instead of repeating it (sequence
            parallelism: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys
            2023). A sum over devices becomes a reduce-scatter before, and an all-gather behind.

    Raises:
        PlacementError: if no product of the model can be cut into so many parts, or nothing along positions.
    """
    geometry, num_devices = Geometry(graph, weights), len(devices)
    found = propagate(geometry, feature_seeds(geometry))
    weighted = {op.name for op, _ in weight_axes(graph)}
    if num_devices > 1 and not any(name in found for name in weighted):
        raise PlacementError(
            f"{graph.name} has no weight with an axis of at least {num_devices} that can be cut; use fewer devices, "
            "or strategy='batch' or 'layer'"
        )
    prices = Prices(geometry, cluster, devices, num_microbatches, count_latency=False)
    if not sequence:
        allowed = domains(graph, found, num_devices, lambda op, cut: op.name in weighted)
        return choose_cuts(prices, allowed, weigh_compute=False)
    along = propagate(geometry, starts=position_starts(geometry))
    between = {name: cuts for name, cuts in along.items() if name not in weighted or name not in found}
    if num_devices > 1 and not between:
        raise PlacementError(
            f"no operator of {graph.name} can be cut along positions into {num_devices} parts; leave out sp"
        )
    both = {name: tuple(dict.fromkeys((*found.get(name, ()), *between.get(name, ())))) for name in {**found, **between}}
    allowed = domains(graph, both, num_devices, lambda op, cut: op.name in weighted and op.name in found)
    return choose_cuts(prices, allowed)


def sample_cuts(
    graph: Graph, cluster: Cluster, devices: Sequence[int], weights: Sequence[float], num_microbatches: int
) -> CutChoice:
    """Every operator that carries samples cut along them; the rest as takes least time.

    Arguments are those of :func:`feature_cuts`.

    Raises:
        PlacementError: if there are fewer samples than devices, or nothing carries samples.
    """
    geometry, num_devices = Geometry(graph, weights), len(devices)
    if num_devices > 1:
        _check_samples(graph, num_devices)
    found = propagate(geometry, starts=sample_starts(geometry))
    if num_devices > 1 and not found:
        raise PlacementError(
            f"no operator of {graph.name} can be cut along its samples: {_first_reason(graph)}; use strategy='layer'"
        )
    allowed = domains(graph, found, num_devices, is_plain)
    return choose_cuts(Prices(geometry, cluster, devices, num_microbatches), allowed)


def position_cuts(
    graph: Graph, cluster: Cluster, devices: Sequence[int], weights: Sequence[float], num_microbatches: int
) -> CutChoice:
    """Every operator that carries positions of a sequence cut along them, or of images where there is no sequence.

    The rest is cut as takes least time. Arguments are those of :func:`feature_cuts`.

    Raises:
        PlacementError: if nothing can be cut along positions into so many parts.
    """
    geometry, num_devices = Geometry(graph, weights), len(devices)
    starts = tuple(position_starts(geometry)) or tuple(spatial_starts(geometry))
    found = propagate(geometry, starts=starts)
    if num_devices > 1 and not found:
        raise PlacementError(
            f"no operator of {graph.name} can be cut along positions into {num_devices} parts: {_no_positions(graph)}; "
            "leave out cp"
        )
    allowed = domains(graph, found, num_devices, is_plain)
    return choose_cuts(Prices(geometry, cluster, devices, num_microbatches), allowed)


def _no_positions(graph: Graph) -> str:
    shapes = {graph.source[name].names[0]: list(graph.values[name].shape) for name in graph.sample_dims}
    said = ", ".join(f"{name!r} is {shape}" for name, shape in shapes.items())
    wanted = "a sequence is [samples, positions] or [samples, positions, features], an image [samples, channels, …]"
    return f"{wanted}, and {said or 'there is none'}"


def _check_samples(graph: Graph, num_devices: int) -> None:
    sizes = {name: graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()}
    if not sizes:
        raise PlacementError(
            f"no input of {graph.name} carries samples; name their dimension with sample_dims={{'args[0]': 0}}, or use "
            "strategy='feature' or 'layer'"
        )
    for name, size in sizes.items():
        if size < num_devices:
            raise PlacementError(
                f"input {graph.source[name].names[0]!r} has {size} samples, fewer than the {num_devices} devices that "
                f"strategy='batch' would share them among; use {num_devices} samples or more, {size} devices or fewer, "
                "or strategy='feature'"
            )


def _first_reason(graph: Graph) -> str:
    readers = [op for name in graph.sample_dims for op in graph.consumers[name]]
    return next((f"{op} has {op.note or 'no axis rule'}" for op in readers if op.rule is None), "its rules forbid it")
