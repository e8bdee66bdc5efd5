"""Modules that might run again for their backward, and the blocks of a model that together need least memory so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graphpart.cost.memory.recompute import members, run_again
from graphpart.cost.memory.saved import Savings, total_bytes
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.module_paths import prefixes
from graphpart.ir.placement import Placement, Tile

Modules = Mapping[str, tuple[Operator, ...]]
"""Operators by the call of a module that they are in."""

_MOST_HALVINGS = 8


def modules_of(graph: Graph, taken: Iterable[str] = ()) -> Modules:
    """Every call of a module through which a gradient flows, the outer ones first; of equal ones, the outermost.

    Args:
        graph: the traced model.
        taken: operators that run again anyway; modules that hold one of them are left out.
    """
    taken = frozenset(taken)
    paths: dict[str, list[Operator]] = {}
    for op in graph.operators:
        for path in prefixes(op.call_path or op.module_path):
            paths.setdefault(path, []).append(op)
    found: dict[tuple[str, ...], str] = {}
    for path in sorted(paths, key=lambda path: path.count(".")):
        names = tuple(op.name for op in paths[path])
        has_gradient = any(value.requires_grad for op in paths[path] for value in op.results)
        if has_gradient and taken.isdisjoint(names):
            found.setdefault(names, path)
    return {path: tuple(paths[path]) for path in found.values()}


def blocks_of(graph: Graph, taken: Mapping[str, str], num_microbatches: int) -> dict[str, str]:
    """Disjoint modules that all run again, so large that what they read and what the largest of them saves is least.

    Each is an outermost module that saves no more than a part of the whole; a half, a quarter, … are tried.

    Args:
        graph: the traced model.
        taken: groups that run again anyway.
        num_microbatches: parts of the batch; a block that runs again saves what one of them does.

    Returns:
        Group by operator name, ``taken`` among them.
    """
    savings = Savings(graph, Placement({op.name: (Tile(0),) for op in graph.operators}), 1)
    modules = modules_of(graph, taken)
    saved_bytes = {path: total_bytes(savings.of(ops)[0], 1.0) for path, ops in modules.items()}
    most_bytes = total_bytes(savings.of(graph.operators)[0], 1.0)
    best: tuple[float, dict[str, str]] | None = None
    for halving in range(_MOST_HALVINGS):
        groups = dict(taken)
        for path, ops in modules.items():
            if saved_bytes[path] <= most_bytes / 2**halving and not any(op.name in groups for op in ops):
                groups.update((op.name, path) for op in ops)
        needed_bytes = _needed_bytes(graph, savings, groups, num_microbatches)
        if best is None or needed_bytes < best[0]:
            best = (needed_bytes, groups)
    assert best is not None
    return best[1]


def _needed_bytes(graph: Graph, savings: Savings, groups: Mapping[str, str], num_microbatches: int) -> float:
    """What is kept, and the most that one group saves, on one device."""
    again = members(graph, groups)
    changed = {op.name: op for ops in again.values() for op in run_again(graph, ops)}
    kept = total_bytes(savings.of(changed.get(op.name, op) for op in graph.operators)[0], 1.0)
    return kept + largest_bytes(savings, again, num_microbatches)[0]


def largest_bytes(savings: Savings, groups: Modules, num_microbatches: int) -> list[int]:
    """Per device, the most that one group saves while it runs again."""
    found = [0] * savings.num_devices
    for ops in groups.values():
        for device, storages in enumerate(savings.of(ops)):
            found[device] = max(found[device], total_bytes(storages, 1 / num_microbatches))
    return found
