"""Groups of operators that run again for their backward: the user's checkpoints, or modules named by patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from graphpart.errors import ArgumentError
from graphpart.ir.graph import Graph
from graphpart.ir.module_paths import nothing_matches, prefixes

Recompute = str | Sequence[str]
"""``auto``, ``none``, or patterns over module paths."""


def groups_of(graph: Graph, recompute: Recompute) -> dict[str, str]:
    """What a user asked to run again, as groups.

    Args:
        graph: the traced model.
        recompute: ``auto`` takes the model's own calls of ``torch.utils.checkpoint``, ``none`` nothing; else patterns,
            see :func:`groups_by_pattern`.

    Returns:
        Group by operator name.

    Raises:
        ArgumentError: if a pattern matches no module.
    """
    if isinstance(recompute, str):
        if recompute == "auto":
            return {op.name: op.recompute for op in graph.operators if op.recompute}
        return {} if recompute == "none" else groups_by_pattern(graph, (recompute,))
    return groups_by_pattern(graph, recompute)


def check_recompute(recompute: Recompute) -> None:
    """Raise an :class:`~graphpart.errors.ArgumentError` for what is neither a word nor patterns."""
    if not isinstance(recompute, Sequence) or not all(isinstance(pattern, str) for pattern in recompute):
        raise ArgumentError(f"recompute={recompute!r}; give 'auto', 'none', or patterns such as ['encoder.layer.*']")


def groups_by_pattern(graph: Graph, patterns: Sequence[str]) -> dict[str, str]:
    """Each call of a module that matches a pattern is one group; a module inside of one that matches belongs to it.

    Args:
        graph: the traced model.
        patterns: shell-style (``*``, ``?``, ``[...]``) over module paths, such as ``transformer.h.*``.

    Returns:
        Group, which is the path of the module's call, by operator name.

    Raises:
        ArgumentError: if a pattern matches no module; it names the nearest paths.
    """
    found: dict[str, str] = {}
    met: set[str] = set()
    for op in graph.operators:
        for path, call in zip(prefixes(op.module_path), prefixes(op.call_path or op.module_path), strict=True):
            matching = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
            met.update(matching)
            if matching:
                found.setdefault(op.name, call)
    for pattern in patterns:
        if pattern not in met:
            paths = (path for op in graph.operators for path in prefixes(op.module_path))
            raise ArgumentError(f"recompute: {nothing_matches(graph, pattern, 'module', paths)}")
    return found
