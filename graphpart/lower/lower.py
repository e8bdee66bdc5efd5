"""The passes of lowering, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphpart.errors import PlacementError
from graphpart.ir.gc_pause import no_collection
from graphpart.ir.graph import Graph, Operator, Value
from graphpart.ir.placement import Placement
from graphpart.ir.program import DEFAULT_DEADLINE_S, Program
from graphpart.ir.region import Intervals
from graphpart.lower.instantiate import instantiate
from graphpart.lower.rewrites.batch_norm import defer_batch_norm
from graphpart.lower.rewrites.expose import expose
from graphpart.lower.rewrites.standin import with_work
from graphpart.lower.samples import Samples, cut_samples, follow_samples
from graphpart.lower.segments import assemble
from graphpart.lower.tiles import sample_sets
from graphpart.lower.wire_dtype import activations, check_wire_dtype
from graphpart.rules import may_repeat


@no_collection()
def lower(
    graph: Graph,
    placement: Placement,
    num_devices: int,
    *,
    num_microbatches: int = 1,
    batch_norm: str = "barrier",
    deadline_s: float = DEFAULT_DEADLINE_S,
    wire_dtype: str | None = None,
) -> Program:
    """Lower a placed graph to a program of segments and bridges.

    Args:
        graph: the traced graph.
        placement: tiles and homes.
        num_devices: devices in the cluster.
        num_microbatches: parts of the sample axis, in time. An operator that mixes samples without an exact
            combination (a training BatchNorm) waits for all of them.
        batch_norm: ``barrier``, or ``microbatch``: normalise each microbatch by its own statistics and update
            the running statistics once, from all (as torchgpipe's deferred BatchNorm does).
        deadline_s: how long a device waits for one message.
        wire_dtype: what float32 activations and their gradients are cast to between devices (``bfloat16`` or
            ``float16``); None sends them as they are. A gradient with several readers is added up in that type.

    Raises:
        PlacementError: if the placement does not fit the graph or the devices.
        MicrobatchError: if the batch cannot be cut so.
        ArgumentError: if ``wire_dtype`` is no such type.
    """
    check_wire_dtype(wire_dtype)
    placement.check(graph, num_devices)
    _check_repeats(graph, placement)
    _check_sparse_gradients(graph, placement)
    narrow = dict.fromkeys(activations(graph), wire_dtype) if wire_dtype else {}
    if num_microbatches == 1:
        samples = Samples(0)
        graph, placement = expose(graph, placement, samples)
        microbatches: tuple[Intervals, ...] = (Intervals.full(max(_batch(graph), 1)),)
    else:
        samples = follow_samples(graph)
        sets = sample_sets(graph, placement, samples)
        microbatches = cut_samples(_batch(graph), num_microbatches, sets)
        if batch_norm == "microbatch":
            graph, placement = _defer(graph, placement, samples)
        graph, placement = expose(graph, placement, samples)
        samples = follow_samples(graph)
    graph = with_work(graph)
    parts = instantiate(graph, placement, samples, microbatches, narrow)
    sizes = [len(samples_of) for samples_of in microbatches]
    return assemble(graph, parts, num_devices, sizes, _recomputed(graph, placement), deadline_s)


def _recomputed(graph: Graph, placement: Placement) -> Mapping[str, str]:
    """Groups that are run again for their backward; none where nothing has one."""
    has_backward = any(value.requires_grad for op in graph.operators for value in op.results)
    return placement.recompute if has_backward else {}


def _check_repeats(graph: Graph, placement: Placement) -> None:
    """Refuse replicas of what keeps a state: each would update it once more."""
    for op in graph.operators:
        if len(placement.tiles[op.name]) > 1 and not may_repeat(op.target, op.rule is not None):
            raise PlacementError(
                f"operator {op} is placed on {len(placement.tiles[op.name])} devices, but it keeps a state or nothing "
                "is known of it, so it has to run on one; place it with gp.pin, or register its rule"
            )


_SPARSE_ARGUMENT = {"aten.embedding.default": 4, "aten.embedding_bag.default": 5, "aten.embedding_bag.padding_idx": 5}
"""Per operator whose gradient can be sparse, the argument that says so."""


def sparse_tables(graph: Graph) -> list[tuple[Operator, Value]]:
    """Operators that give a trained table a sparse gradient, each with the table."""
    found = []
    for op in graph.operators:
        at = _SPARSE_ARGUMENT.get(op.target, len(op.args))
        table = graph.source.get(op.operands[0]) if at < len(op.args) and op.args[at] else None
        if table is not None and table.trainable:
            found.append((op, table.value))
    return found


def _check_sparse_gradients(graph: Graph, placement: Placement) -> None:
    """Refuse tables with sparse gradients away from their one reader: such a gradient is neither sent nor cut."""
    for op, table in sparse_tables(graph):
        readers = {tile.device for user in graph.consumers[table.name] for tile in placement.tiles[user.name]}
        home = placement.home(table)
        if readers != {home[0].device} or len(home) > 1:
            raise PlacementError(
                f"operator {op} gives the table {table.name!r} a sparse gradient, which has to be made on the one "
                f"device where the table is; its readers are on devices {sorted(readers)}, the table on "
                f"{sorted({shard.device for shard in home})}. Place it and its readers together (gp.pin, "
                "gp.keep_whole), or build it with sparse=False"
            )


def _defer(graph: Graph, placement: Placement, samples: Samples) -> tuple[Graph, Placement]:
    """BatchNorm by microbatch; the new operators are placed where the old ones were."""
    rewritten, stands_for = defer_batch_norm(graph, samples)
    tiles = dict(placement.tiles)
    tiles.update((name, placement.tiles[old]) for name, old in stands_for.items())
    again = {n: placement.recompute[old] for n, old in stands_for.items() if old in placement.recompute}
    return rewritten, replace(placement, tiles=tiles, recompute={**placement.recompute, **again})


def _batch(graph: Graph) -> int:
    return next((graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()), 0)
