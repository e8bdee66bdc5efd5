"""Time of one operator on one device, by the roofline model.

An operator can run no faster than its arithmetic at the device's rate, nor than its traffic at the memory's
bandwidth (S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009). A fixed time to start it is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphpart.cost.storage import base_name, is_view
from graphpart.ir.cluster import Device
from graphpart.ir.graph import Graph, Operator

# These read as many elements of their first operand as they write, not all of it.
_GATHERS = frozenset(["embedding", "index", "index_select", "gather", "take", "pick_class"])


@dataclass(frozen=True, slots=True)
class OperatorWork:
    """What one operator does for the whole batch, apart from any device.

    Attributes:
        flops_forward: floating-point operations forward.
        flops_backward: floating-point operations of its gradients.
        bytes_forward: memory traffic forward.
        bytes_backward: memory traffic of its gradients.
        dtype: decides the device's rate.
        carries_samples: whether a microbatch takes only a part of it.
        has_backward: whether a gradient flows through it.
    """

    flops_forward: float
    flops_backward: float
    bytes_forward: float
    bytes_backward: float
    dtype: str
    carries_samples: bool
    has_backward: bool


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """Time of one call of an operator.

    Attributes:
        forward_s: forward time in seconds.
        backward_s: time of its gradients in seconds; 0 where it has none.
    """

    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward time in seconds."""
        return self.forward_s + self.backward_s


def sample_values(graph: Graph) -> frozenset[str]:
    """Names of the values that carry samples: those made from the inputs that do, but for scalars."""
    found = set(graph.sample_dims)
    for op in graph.operators:
        if any(name in found for name in op.operands):
            found.update(value.name for value in op.results if value.shape)
    return frozenset(found)


def operator_works(graph: Graph) -> Mapping[str, OperatorWork]:
    """The work of every operator of a graph, by operator name."""
    samples = sample_values(graph)
    return {op.name: _work(op, graph, samples) for op in graph.operators}


def _work(op: Operator, graph: Graph, samples: frozenset[str]) -> OperatorWork:
    operands = [graph.values[name] for name in dict.fromkeys(op.operands)]
    has_backward = any(value.requires_grad for value in op.results)
    made = sum(value.size_bytes for value in op.results)
    forward = backward = 0.0
    if not is_view(op):
        read = sum(value.size_bytes for value in operands)
        if operands and base_name(op.target) in _GATHERS:
            read += min(made, operands[0].size_bytes) - operands[0].size_bytes
        forward = float(read + made)
        if has_backward:
            kept = sum(graph.values[name].size_bytes for name in dict.fromkeys(op.saved) if name in graph.values)
            gradients = sum(value.size_bytes for value in (*operands, *op.results) if value.requires_grad)
            backward = float(kept + gradients)
    return OperatorWork(
        flops_forward=op.flops_forward,
        flops_backward=op.flops_backward if has_backward else 0.0,
        bytes_forward=forward,
        bytes_backward=backward,
        dtype=op.results[0].dtype if op.results else "float32",
        carries_samples=any(name in samples for name in op.operands),
        has_backward=has_backward,
    )


def operator_time(work: OperatorWork, device: Device, fraction: float = 1.0) -> OperatorTime:
    """Time of one call of an operator.

    ``max(flops / (rate * efficiency), bytes / memory bandwidth) + overhead``, forward and backward apart.

    Args:
        work: what it does for the whole batch.
        device: where it runs.
        fraction: part of the operator's work that the call does, in ``(0, 1]``. The overhead doesn't shrink with it.
    """
    forward = fraction * roofline_s(work.flops_forward, work.bytes_forward, work.dtype, device) + device.overhead_s
    if not work.has_backward:
        return OperatorTime(forward, 0.0)
    backward = fraction * roofline_s(work.flops_backward, work.bytes_backward, work.dtype, device) + device.overhead_s
    return OperatorTime(forward, backward)


def roofline_s(flops: float, size_bytes: float, dtype: str, device: Device) -> float:
    """The longer of arithmetic and memory traffic, in seconds.

    Args:
        flops: floating-point operations.
        size_bytes: bytes read and written.
        dtype: of the arithmetic.
        device: where it runs.
    """
    arithmetic_s = flops / (device.rate(dtype) * device.efficiency)
    return max(arithmetic_s, size_bytes / device.memory_bandwidth_bytes_per_s)


def step_time(work: OperatorWork, device: Device, num_microbatches: int = 1) -> OperatorTime:
    """Time of an operator in one whole step: once for each microbatch if it carries samples, else once.

    Args:
        work: what it does for the whole batch.
        device: where it runs.
        num_microbatches: parts of the batch.
    """
    calls = num_microbatches if work.carries_samples else 1
    once = operator_time(work, device, 1.0 / calls)
    return OperatorTime(once.forward_s * calls, once.backward_s * calls)
