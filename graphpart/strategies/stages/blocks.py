"""The order in which a graph is cut, and where it may be cut."""

from __future__ import annotations

import numpy as np

from graphpart.cost.time.roofline import operator_works, roofline_s
from graphpart.ir.cluster import Device
from graphpart.ir.graph import Graph
from graphpart.strategies.stages.interval_costs import Order, crossing_values

MAX_BLOCK_CUTS = 400


def operator_order(graph: Graph) -> Order:
    """One block per operator, in the graph's order; free operators join their first reader's block.

    An operator is free if it is made from no source: it is computed wherever it is read.
    """
    free = graph.unsourced
    position = {op.name: i for i, op in enumerate(graph.operators)}
    # Backwards, so that a free operator that only free ones read follows them to where they went.
    for op in reversed(graph.operators):
        readers = {reader.name for value in op.results for reader in graph.consumers[value.name]}
        if op.name in free and readers:
            position[op.name] = min(position[name] for name in readers)
    number = {old: new for new, old in enumerate(sorted(set(position.values())))}
    return Order({name: number[at] for name, at in position.items()}, len(number), free)


def into_blocks(graph: Graph, order: Order, device: Device, max_cuts: int = MAX_BLOCK_CUTS) -> Order:
    """Merge blocks until at most ``max_cuts`` cuts are left.

    Half of the cuts are those that fewest bytes cross; the other half are the best in each of equal shares of
    work, so that no long stretch is left without any.

    Args:
        graph: the traced model.
        order: its operators in blocks.
        device: whose times make the shares of work equal.
        max_cuts: cuts to keep.
    """
    num_cuts = order.num_blocks - 1
    if num_cuts <= max_cuts:
        return order
    crossing_bytes = _crossing_bytes(graph, order)
    ranked = np.argsort(crossing_bytes, kind="stable")
    shares = _equal_shares(graph, order, device, max_cuts // 2)
    kept: set[int] = set()
    seen: set[int] = set()
    for cut in ranked:  # cheapest first, so the first of each share is its best
        if int(shares[cut]) not in seen:
            seen.add(int(shares[cut]))
            kept.add(int(cut))
    for cut in ranked:
        if len(kept) >= max_cuts:
            break
        kept.add(int(cut))
    merged = np.cumsum([0, *(cut in kept for cut in range(num_cuts))])
    blocks = {name: int(merged[block]) for name, block in order.block_of.items()}
    return Order(blocks, int(merged[-1]) + 1, order.free)


def _crossing_bytes(graph: Graph, order: Order) -> np.ndarray:
    """Bytes of the values that cross each cut; cut ``c`` is the one after block ``c``."""
    steps = np.zeros(order.num_blocks)
    for name, _, blocks in crossing_values(graph, order):
        steps[blocks[0]] += graph.values[name].size_bytes
        steps[blocks[-1]] -= graph.values[name].size_bytes
    return np.cumsum(steps)[:-1]


def _equal_shares(graph: Graph, order: Order, device: Device, num_shares: int) -> np.ndarray:
    """Which of equal shares of the work each cut falls in."""
    works = operator_works(graph)
    times = np.zeros(order.num_blocks)
    for name, block in order.block_of.items():
        work = works[name]
        times[block] += roofline_s(work.flops_forward, work.bytes_forward, work.dtype, device)
        times[block] += roofline_s(work.flops_backward, work.bytes_backward, work.dtype, device)
    done = np.cumsum(times)[:-1]
    total = times.sum()
    if total <= 0:
        return np.arange(order.num_blocks - 1) * num_shares // max(order.num_blocks - 1, 1)
    return np.minimum((done / total * num_shares).astype(int), num_shares - 1)
