"""What running groups of operators again for their backward saves in memory and costs in time.

The operators of a group keep nothing for their backward but what the group reads; while one group runs backward, what
its operators save is there again, for one microbatch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from graphpart.cost.time.roofline import OperatorWork, operator_time
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Region


def members(graph: Graph, groups: Mapping[str, str]) -> Mapping[str, tuple[Operator, ...]]:
    """Operators by group, in topological order; groups through which no gradient flows are left out."""
    found: defaultdict[str, list[Operator]] = defaultdict(list)
    for op in graph.operators:
        if op.name in groups:
            found[groups[op.name]].append(op)
    return {
        group: tuple(ops)
        for group, ops in found.items()
        if any(value.requires_grad for op in ops for value in op.results)
    }


def recomputed(graph: Graph, groups: Mapping[str, str], placement: Placement | None = None) -> Graph:
    """The graph whose operators save only what their group reads, and compute forward twice.

    Strategies and forecasts that take it for the model know what recomputation costs and saves. What a group saves
    while it runs backward comes on top.

    Args:
        graph: the traced model.
        groups: group by name of an operator that is run again.
        placement: where operators run; values that cross between devices inside a group are kept as well.
    """
    if not groups:
        return graph
    changed = {op.name: op for ops in members(graph, groups).values() for op in run_again(graph, ops, placement)}
    return replace(graph, operators=tuple(changed.get(op.name, op) for op in graph.operators))


def run_again(graph: Graph, ops: Sequence[Operator], placement: Placement | None = None) -> Iterator[Operator]:
    """Operators of one group as :func:`recomputed` has them."""
    inside = {value.name: op for op in ops for value in op.results}
    for op in ops:
        yield replace(
            op,
            saved=tuple(n for n in dict.fromkeys(op.operands) if _is_read(graph, op, n, inside, placement)),
            saved_extra_bytes=0,
            flops_backward=op.flops_backward + op.flops_forward,
        )


def _is_read(
    graph: Graph, op: Operator, name: str, inside: Mapping[str, Operator], placement: Placement | None
) -> bool:
    """Whether an operand comes from outside of the group, on some device at least."""
    if name in graph.source:
        return graph.source[name].kind == "input"
    if name not in inside:
        return True
    return placement is not None and _crosses(
        graph, inside[name], op, name, placement.tiles[inside[name].name], placement.tiles[op.name]
    )


def _crosses(
    graph: Graph, maker: Operator, reader: Operator, name: str, made: Sequence[Tile], read: Sequence[Tile]
) -> bool:
    """Whether a reader's tile needs what no tile of the maker's on its device makes all of."""
    if maker.rule is not None and any(axis in maker.rule.sums for tile in made for axis in tile.axes):
        return True
    at_hand: defaultdict[int, list[Region]] = defaultdict(list)
    for tile in made:
        at_hand[tile.device].append(tile.region(maker, graph.values[name]))
    return any(
        not any(tile.region(reader, graph.values[name]) <= region for region in at_hand[tile.device]) for tile in read
    )


def rerun_s(
    operators: Iterable[Operator],
    placement: Placement,
    cluster: Cluster,
    works: Mapping[str, OperatorWork],
    num_microbatches: int,
) -> dict[int, float]:
    """Seconds a step that one more forward of some operators takes, by device.

    Args:
        operators: what runs again.
        placement: where it runs.
        cluster: the devices.
        works: work by operator name, see :func:`graphpart.cost.time.roofline.operator_works`.
        num_microbatches: parts of the batch.
    """
    found: defaultdict[int, float] = defaultdict(float)
    for op in operators:
        work = works[op.name]
        calls = num_microbatches if work.carries_samples else 1
        for tile in placement.tiles[op.name]:
            device = cluster.devices[tile.device]
            found[tile.device] += calls * operator_time(work, device, tile.share(op) / calls).forward_s
    return dict(found)
