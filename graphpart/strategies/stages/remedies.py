"""What would make a model fit: the smallest change of each kind, computed, for the message of an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphpart.cost.memory.forecast import trains
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph
from graphpart.strategies.memory.terms import Terms
from graphpart.strategies.stages.interval_costs import IntervalMemory, Order, interval_memory
from graphpart.strategies.stages.interval_search import Matrix

PartsKept = Callable[[int], Sequence[float]]
"""Per stage of so many, the part of the batch whose activations it keeps."""

_MOST_DEVICES = 4096

_OPTIMIZERS = ((4, "SGD with momentum"), (0, "plain SGD"))
"""Bytes of state per parameter element of lighter optimizers than AdamW, heaviest first."""


def remedies(
    graph: Graph,
    cluster: Cluster,
    order: Order,
    parts: PartsKept,
    terms: Terms,
) -> str:
    """A sentence with the changes that, each alone, let a layer split fit.

    A smaller batch keeps fewer activations in proportion; more devices are of the kind with most memory. Every
    change that is named was tried on the memory of each interval of the order.

    Args:
        graph: the traced model.
        cluster: the devices that are too few or too small.
        order: blocks that a split may be cut between.
        parts: what stages keep.
        terms: what to count with.
    """
    limits, optimizer_bytes = terms.limits_bytes(cluster), terms.optimizer_bytes_per_element
    memory = interval_memory(graph, order, optimizer_bytes)
    found = []
    batch, smaller = _smaller_batch(graph, memory, parts, limits)
    if smaller:
        found.append(f"a batch of {smaller} instead of {batch}")
    num_devices = _num_needed(memory, parts, limits)
    if num_devices:
        largest = max(cluster.devices, key=lambda device: device.memory_bytes)
        more = f"{num_devices - len(cluster)} more of {largest.kind}"
        found.append(f"{num_devices} devices ({more}) instead of {len(cluster)}")
    if trains(graph):
        found += _with_lighter_optimizer(graph, order, parts, limits, optimizer_bytes, bool(smaller))
    if found:
        return f"What would fit{', each alone' if len(found) > 1 else ''}: {'; or '.join(found)}."
    return (
        "No smaller batch, lighter optimizer (optimizer_bytes_per_element) or number of such devices alone would fit; "
        "use devices with more memory or a lower precision."
    )


def _smaller_batch(graph: Graph, memory: IntervalMemory, parts: PartsKept, limits: Sequence[float]) -> tuple[int, int]:
    """The batch, and the largest smaller one that fits; 0 where there is none."""
    batch = next((graph.values[name].shape[dim] for name, dim in graph.sample_dims.items()), 0)
    fits, fails = 0, batch
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _fits(memory, parts, limits, middle / batch) else (fits, middle)
    return batch, fits


def _with_lighter_optimizer(
    graph: Graph,
    order: Order,
    parts: PartsKept,
    limits: Sequence[float],
    optimizer_bytes_per_element: float,
    alone: bool,
) -> list[str]:
    """The heaviest common optimizer that fits; if none does and not ``alone``, one that fits with a smaller batch."""
    lighter = [(n, name) for n, name in _OPTIMIZERS if n < optimizer_bytes_per_element]
    counted = f"instead of {optimizer_bytes_per_element:g} bytes of optimizer state per parameter element"
    for num_bytes, name in lighter:
        if _fits(interval_memory(graph, order, num_bytes), parts, limits):
            return [f"{name} ({num_bytes} bytes) {counted}"]
    for num_bytes, name in () if alone else lighter:
        batch, smaller = _smaller_batch(graph, interval_memory(graph, order, num_bytes), parts, limits)
        if smaller:
            return [f"a batch of {smaller} instead of {batch} together with {name} ({num_bytes} bytes) {counted}"]
    return []


def _fits(memory: IntervalMemory, parts: PartsKept, limits: Sequence[float], batch_share: float = 1.0) -> bool:
    """Whether devices with these limits, in this order, hold all blocks. Exact where they are alike."""
    stages = [batch_share * part for part in parts(len(limits))]
    return _covered(memory, stages, limits)[0] == len(memory.stays_bytes) - 1


def _num_needed(memory: IntervalMemory, parts: PartsKept, limits: Sequence[float]) -> int:
    """How many devices hold all blocks if ones like the largest are added; 0 where no number does."""

    def used(num_devices: int) -> int:
        more = [max(limits)] * (num_devices - len(limits))
        covered, used = _covered(memory, parts(num_devices), [*limits, *more])
        return used if covered == len(memory.stays_bytes) - 1 else 0

    most = len(limits) + _MOST_DEVICES
    if len(set(parts(most))) == 1:  # what a stage keeps does not depend on how many follow
        found = used(most)
        return found if found > len(limits) else 0
    fails, fits = len(limits), len(limits) + 1
    while not used(fits):
        fails, fits = fits, 2 * fits
        if fits > most:
            return 0
    while fits - fails > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if used(middle) else (fits, middle)
    return fits


def _covered(memory: IntervalMemory, parts: Sequence[float], limits: Sequence[float]) -> tuple[int, int]:
    """Blocks that devices hold if each takes as many as it can, and the number of devices that took part."""
    end, most = len(memory.stays_bytes) - 1, max(limits)
    first = used = 0
    for part, limit in zip(parts, limits, strict=True):
        used += 1
        fitting = (_row(memory, first, part) <= limit).nonzero()[0]
        first += int(fitting[-1]) + 1 if len(fitting) else 0
        if first == end:
            break
        if not len(fitting) and limit == most and part == min(parts):
            break
    return first, used


def _row(memory: IntervalMemory, first: int, part: float) -> Matrix:
    """Bytes of the intervals that begin with a block."""
    return memory.stays_bytes[first, first + 1 :] + part * memory.activations_bytes[first, first + 1 :]
