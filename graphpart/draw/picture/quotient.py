"""Groups of operators and what lies between them: the working form of folding."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphpart.ir.graph import Graph

ModulePath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Operators that will share a box.

    Attributes:
        path: module path, a part each; a number is kept with the part before it, as in ``("h.0", "attn")``.
        devices: indices of the devices they run on.
        members: operator names, in topological order.
        first: position of the first one in the graph.
        repeats: number of alike blocks that were folded into one.
        span: first and last module of several merged ones.
    """

    path: ModulePath
    devices: tuple[int, ...]
    members: tuple[str, ...]
    first: int
    repeats: int = 1
    span: tuple[str, str] | None = None


def module_parts(module_path: str) -> ModulePath:
    """``"transformer.h.0.attn"`` as ``("transformer", "h.0", "attn")``."""
    parts: list[str] = []
    for part in module_path.split(".") if module_path else ():
        if part.isdigit() and parts and not parts[-1].rsplit(".", 1)[-1].isdigit():
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return tuple(parts)


def anchors(graph: Graph) -> dict[str, str]:
    """Per operator, the one whose box it joins: itself, or a constant's first consumer."""
    position = {op.name: i for i, op in enumerate(graph.operators)}
    found: dict[str, str] = {}
    for op in reversed(graph.operators):
        users = [u.name for v in op.results for u in graph.consumers[v.name]] if op.name in graph.unsourced else []
        found[op.name] = found[min(users, key=position.__getitem__)] if users else op.name
    return found


def gather(
    graph: Graph,
    anchor: Mapping[str, str],
    key: Mapping[str, tuple[ModulePath, tuple[int, ...]]],
) -> tuple[Group, ...]:
    """Groups of equal key, cut so that no two groups wait for each other.

    An operator joins the last group of its key unless it depends on another group that depends on that one:
    a residual addition after a sub-module thus starts a new group.

    Args:
        graph: the traced model.
        anchor: from :func:`anchors`.
        key: per operator, the module path and devices of its group.
    """
    last: dict[Hashable, int] = {}
    member_of: dict[str, int] = {}
    upstream: list[int] = []
    for op in graph.operators:
        if anchor[op.name] != op.name:
            continue
        makers = {anchor[graph.producer[n].name] for n in op.operands if n in graph.producer}
        before = {member_of[m] for m in makers if m in member_of}
        here = last.get(key[op.name])
        if here is None or any(g != here and upstream[g] >> here & 1 for g in before):
            here = len(upstream)
            last[key[op.name]] = here
            upstream.append(1 << here)
        member_of[op.name] = here
        new = 0
        for group in before:
            new |= upstream[group]
        everything = upstream[here] | new
        if here == len(upstream) - 1:
            upstream[here] = everything
        elif everything != upstream[here]:
            upstream = [u | everything if u >> here & 1 else u for u in upstream]
    return _groups(graph, anchor, key, member_of, len(upstream))


def _groups(
    graph: Graph,
    anchor: Mapping[str, str],
    key: Mapping[str, tuple[ModulePath, tuple[int, ...]]],
    member_of: Mapping[str, int],
    num_groups: int,
) -> tuple[Group, ...]:
    members: list[list[str]] = [[] for _ in range(num_groups)]
    heads: list[tuple[int, str]] = [(-1, "")] * num_groups
    for position, op in enumerate(graph.operators):
        group = member_of[anchor[op.name]]
        members[group].append(op.name)
        if anchor[op.name] == op.name and heads[group][0] < 0:
            heads[group] = (position, op.name)
    return tuple(
        Group(*key[name], tuple(names), position) for names, (position, name) in zip(members, heads, strict=True)
    )


class Quotient:
    """A graph of groups that can be contracted step by step, with cheap checks for cycles.

    Groups keep their number while they live; a merged pair lives on under the number of the first.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group]):
        self.groups: dict[int, Group] = dict(enumerate(groups))
        where = {name: i for i, group in self.groups.items() for name in group.members}
        self.after: dict[int, set[int]] = {i: set() for i in self.groups}
        self.before: dict[int, set[int]] = {i: set() for i in self.groups}
        for op in graph.operators:
            for name in op.operands:
                if name in graph.producer:
                    source, destination = where[graph.producer[name].name], where[op.name]
                    if source != destination:
                        self.after[source].add(destination)
                        self.before[destination].add(source)

    def __len__(self) -> int:
        return len(self.groups)

    def in_order(self) -> tuple[Group, ...]:
        """The groups, by the position of their first operator."""
        return tuple(sorted(self.groups.values(), key=lambda g: g.first))

    def makes_cycle(self, a: int, b: int) -> bool:
        """Whether merging ``a`` and ``b`` would make some group wait for itself."""
        return self._leads(a, b) or self._leads(b, a)

    def _leads(self, start: int, goal: int) -> bool:
        stack = [n for n in self.after[start] if n != goal]
        seen = set(stack)
        while stack:
            for node in self.after[stack.pop()]:
                if node == goal:
                    return True
                if node not in seen and node != start:
                    seen.add(node)
                    stack.append(node)
        return False

    def merge(self, a: int, b: int, merged: Group) -> None:
        """Let ``merged`` stand for ``a`` and ``b`` under the number ``a``."""
        for to, back in ((self.after, self.before), (self.before, self.after)):
            for node in to.pop(b):
                back[node].discard(b)
                if node != a:
                    back[node].add(a)
                    to[a].add(node)
        del self.groups[b]
        self.groups[a] = merged

    def depth(self) -> int:
        """Ranks of a picture: groups on the longest path, and one for each change of device.

        Edges that go backwards don't count.
        """
        longest: dict[int, int] = {}
        for i in sorted(self.groups, key=lambda i: self.groups[i].first):
            devices = self.groups[i].devices
            above = (longest.get(b, 0) + (self.groups[b].devices != devices) for b in self.before[i])
            longest[i] = 1 + max(above, default=0)
        return max(longest.values(), default=0)


def join(a: Group, b: Group, path: ModulePath, *, repeats: int = 1, span: tuple[str, str] | None = None) -> Group:
    """One group of both, on the devices of both."""
    a, b = (a, b) if a.first <= b.first else (b, a)
    devices = tuple(sorted({*a.devices, *b.devices}))
    return replace(a, path=path, devices=devices, members=a.members + b.members, repeats=repeats, span=span)


def common_path(paths: Iterable[ModulePath]) -> ModulePath:
    """The longest path that all of these begin with."""
    found: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return tuple(found)
