"""Paths of modules, such as ``transformer.h.0.attn``: what they are inside of, and what is near to one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate

from graphpart.ir.graph import Graph


@lru_cache(maxsize=65536)
def prefixes(path: str) -> tuple[str, ...]:
    """Paths of the modules on the way to one, the outermost first, itself last; not the model itself."""
    return tuple(accumulate(path.split("."), "{}.{}".format)) if path else ()


def nothing_matches(graph: Graph, pattern: str, what: str, paths: Iterable[str]) -> str:
    """The message for a pattern that fits nothing, with the nearest of some module paths.

    Args:
        graph: the traced model.
        pattern: shell-style (``*``, ``?``, ``[...]``).
        what: what it was to fit: ``operator`` or ``module``.
        paths: module paths that there are; repeated and empty ones don't count.
    """
    near = get_close_matches(pattern, list(dict.fromkeys(filter(None, paths))), n=3, cutoff=0.0)
    known = f"the nearest module paths are {', '.join(map(repr, near))}" if near else "it has no modules"
    return f"pattern {pattern!r} matches no {what} of {graph.name}; {known}"
