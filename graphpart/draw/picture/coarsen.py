"""Coarser and coarser groups until a picture fits: modules, then runs of alike blocks, then neighbours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from graphpart.draw.picture.quotient import (
    Group,
    ModulePath,
    Quotient,
    anchors,
    common_path,
    gather,
    join,
    module_parts,
)
from graphpart.draw.words.share import operator_devices
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement

FEWEST_PATHS = 4
"""With fewer distinct modules than this the modules say little, and single operators are the start."""

DEEPER = 1.5
"""Detail is given up only for pictures deeper than this, times the depth aimed at."""

_NUMBER = re.compile(r"\d+")
_NUMBERED = re.compile(r"(.*?)(\d+)")
_CANDIDATES_TO_CHECK = 30

Paths = dict[str, ModulePath]
"""Per operator, the path of the box it is drawn in."""

BoxRun = tuple[ModulePath, ...]
"""Paths of alike blocks that follow one another."""


def coarsen(graph: Graph, placement: Placement, max_boxes: int, max_depth: int) -> tuple[Group, ...]:
    """Groups for the boxes of a picture, in topological order.

    Repeated sub-modules fold first, from the deepest up; then runs of alike blocks, of which one stays open
    where there is room; then other modules; and where all that isn't enough, neighbours merge, smallest first.

    Args:
        graph: the traced model.
        placement: where its operators run.
        max_boxes: never more groups than this.
        max_depth: groups on the longest path that is aimed at.
    """
    anchor, devices = anchors(graph), operator_devices(graph, placement)

    def quotient_of(paths: Paths) -> Quotient:
        widest = _widest(paths, devices)
        return Quotient(
            graph, gather(graph, anchor, {n: (path, widest[path, devices[n]]) for n, path in paths.items()})
        )

    def fits(paths: Paths, depth: float) -> bool:
        quotient = quotient_of(paths)
        return len(quotient) <= max_boxes and quotient.depth() <= depth

    history = [_start(graph)]
    while not fits(history[-1], DEEPER * max_depth) and (coarser := _fold_repeated(history[-1])) is not None:
        history.append(coarser)
    paths = history[-1]
    repeats: dict[ModulePath, int] = {}
    if not fits(paths, max_depth):
        runs = _runs(graph, anchor, quotient_of(paths))
        long = [run for run in runs if len(run) > 2]
        opened = [(long, finer) for finer in history[-2:-1]]
        for chosen, finer in (*opened, (long, None), (runs, None)):
            paths, repeats = _with_runs(history[-1], chosen, finer)
            if fits(paths, max_depth):
                break
    while len(quotient_of(paths)) > max_boxes and (coarser := _fold_parents(paths)) is not None:
        paths = coarser
    quotient = quotient_of(paths)
    _merge_neighbours(quotient, max_boxes, DEEPER * max_depth)
    _merge_anything(quotient, max_boxes, 2 * DEEPER * max_depth)
    position = {op.name: i for i, op in enumerate(graph.operators)}
    return tuple(
        replace(g, repeats=repeats.get(g.path, 1), members=tuple(sorted(g.members, key=position.__getitem__)))
        for g in quotient.in_order()
    )


def _widest(
    paths: Paths, devices: Mapping[str, tuple[int, ...]]
) -> dict[tuple[ModulePath, tuple[int, ...]], tuple[int, ...]]:
    """Per path and devices, the largest set of devices in that path that holds them.

    A module that is cut over two devices stays one box although some of its operators are whole on one of them.
    """
    found: dict[ModulePath, set[tuple[int, ...]]] = {}
    for name, path in paths.items():
        found.setdefault(path, set()).add(devices[name])
    return {
        (path, small): max((large for large in sets if set(small) <= set(large)), key=lambda s: (len(s), s))
        for path, sets in found.items()
        for small in sets
    }


def _with_runs(paths: Paths, runs: Sequence[BoxRun], finer: Paths | None) -> tuple[Paths, dict[ModulePath, int]]:
    """Paths with each run as one, but for the first block of the longest one, which keeps its paths of ``finer``."""
    longest = max(runs, key=len, default=())
    renamed: dict[ModulePath, ModulePath] = {}
    repeats: dict[ModulePath, int] = {}
    for run in runs:
        blocks = run[1:] if run == longest and finer is not None else run
        name = (*blocks[0][:-1], f"{blocks[0][-1]}–{blocks[-1][-1]}") if len(blocks) > 1 else blocks[0]
        renamed |= dict.fromkeys(blocks, name)
        repeats[name] = len(blocks)
    opened = longest[0] if longest else ()
    changed = {
        name: finer[name] if finer is not None and path == opened else renamed.get(path, path)
        for name, path in paths.items()
    }
    return changed, repeats


def _start(graph: Graph) -> Paths:
    paths = {op.name: module_parts(op.module_path) for op in graph.operators}
    if len(set(paths.values())) < FEWEST_PATHS:
        return {name: (*path, name) for name, path in paths.items()}
    return paths


def _inner(paths: Paths) -> dict[ModulePath, set[ModulePath]]:
    """Every module that has sub-modules, with the paths at or below it."""
    found: dict[ModulePath, set[ModulePath]] = {}
    for path in set(paths.values()):
        for depth in range(1, len(path)):
            found.setdefault(path[:depth], set()).add(path)
    for path in set(paths.values()):
        if path in found:
            found[path].add(path)
    return found


def _fold_into(paths: Paths, modules: set[ModulePath]) -> Paths:
    depth = len(next(iter(modules)))
    return {name: path[:depth] if path[:depth] in modules else path for name, path in paths.items()}


def _fold_repeated(paths: Paths) -> Paths | None:
    """Fold the deepest modules that occur several times under one pattern, those with the most parts first."""
    alike: dict[tuple[str, ...], set[ModulePath]] = {}
    inner = _inner(paths)
    for module in inner:
        alike.setdefault(tuple(_NUMBER.sub("#", part) for part in module), set()).add(module)
    repeated = [modules for modules in alike.values() if len(modules) > 1]
    if not repeated:
        return None

    def rank(modules: set[ModulePath]) -> tuple[int, int, ModulePath]:
        return len(min(modules)), sum(len(inner[m]) - 1 for m in modules), min(modules)

    return _fold_into(paths, max(repeated, key=rank))


def _fold_parents(paths: Paths) -> Paths | None:
    inner = _inner(paths)
    return _fold_into(paths, {max(inner, key=lambda m: (len(m), len(inner[m]), m))}) if inner else None


def _runs(graph: Graph, anchor: Mapping[str, str], quotient: Quotient) -> list[BoxRun]:
    """Blocks such as ``h.3``, ``h.4``, ``h.5`` that follow one another on one device and are alike."""
    at: dict[ModulePath, list[int]] = {}
    for i, group in quotient.groups.items():
        at.setdefault(group.path, []).append(i)
    alone = {path: quotient.groups[where[0]] for path, where in at.items() if len(where) == 1}
    signature = {path: _signature(graph, anchor, group) for path, group in alone.items()}
    runs: list[BoxRun] = []
    seen: set[ModulePath] = set()
    for path, group in sorted(alone.items(), key=lambda item: item[1].first):
        if path in seen:
            continue
        run, here = [path], at[path][0]
        while (following := _successor(run[-1])) in alone:
            there, other = at[following][0], alone[following]
            fit = other.devices == group.devices and signature[following] == signature[path]
            if not fit or there not in quotient.after[here] or quotient.makes_cycle(here, there):
                break
            quotient.merge(here, there, join(quotient.groups[here], other, path))
            run.append(following)
        seen.update(run)
        if len(run) > 1:
            runs.append(tuple(run))
    return runs


def _successor(path: ModulePath) -> ModulePath:
    match = _NUMBERED.fullmatch(path[-1]) if path else None
    return (*path[:-1], f"{match[1]}{int(match[2]) + 1}") if match else ()


def _signature(graph: Graph, anchor: Mapping[str, str], group: Group) -> tuple[object, ...]:
    def weights(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(graph.source[n].value.shape for n in graph.operator[name].operands if n in graph.source)

    own = (graph.operator[name] for name in group.members if anchor[name] == name)
    return tuple((op.target, tuple(v.shape for v in op.results), weights(op.name)) for op in own)


def _merge_neighbours(quotient: Quotient, max_boxes: int, max_depth: float) -> None:
    """Merge groups joined by an edge, smallest first: siblings as long as it helps, others if there are too many."""
    for siblings in (True, False):
        merged = True
        while merged:
            merged = False
            used: set[int] = set()
            for a, b in _edges(quotient, siblings):
                if len(quotient) <= max_boxes and (not siblings or quotient.depth() <= max_depth):
                    return
                if not {a, b} & used and not quotient.makes_cycle(a, b):
                    used |= {a, b}
                    _merge(quotient, a, b)
                    merged = True


def _edges(quotient: Quotient, siblings: bool) -> list[tuple[int, int]]:
    """Edges between groups on the same devices, those of few operators first."""
    groups = quotient.groups

    def fit(a: Group, b: Group) -> bool:
        return a.devices == b.devices and (not siblings or a.path[:-1] == b.path[:-1] != a.path)

    def size(pair: tuple[int, int]) -> tuple[int, int]:
        return len(groups[pair[0]].members) + len(groups[pair[1]].members), groups[pair[0]].first

    return sorted(((a, b) for a in groups for b in quotient.after[a] if fit(groups[a], groups[b])), key=size)


def _merge(quotient: Quotient, a: int, b: int) -> None:
    first, second = sorted((quotient.groups[a], quotient.groups[b]), key=lambda g: g.first)
    parent = common_path((first.path, second.path))
    if parent in (first.path, second.path):
        quotient.merge(a, b, join(first, second, parent))
        return
    depth = len(parent)
    span = (
        first.span[0] if first.span else first.path[depth].split("–")[0],
        second.span[1] if second.span else second.path[depth].split("–")[-1],
    )
    quotient.merge(a, b, join(first, second, (*parent, f"{span[0]} … {span[1]}"), span=span))


def _merge_anything(quotient: Quotient, max_boxes: int, max_depth: float) -> None:
    """The last resort: merge groups that come one after the other, if possible on the same devices."""
    while len(quotient) > max(max_boxes, 1) or quotient.depth() > max_depth:
        order = sorted(quotient.groups, key=lambda i: quotient.groups[i].first)
        previous: dict[tuple[int, ...], int] = {}
        pairs = []
        for i in order:
            devices = quotient.groups[i].devices
            if devices in previous:
                pairs.append((previous[devices], i))
            previous[devices] = i
        if not pairs and len(quotient) <= max_boxes:
            return
        pairs = pairs or list(pairwise(order))
        pairs.sort(key=lambda p: len(quotient.groups[p[0]].members) + len(quotient.groups[p[1]].members))
        good = (p for p in pairs[:_CANDIDATES_TO_CHECK] if not quotient.makes_cycle(*p))
        _merge(quotient, *next(good, pairs[0]))
