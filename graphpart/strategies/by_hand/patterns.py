"""Placements by hand: patterns on module paths, as in ``{"encoder.*": 0, "*": 1}``."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.module_paths import nothing_matches
from graphpart.ir.placement import Placement


def by_pattern(graph: Graph, patterns: Mapping[str, int]) -> Placement:
    """Place operators by patterns; what no pattern matches follows its neighbours.

    An operator belongs to the first pattern that matches its module path, its name, or both joined by a dot (so that
    ``encoder.*`` also takes what ``encoder`` itself computes). The others go where their first placed operand is
    made, or where a parameter they read is already used; failing that, to their first placed reader.

    Args:
        graph: the traced model.
        patterns: device index by shell-style pattern (``*``, ``?``, ``[...]``), in order of precedence.

    Raises:
        PlacementError: if a pattern matches nothing, or a device index isn't a number from 0 up.
    """
    for pattern, device in patterns.items():
        if isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise PlacementError(f"pattern {pattern!r}: {device!r} is no device index; give 0, 1, …")
        check_pattern(graph, pattern)
    placed: dict[str, int] = {}
    for op in graph.operators:
        found = next((pattern for pattern in patterns if matches(op, pattern)), None)
        if found is not None:
            placed[op.name] = patterns[found]
    _follow_operands(graph, placed)
    _follow_readers(graph, placed)
    return Placement.whole(graph, placed)


def check_pattern(graph: Graph, pattern: str) -> None:
    """Raise a ``PlacementError`` where a pattern names nothing."""
    if not any(matches(op, pattern) for op in graph.operators):
        raise PlacementError(nothing_matches(graph, pattern, "operator", (op.module_path for op in graph.operators)))


def matches(op: Operator, pattern: str) -> bool:
    """Whether a shell-style pattern fits an operator's module path, its name, or both joined by a dot."""
    return any(fnmatchcase(name, pattern) for name in (op.module_path, op.name, f"{op.module_path}.{op.name}"))


def _follow_operands(graph: Graph, placed: dict[str, int]) -> None:
    """Place operators with their first placed operand, in topological order."""
    used_on: dict[str, int] = {}
    for op in graph.operators:
        if op.name in placed:
            for name in op.operands:
                if name in graph.source and graph.source[name].kind != "input":
                    used_on.setdefault(name, placed[op.name])
    for op in graph.operators:
        if op.name in placed:
            continue
        for name in op.operands:
            maker = graph.producer.get(name)
            device = placed.get(maker.name) if maker else used_on.get(name)
            if device is not None:
                placed[op.name] = device
                break


def _follow_readers(graph: Graph, placed: dict[str, int]) -> None:
    """Place what is left with its first placed reader, else with the operator after it, else on device 0."""
    after = 0
    for op in reversed(graph.operators):
        if op.name not in placed:
            readers = (reader for value in op.results for reader in graph.consumers[value.name])
            placed[op.name] = next((placed[r.name] for r in readers if r.name in placed), after)
        after = placed[op.name]
