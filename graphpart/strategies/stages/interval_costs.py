"""What every interval of a graph's operator order would cost as a stage, as matrices over possible cuts.

The order is cut into blocks; an interval ``[i, j)`` holds blocks ``i`` to ``j - 1``. Each value adds to the intervals
that contain one of its users, or its producer, or not all of them; each such set of intervals is a rectangle in
``(i, j)``, so all matrices are built from corner marks and two cumulative sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from graphpart.cost.memory.forecast import optimizer_bytes, saved_roots, trains
from graphpart.cost.storage import storage_roots
from graphpart.cost.time.roofline import OperatorWork, operator_works, sample_values, step_time
from graphpart.ir.cluster import Device
from graphpart.ir.graph import Graph, Source
from graphpart.ir.placement import default_homes
from graphpart.strategies.stages.interval_search import LinkPair, Matrix

# Rows of traffic: messages and bytes of values, then messages and bytes of their gradients.
_NUM_TRAFFIC = 4


@dataclass(frozen=True)
class Order:
    """Operators in the order that is cut, grouped in blocks that are never cut.

    Attributes:
        block_of: block per operator name.
        num_blocks: number of blocks.
        free: operators that are computed wherever they are needed (made from no source: masks, positions).
    """

    block_of: Mapping[str, int]
    num_blocks: int
    free: frozenset[str] = frozenset()


@dataclass(frozen=True)
class IntervalMemory:
    """Memory of every interval of blocks as one stage.

    Attributes:
        stays_bytes: ``[num_blocks + 1, num_blocks + 1]``: what is there whatever is in flight.
        activations_bytes: likewise: activations of the whole batch that are kept for backward.
    """

    stays_bytes: Matrix
    activations_bytes: Matrix

    def at(self, part: float = 1.0) -> Matrix:
        """Bytes of every interval when a part of the batch is in flight."""
        return self.stays_bytes + min(part, 1.0) * self.activations_bytes


@dataclass(frozen=True)
class IntervalCosts:
    """Costs of every interval of blocks as one stage, for a whole step.

    Attributes:
        order: the blocks.
        works: work per operator name.
        num_microbatches: parts of the batch.
        traffic_in: ``[4, num_blocks + 1, num_blocks + 1]``: messages and bytes of values that enter the interval,
            then of gradients that leave it for where they came from. Indexed by first block and end block.
        traffic_out: likewise for values that leave, and gradients that come back.
        memory: memory of the interval.
    """

    order: Order
    works: Mapping[str, OperatorWork]
    num_microbatches: int
    traffic_in: Matrix
    traffic_out: Matrix
    memory: IntervalMemory

    def compute_s(self, device: Device) -> Matrix:
        """Compute time of every interval on a device, in seconds a step; infinite where the interval is empty."""
        blocks = np.zeros(self.order.num_blocks)
        for name, block in self.order.block_of.items():
            blocks[block] += step_time(self.works[name], device, self.num_microbatches).total_s
        total = np.concatenate(([0.0], np.cumsum(blocks)))
        found = np.maximum(total[None, :] - total[:, None], 0.0)
        found[np.tri(len(total), dtype=bool)] = np.inf
        return found

    def load_s(self, device: Device, before: LinkPair | None, after: LinkPair | None) -> Matrix:
        """Compute and transfer time of every interval on a device, in seconds a step.

        Args:
            device: where the interval runs.
            before: links between the stage before and this device; None for the first stage.
            after: links between this device and the stage after; None for the last stage.
        """
        return self.compute_s(device) + _traffic_s(self.traffic_in, before) + _traffic_s(self.traffic_out, after)


def _traffic_s(traffic: Matrix, links: LinkPair | None) -> Matrix | float:
    """Time of messages by Hockney's model: values one way, gradients the other."""
    if links is None:
        return 0.0
    there, back = links
    return (
        traffic[0] * there.latency_s
        + traffic[1] / there.bandwidth_bytes_per_s
        + traffic[2] * back.latency_s
        + traffic[3] / back.bandwidth_bytes_per_s
    )


class _Marks:
    """Sums of weighted rectangles of intervals, as corner marks of a two-dimensional cumulative sum."""

    def __init__(self, num_rows: int, num_blocks: int) -> None:
        self._sums = np.zeros((num_rows, num_blocks + 2, num_blocks + 2))
        self._end = num_blocks + 1

    def add(self, weights: Matrix, starts: tuple[int, int], ends: tuple[int, int]) -> None:
        """Add to all ``[i, j)`` with ``i`` in the half-open ``starts`` and ``j`` in the half-open ``ends``."""
        (i0, i1), (j0, j1) = starts, ends
        if i0 < i1 and j0 < j1:
            self._sums[:, i0, j0] += weights
            self._sums[:, i1, j1] += weights
            self._sums[:, i0, j1] -= weights
            self._sums[:, i1, j0] -= weights

    def add_touching(self, weights: Matrix, blocks: Iterable[int]) -> None:
        """Add, once, to every interval that contains one of the blocks."""
        before = -1
        for block in sorted(set(blocks)):
            self.add(weights, (before + 1, block + 1), (block + 1, self._end))
            before = block

    def add_holding(self, weights: Matrix, first: int, last: int) -> None:
        """Add to every interval that contains both blocks."""
        self.add(weights, (0, first + 1), (last + 1, self._end))

    def total(self) -> Matrix:
        """The sums, ``[rows, num_blocks + 1, num_blocks + 1]``."""
        return self._sums.cumsum(axis=1).cumsum(axis=2)[:, : self._end, : self._end]


