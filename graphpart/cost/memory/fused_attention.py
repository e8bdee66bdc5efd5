"""What attention with dropout keeps for its backward where it is one kernel, as it is on GPUs.

T. Dao et al., "FlashAttention", NeurIPS 2022: operands, result and the logarithm of each row's sum; weights and their
mask are made again from the seed. Traces count what is kept where attention is written out: weights and mask.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator

_TARGET = "aten.scaled_dot_product_attention.default"
_BYTES_OF_A_SUM = 4
"""Sums are float32 whatever the operands are."""


def with_fused_attention(graph: Graph, cluster: Cluster) -> Graph:
    """The graph as devices keep it: where a CPU is among them, attention with dropout counts as written out."""
    if any(device.place.startswith("cpu") for device in cluster.devices):
        return graph
    operators = tuple(_fused(op) if _is_attention_with_dropout(op) else op for op in graph.operators)
    return graph if operators == graph.operators else replace(graph, operators=operators)


def _is_attention_with_dropout(op: Operator) -> bool:
    return op.random and op.target == _TARGET and bool(op.saved or op.saved_extra_bytes)


def _fused(op: Operator) -> Operator:
    (result,) = op.results
    rows = prod(result.shape[:-1])
    return replace(op, saved=(*op.operands, result.name), saved_extra_bytes=rows * _BYTES_OF_A_SUM)
