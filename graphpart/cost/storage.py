"""What is stored: values that share memory, since a view has the storage of its tensor, and state of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from graphpart.ir.graph import Graph, Operator

VIEWS = frozenset({
    "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "expand_as", "flatten", "lift_fresh",
    "movedim", "narrow", "permute", "real", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view",
    "view_as", "_reshape_alias", "_unsafe_view", "getitem",
})  # fmt: skip
"""Operators (names without overload) whose results share the storage of their first operand."""


ADAMW_BYTES_PER_ELEMENT = 8
"""AdamW keeps two float32 moments per parameter element (Loshchilov and Hutter, ICLR 2019)."""


def base_name(target: str) -> str:
    """``view`` of ``aten.view.default``; ``getitem`` of ``operator.getitem``."""
    parts = target.split(".")
    return parts[1] if len(parts) > 1 else target


def is_view(operator: Operator) -> bool:
    """Whether an operator moves no data."""
    return bool(operator.operands) and base_name(operator.target) in VIEWS


def storage_roots(graph: Graph) -> Mapping[str, str]:
    """Per value, the value whose storage it shares; its own name where it shares none."""
    roots = {source.value.name: source.value.name for source in graph.sources}
    for op in graph.operators:
        shared = roots[op.operands[0]] if is_view(op) else None
        for value in op.results:
            roots[value.name] = shared or value.name
    return roots
