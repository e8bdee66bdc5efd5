"""Placements by hand: what the constraints say is fixed, and the rest is chosen around it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from graphpart.errors import PlacementError
from graphpart.ir.cluster import Cluster
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile
from graphpart.strategies.by_hand.constraints import Colocate, Constraint, KeepWhole, Pin, Split
from graphpart.strategies.by_hand.patterns import by_pattern, check_pattern, matches
from graphpart.strategies.by_hand.split_to_cut import cuts_for
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.choose_cuts import alone_on, choose_cuts, domains
from graphpart.strategies.cuts.inverse_rules import Cut
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.prices import Prices
from graphpart.strategies.cuts.seeds import weight_axes
from graphpart.strategies.memory.homes import homes_for


def by_hand(
    graph: Graph, cluster: Cluster, constraints: Sequence[Constraint], *, num_microbatches: int = 1
) -> Placement:
    """Place a model under constraints; of those that fit an operator the first counts, ``colocate`` beside it.

    What is kept whole may be pinned as well. A constraint that earlier ones leave no operator is refused, unless its
    pattern is ``*``: that stands for what is left, which may be nothing.

    Where nothing is split, what no pattern matches follows its neighbours (:func:`by_pattern`). Otherwise a product
    with a weight follows a split as far as it reaches, other operators as far as that saves traffic, and what no split
    reaches is whole on every device that the constraints name.

    Args:
        graph: the traced model.
        cluster: the devices.
        constraints: from :func:`graphpart.strategies.by_hand.constraints.constraints_of`.
        num_microbatches: parts of the batch.

    Raises:
        PlacementError: if a pattern matches nothing, or a wish cannot be met, or contradicts another; it names the
            operator, the axis or the device, and the nearest legal choice.
    """
    for constraint in constraints:
        for pattern in _patterns(constraint):
            check_pattern(graph, pattern)
    _check_effect(graph, constraints)
    together = _united(_matched(graph, c.patterns) for c in constraints if isinstance(c, Colocate))
    if not any(isinstance(c, Split) for c in constraints):
        return _without_splits(graph, cluster, constraints, together)
    devices = _group(constraints, len(cluster), bool(together))
    first = {op.name: c for op in graph.operators if (c := _first(op, constraints)) is not None}
    fixed: dict[str, Cut] = {}
    for constraint in constraints:
        if isinstance(constraint, Split):
            ours = [op for op in graph.operators if first.get(op.name) is constraint]
            if ours:
                fixed.update(cuts_for(constraint, ours, devices))
    geometry = Geometry(graph, (1.0,) * len(devices))
    found = propagate(geometry, fixed.items())
    weighted = {op.name for op, _ in weight_axes(graph)}
    allowed = domains(graph, found, len(devices), lambda op, _: op.name in weighted, prefer_cuts=True)
    pinned = sorted({int(c.device) for c in first.values() if isinstance(c, Pin)})
    anywhere = tuple(alone_on(i, len(devices)) for i in range(len(devices)))
    for name, cuts in allowed.items():
        wish = first.get(name)
        if name in fixed:
            allowed[name] = (fixed[name],)
        elif isinstance(wish, Pin):
            allowed[name] = (anywhere[devices.index(int(wish.device))],)
        elif isinstance(wish, KeepWhole):
            allowed[name] = anywhere
        else:
            allowed[name] = tuple(dict.fromkeys((*cuts, *(anywhere[devices.index(d)] for d in pinned))))
    bound = {name for name in first if name in fixed or isinstance(first[name], Pin)}
    groups = [_whole_together(graph, names, allowed, anywhere, bound) for names in together]
    prices = Prices(geometry, cluster, devices, num_microbatches, count_latency=False)
    choice = choose_cuts(prices, allowed, weigh_compute=False, together=groups)
    tiles = choice.tiles(graph)
    tiles.update((name, (Tile(int(c.device)),)) for name, c in first.items() if isinstance(c, Pin))
    return homes_for(graph, tiles)


def _patterns(constraint: Constraint) -> tuple[str, ...]:
    return constraint.patterns if isinstance(constraint, Colocate) else (constraint.pattern,)


def _matched(graph: Graph, patterns: Sequence[str]) -> list[str]:
    return [op.name for op in graph.operators if any(matches(op, pattern) for pattern in patterns)]


def _first(op: Operator, constraints: Sequence[Constraint]) -> Constraint | None:
    """The constraint that counts for an operator; of one that is kept whole, a pin says where."""
    found = [c for c in constraints if not isinstance(c, Colocate) and matches(op, c.pattern)]
    if found and isinstance(found[0], KeepWhole):
        return next((c for c in found if isinstance(c, Pin)), found[0])
    return found[0] if found else None


def _check_effect(graph: Graph, constraints: Sequence[Constraint]) -> None:
    """Refuse a constraint if others come first, and wish otherwise, for all operators that it matches."""
    for constraint in constraints:
        if isinstance(constraint, Colocate) or constraint.pattern == "*":
            continue
        ops = [op for op in graph.operators if matches(op, constraint.pattern)]
        firsts = [first for op in ops if (first := _first(op, constraints)) is not None]
        if not any(_is_met(constraint, first) for first in firsts):
            raise PlacementError(
                f"operator {ops[0]}: {firsts[0]} comes before {constraint}, which is left nothing to decide; of those "
                "that match an operator the first counts, so put the narrower pattern first, or leave out one"
            )


def _is_met(constraint: Pin | Split | KeepWhole, first: Constraint) -> bool:
    """Whether an operator that another constraint decides about is as this one wishes."""
    if isinstance(constraint, KeepWhole):
        return isinstance(first, (KeepWhole, Pin))
    return type(first) is type(constraint) and replace(first, pattern="") == replace(constraint, pattern="")


def _united(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups that share an operator as one."""
    found: list[list[str]] = []
    for group in groups:
        apart = [other for other in found if set(other).isdisjoint(group)]
        joined = [name for other in found if other not in apart for name in other]
        found = [*apart, list(dict.fromkeys([*joined, *group]))]
    return found


