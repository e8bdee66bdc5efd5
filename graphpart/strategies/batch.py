"""Batch splits: every device runs the whole model on its part of the samples."""

from __future__ import annotations

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import choose_cuts, domains, is_plain
from graphpart.strategies.cuts.device_shares import speeds
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import sample_starts
from graphpart.strategies.memory.check import finish
from graphpart.strategies.memory.terms import DEFAULT_TERMS, Terms


def batch(
    graph: Graph,
    cluster: Cluster,
    terms: Terms = DEFAULT_TERMS,
    *,
    shard_parameters: bool = False,
) -> Placement:
    """Cut the samples; parameters are read whole by every device, and their gradients summed.

    What carries no samples, or mixes them, is cut, whole on every device, or on one, as takes least time.

    Args:
        graph: the traced model.
        cluster: the devices; unlike ones get samples in proportion to their speed, by largest remainder.
        terms: what to count with.
        shard_parameters: keep a part of every parameter, its gradient and its optimizer state on each device (ZeRO-3,
            Rajbhandari et al., SC 2020; FSDP), instead of each parameter on one.

    Raises:
        PlacementError: if there are fewer samples than devices, or nothing carries samples.
        OutOfMemoryError: if the split does not fit.
    """
    num_devices = len(cluster)
    geometry = Geometry(graph, speeds(graph, cluster))
    _check_samples(graph, num_devices)
    found = propagate(geometry, starts=sample_starts(geometry))
    if num_devices > 1 and not found:
        raise PlacementError(
            f"no operator of {graph.name} can be cut along its samples: {_first_reason(graph)}; use strategy='layer'"
        )
    allowed = domains(graph, found, num_devices, is_plain)
    choice = choose_cuts(Prices(geometry, cluster, range(num_devices), terms.num_microbatches), allowed)
    return finish(
        graph,
        cluster,
        choice.tiles(graph),
        terms,
        shard_over=range(num_devices) if shard_parameters else (),
        weights=geometry.weights,
    )


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
