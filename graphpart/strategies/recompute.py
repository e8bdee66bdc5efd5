"""Groups of operators that run again for their backward: named by patterns over module paths."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate

from graphpart.errors import PlanError
from graphpart.ir.graph import Graph, Operator

Recompute = str | Sequence[str]
"""``auto``, ``none``, or patterns over module paths."""


def groups_of(graph: Graph, recompute: Recompute) -> dict[str, str]:
    """What a user asked to run again, as groups.

    Args:
        graph: the traced model.
        recompute: ``auto`` and ``none`` ask for nothing; else patterns, see :func:`groups_by_pattern`.

    Returns:
        Group by operator name.

    Raises:
        PlanError: if it is nothing of that, or a pattern matches no module.
    """
    if isinstance(recompute, str):
        return {} if recompute in ("auto", "none") else groups_by_pattern(graph, (recompute,))
    if not isinstance(recompute, Sequence) or not all(isinstance(pattern, str) for pattern in recompute):
        raise PlanError(f"recompute={recompute!r}; give 'auto', 'none', or patterns such as ['encoder.layer.*']")
    return groups_by_pattern(graph, recompute)


def groups_by_pattern(graph: Graph, patterns: Sequence[str]) -> dict[str, str]:
    """Each module that matches a pattern is one group; a module inside of one that matches belongs to it.

    Args:
        graph: the traced model.
        patterns: shell-style (``*``, ``?``, ``[...]``) over module paths, such as ``transformer.h.*``.

    Returns:
        Group, which is the module's path, by operator name.

    Raises:
        PlanError: if a pattern matches no module; it names the nearest paths.
    """
    found: dict[str, str] = {}
    met: set[str] = set()
    for op in graph.operators:
        matching = [(path, p) for path in _modules(op) for p in patterns if fnmatchcase(path, p)]
        met.update(pattern for _, pattern in matching)
        if matching:
            found[op.name] = matching[0][0]
    for pattern in patterns:
        if pattern not in met:
            raise PlanError(_nothing_matches(graph, pattern))
    return found


def _modules(op: Operator) -> list[str]:
    """Paths of the modules that an operator is in, the outermost first; not the model itself."""
    return list(accumulate(op.module_path.split("."), "{}.{}".format)) if op.module_path else []


def _nothing_matches(graph: Graph, pattern: str) -> str:
    paths = list(dict.fromkeys(path for op in graph.operators for path in _modules(op)))
    near = get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return f"recompute: pattern {pattern!r} matches no module of {graph.name}; " + (
        f"the nearest module paths are {', '.join(map(repr, near))}" if near else "it has no modules"
    )