def measure(
    graph: Graph, order: Order, *, num_microbatches: int = 1, optimizer_bytes_per_element: float = 8
) -> IntervalCosts:
    """Cost every interval of an order.

    A value crosses once into each stage that reads it and once out of the stage that makes it, each microbatch
    if it carries samples, else once a step; its gradient takes the same way back. Parameters, buffers and
    constants start from their home: the operator that updates them, else the first that reads them. Inputs are
    at hand everywhere.

    Args:
        graph: the traced model.
        order: its operators in blocks.
        num_microbatches: parts of the batch.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
    """
    traffic_in, traffic_out = _traffic(graph, order, num_microbatches)
    return IntervalCosts(
        order,
        operator_works(graph),
        num_microbatches,
        traffic_in,
        traffic_out,
        interval_memory(graph, order, optimizer_bytes_per_element),
    )


def crossing_values(graph: Graph, order: Order) -> Iterable[tuple[str, int, tuple[int, ...]]]:
    """Every value that may cross a cut: its name, the block it starts from and the blocks that read it."""
    starts = default_homes(graph, order.block_of)
    starts.update(
        (value.name, order.block_of[op.name])
        for op in graph.operators
        if op.name not in order.free
        for value in op.results
    )
    for name, start in starts.items():
        users = {order.block_of[op.name] for op in graph.consumers[name] if op.name not in order.free}
        if users - {start}:
            yield name, start, tuple(sorted(users | {start}))


def _traffic(graph: Graph, order: Order, num_microbatches: int) -> tuple[Matrix, Matrix]:
    """Messages and bytes in and out of every interval."""
    samples = sample_values(graph)
    training = trains(graph)
    entering = _Marks(_NUM_TRAFFIC, order.num_blocks)
    leaving = _Marks(_NUM_TRAFFIC, order.num_blocks)
    for name, start, blocks in crossing_values(graph, order):
        value = graph.values[name]
        source = graph.source.get(name)
        gradient = value.requires_grad if source is None else training and source.trainable
        messages = num_microbatches if name in samples else 1
        weights = np.array([messages, value.size_bytes, messages * gradient, value.size_bytes * gradient], float)
        # It enters an interval with a reader but without the start, and leaves one with the start but not all readers.
        entering.add_touching(weights, blocks)
        entering.add_holding(-weights, start, start)
        leaving.add_holding(weights, start, start)
        leaving.add_holding(-weights, blocks[0], blocks[-1])
    return entering.total(), leaving.total()


def interval_memory(graph: Graph, order: Order, optimizer_bytes_per_element: float) -> IntervalMemory:
    """Memory of every interval.

    Args:
        graph: the traced model.
        order: its operators in blocks.
        optimizer_bytes_per_element: bytes of optimizer state per parameter element.
    """
    training = trains(graph)
    samples = sample_values(graph)
    marks = _Marks(2, order.num_blocks)  # what stays, and what microbatches have parts of
    homes = default_homes(graph, order.block_of)
    for source in graph.sources:
        name = source.value.name
        if source.kind == "input":
            continue
        home = homes[name]
        marks.add_touching(
            np.array([_bytes_where_used(source, training), 0], float),
            {home, *(order.block_of[op.name] for op in graph.consumers[name])},
        )
        if training:
            marks.add_holding(np.array([optimizer_bytes(source, optimizer_bytes_per_element), 0], float), home, home)
    roots = storage_roots(graph)
    keepers: dict[str, set[int]] = {root: set() for root in saved_roots(graph)}
    for op in graph.operators:
        block = order.block_of[op.name]
        for name in op.saved:
            if roots.get(name) in keepers:
                keepers[roots[name]].add(block)
        parted = any(name in samples for name in op.operands)
        marks.add_holding(_saved(op.saved_extra_bytes, parted), block, block)
    for root, blocks in keepers.items():
        marks.add_touching(_saved(graph.values[root].size_bytes, root in samples), blocks)
    return IntervalMemory(*marks.total())


def _saved(size_bytes: int, parted: bool) -> Matrix:
    """Bytes that are saved, as what stays and what microbatches have parts of."""
    return np.array([0, size_bytes] if parted else [size_bytes, 0], float)


def _bytes_where_used(source: Source, training: bool) -> int:
    """Bytes of a parameter and its gradient, or of a buffer."""
    copies = 2 if training and source.trainable and source.kind == "parameter" else 1
    return copies * source.value.size_bytes
