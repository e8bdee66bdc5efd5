"""What crosses between devices in a narrower type, as TensorFlow's partitioner casts on the wire.

TensorFlow white paper (2015), section 5.5, "Lossy Compression": float32 becomes a 16-bit type before it is sent, and is
filled up with zeros on arrival.
"""

from __future__ import annotations

from graphpart.errors import ArgumentError
from graphpart.ir.graph import Graph

WIRE_DTYPES = ("bfloat16", "float16")


def check_wire_dtype(wire_dtype: str | None) -> None:
    """Raise an :class:`~graphpart.errors.ArgumentError` unless float32 values can be sent as this type."""
    if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
        raise ArgumentError(
            f"wire_dtype={wire_dtype!r}; give {' or '.join(map(repr, WIRE_DTYPES))}, or None to send as is"
        )


def activations(graph: Graph) -> frozenset[str]:
    """Values that may lose digits on their way: float32, computed from the model's inputs, and no scalars.

    Parameters and what is computed from them alone, losses, and values that buffers are overwritten with stay exact;
    so do the sums that lowering itself adds, since the traced graph has none of them.

    Args:
        graph: the traced graph, before any rewrite.
    """
    kept = {value for _, value in graph.mutations}
    from_input = {source.value.name for source in graph.inputs}
    found: set[str] = set()
    for op in graph.operators:
        if not from_input.isdisjoint(op.operands):
            from_input.update(value.name for value in op.results)
            found.update(v.name for v in op.results if v.dtype == "float32" and v.shape and v.name not in kept)
    return frozenset(found)