def _group(constraints: Sequence[Constraint], num_devices: int, all_of_them: bool) -> list[int]:
    """The devices that the constraints name; all where some operators may go anywhere."""
    if all_of_them or any(isinstance(c, KeepWhole) for c in constraints):
        return list(range(num_devices))
    named = {int(c.device) for c in constraints if isinstance(c, Pin)}
    named |= {int(device) for c in constraints if isinstance(c, Split) for device, _ in c.parts}
    return sorted(named)


def _without_splits(
    graph: Graph, cluster: Cluster, constraints: Sequence[Constraint], together: Sequence[Sequence[str]]
) -> Placement:
    """Nothing is cut: pins, and what has to go together where its first pinned operator is."""
    patterns: dict[str, int] = {}
    for constraint in constraints:
        if isinstance(constraint, Pin):
            patterns.setdefault(constraint.pattern, int(constraint.device))
    if not patterns:
        raise PlacementError(
            "the constraints say what stays together or whole, but not where anything goes; add gp.pin or gp.split, "
            "as in [gp.pin('encoder.*', 0), ...]"
        )
    placement = by_pattern(graph, patterns)
    device_of = {name: cut[0].device for name, cut in placement.tiles.items()}
    for names in together:
        pinned = {
            name: device
            for name in names
            for device in [next((d for p, d in patterns.items() if matches(graph.operator[name], p)), None)]
            if device is not None
        }
        _check_together(graph, pinned)
        device = next(iter(pinned.values()), device_of[names[0]])
        device_of.update(dict.fromkeys(names, device))
    return Placement.whole(graph, device_of)


def _check_together(graph: Graph, pinned: Mapping[str, int]) -> None:
    if len(set(pinned.values())) > 1:
        one = next(iter(pinned))
        other = next(name for name, device in pinned.items() if device != pinned[one])
        raise PlacementError(
            f"operators {graph.operator[one]} and {graph.operator[other]} are to go together, but are pinned to "
            f"devices {pinned[one]} and {pinned[other]}; pin them to one"
        )


def _whole_together(
    graph: Graph,
    names: Sequence[str],
    allowed: dict[str, tuple[Cut, ...]],
    anywhere: tuple[Cut, ...],
    bound: Collection[str],
) -> list[str]:
    """Let operators that go together run whole only; raise where a split or a pin forbids that."""
    chosen = [name for name in names if name in allowed]
    left = set(anywhere)
    for name in chosen:
        whole = tuple(cut for cut in anywhere if name not in bound or cut in allowed[name])
        left &= set(whole)
        if not left:
            raise PlacementError(
                f"operator {graph.operator[name]} is to go together with {graph.operator[chosen[0]]} on one device, "
                "but is split or pinned elsewhere; leave out one of these constraints"
            )
        allowed[name] = whole
    return chosen
