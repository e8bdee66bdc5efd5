"""The choice of one cut for every operator on a group of devices, so that work and traffic together take least time.

Every operator has a few candidate cuts; the time of a step is the sum of each operator's slowest tile and of what moves
along each edge. Which parameters live where follows from who reads them. The least sum is found exactly
(:mod:`graphpart.strategies.cuts.bucket_elimination`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphpart.ir.graph import Graph, Operator, refs
from graphpart.ir.placement import Tile
from graphpart.ir.region import Region
from graphpart.rules import may_repeat
from graphpart.strategies.cuts.bucket_elimination import Choice, Factor, choose
from graphpart.strategies.cuts.inverse_rules import Cut, tiles_on
from graphpart.strategies.cuts.layouts import Layout
from graphpart.strategies.cuts.prices import Prices

MAX_LAYOUTS = 16
"""Layouts in which a value with several readers may be brought to the group."""

Must = Callable[[Operator, Cut], bool]
"""Whether an operator that has this cut has to be cut (this way, or another of its candidates)."""


@dataclass(frozen=True)
class CutChoice:
    """A cut for every operator.

    Attributes:
        devices: the group, by index in the cluster.
        cuts: per operator name; operators that are made from no source are absent.
        cost_s: work and traffic of a step, in seconds.
        bound_s: no choice among the candidates costs less.
    """

    devices: tuple[int, ...]
    cuts: Mapping[str, Cut]
    cost_s: float
    bound_s: float

    def tiles(self, graph: Graph) -> dict[str, tuple[Tile, ...]]:
        """Tiles of every operator; what is made from no source is whole on the first device, and lowered where read."""
        found = {name: tiles_on(cut, self.devices) for name, cut in self.cuts.items()}
        return {op.name: found.get(op.name, (Tile(self.devices[0]),)) for op in graph.operators}


def alone_on(index: int, num_devices: int) -> Cut:
    """An operator whole on one device of a group."""
    return tuple(() if i == index else None for i in range(num_devices))


def domains(
    graph: Graph,
    found: Mapping[str, tuple[Cut, ...]],
    num_devices: int,
    must: Must | None = None,
    *,
    prefer_cuts: bool = False,
) -> dict[str, tuple[Cut, ...]]:
    """The cuts that every operator may choose from: its candidates, and whole on every device unless it must be cut.

    What has no axis rule may also run on the first device alone, and has to if it keeps a state.

    Args:
        graph: the traced model.
        found: candidate cuts.
        num_devices: devices of the group.
        must: which operators must be cut; none by default.
        prefer_cuts: whether, of choices that cost the same, a cut is taken before the whole.
    """
    replicated: Cut = ((),) * num_devices
    alone = (alone_on(0, num_devices),) if num_devices > 1 else ()
    result = {}
    for op in graph.operators:
        if op.name in graph.unsourced:
            continue
        cuts = found.get(op.name, ())
        if must is not None and any(must(op, cut) for cut in cuts):
            result[op.name] = cuts
        else:
            whole = (replicated, *(alone if op.rule is None else ()))
            if num_devices > 1 and not may_repeat(op.target, op.rule is not None):
                whole = alone
            result[op.name] = (*cuts, *whole) if prefer_cuts else (*whole[:1], *cuts, *whole[1:])
    return result


def choose_cuts(
    prices: Prices,
    allowed: Mapping[str, tuple[Cut, ...]],
    *,
    weigh_compute: bool = True,
    together: Sequence[Sequence[str]] = (),
) -> CutChoice:
    """The cuts with the least time, of those allowed.

    Args:
        prices: times on the group.
        allowed: per operator name, the cuts to choose from, as :func:`domains` gives them.
        weigh_compute: whether work counts; otherwise only traffic does.
        together: groups of operator names that are to be cut alike, from the same list of cuts.
    """
    problem = _CutProblem(prices, allowed, weigh_compute)
    for names in together:
        problem.tie(names)
    choice = problem.solve()
    cuts = {name: allowed[name][choice.values[i]] for i, name in enumerate(allowed)}
    return CutChoice(prices.devices, cuts, choice.cost, choice.bound)


class _CutProblem:
    """Variables and tables: one variable an operator, and one for the layout of each value with several readers."""

    def __init__(self, prices: Prices, allowed: Mapping[str, tuple[Cut, ...]], weigh_compute: bool) -> None:
        self.prices = prices
        self.geometry = prices.geometry
        self.graph = prices.graph
        self.allowed = allowed
        self.variable = {name: i for i, name in enumerate(allowed)}
        self.sizes = [len(cuts) for cuts in allowed.values()]
        self.factors: list[Factor] = []
        self._tables: dict[object, np.ndarray] = {}
        self._alive: list[object] = []
        if weigh_compute:
            for name, cuts in allowed.items():
                op = self.graph.operator[name]
                self._add([name], np.array([prices.compute_s(op, cut) for cut in cuts]))
        for op in self.graph.operators:
            if op.name in allowed:
                for k, value in enumerate(op.results):
                    self._price_value(value.name, op, k)
        for source in self.graph.sources:
            if source.kind != "input":
                self._price_source(source.value.name)

    def tie(self, names: Sequence[str]) -> None:
        """Choose the same cut for several operators."""
        cuts = tuple(dict.fromkeys(cut for name in names for cut in self.allowed[name]))
        common = self._new(len(cuts))
        for name in names:
            same = np.array([[0.0 if mine == cut else np.inf for cut in cuts] for mine in self.allowed[name]])
            self._add([name, common], same)

    def solve(self) -> Choice:
        return choose(self.sizes, self.factors)

    def _add(self, names: Sequence[str | int], table: np.ndarray) -> None:
        """Add a table over variables, given by operator name or number."""
        if not table.any():
            return
        scope = [self.variable[name] if isinstance(name, str) else name for name in names]
        if len(scope) == 2 and scope[0] > scope[1]:
            scope, table = scope[::-1], table.T
        self.factors.append(Factor(tuple(scope), table))

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _needs(self, name: str) -> list[tuple[str, tuple[Layout, ...]]]:
        """Per reader of a value, what each of its cuts needs of it."""
        found = []
        for reader in self.graph.consumers[name]:
            if reader.name in self.allowed:
                positions = [i for i, operand in enumerate(reader.operands) if operand == name]
                cuts = self.allowed[reader.name]
                found.append((reader.name, tuple(self._united(reader, positions, cut) for cut in cuts)))
        return found

    def _united(self, reader: Operator, positions: Sequence[int], cut: Cut) -> Layout:
        layouts = [self.geometry.needed(reader, i, cut) for i in positions]
        united = layouts[0]
        for layout in layouts[1:]:
            united = tuple(a | b if a and b else a or b for a, b in zip(united, layout, strict=True))
        return united

    def _price_value(self, name: str, op: Operator, result: int) -> None:
        cuts = self.allowed[op.name]
        held = tuple((self.geometry.made(op, result, cut), is_partial(op, cut)) for cut in cuts)
        needs = self._needs(name)
        if name in {ref.name for ref in refs(self.graph.outputs)}:
            self._price_output(name, op, held)
        if not needs:
            return
        if len(needs) == 1:
            reader, wanted = needs[0]
            self._add([op.name, reader], self._table(name, held, wanted))
            return
        layouts = dict.fromkeys(layout for layout, partial in held if not partial)
        layouts.update(dict.fromkeys(layout for _, wanted in needs for layout in wanted))
        kept = tuple(layouts)[:MAX_LAYOUTS]
        middle = self._new(len(kept))
        self._add([op.name, middle], self._table(name, held, kept))
        for reader, wanted in needs:
            self._add([reader, middle], self._table(name, tuple((layout, False) for layout in kept), wanted).T)

    def _price_output(self, name: str, op: Operator, held: Sequence[tuple[Layout, bool]]) -> None:
        """What the model returns is made whole on the last device."""
        whole = Region.full(self.graph.values[name].shape)
        need: Layout = (*[None] * (len(self.prices.devices) - 1), whole)
        self._add([op.name], self._table(name, tuple(held), (need,))[:, 0])

    def _table(self, name: str, held: tuple[tuple[Layout, bool], ...], needs: tuple[Layout, ...]) -> np.ndarray:
        """Times from each way to hold a value to each way to need it; repeated blocks have them in common."""
        value, source = self.graph.values[name], self.graph.source.get(name)
        kind = (value.dtype, value.requires_grad, source is not None and source.trainable, name in self.prices.samples)
        key = (kind, tuple((id(layout), partial) for layout, partial in held), tuple(map(id, needs)))
        if key not in self._tables:
            self._alive.append((held, needs))  # an id is only unique while its object lives
            move_s = self.prices.move_s
            table = [[move_s(name, layout, partial, need) for need in needs] for layout, partial in held]
            self._tables[key] = np.array(table)
        return self._tables[key]

    def _price_source(self, name: str) -> None:
        needs = self._needs(name)
        if len(needs) == 1:
            reader, wanted = needs[0]
            self._add([reader], np.array([self.prices.spread_s(name, need) for need in wanted]))
        elif needs:
            self._price_shared(name, needs)

    def _price_shared(self, name: str, needs: Sequence[tuple[str, tuple[Layout, ...]]]) -> None:
        """A parameter with several readers: at home in parts as some reader needs them, or spread as a whole."""
        layouts = tuple(dict.fromkeys(layout for _, wanted in needs for layout in wanted))[:MAX_LAYOUTS]
        middle = self._new(len(layouts))
        self._add([middle], np.array([self.prices.spread_s(name, layout) for layout in layouts]))
        for reader, wanted in needs:
            table = self._table(name, tuple((layout, False) for layout in layouts), wanted)
            self._add([reader, middle], table.T)


def operator_costs(prices: Prices, tiling: CutChoice) -> dict[str, float]:
    """What every operator costs under a tiling, in seconds: its work, and the traffic to bring what it reads.

    A value that several operators read counts for each of them.
    """
    graph, geometry = prices.graph, prices.geometry
    found = {}
    for name, cut in tiling.cuts.items():
        op = graph.operator[name]
        cost_s = prices.compute_s(op, cut)
        for i, operand in enumerate(op.operands):
            need = geometry.needed(op, i, cut)
            maker = graph.producer.get(operand)
            if maker is not None and maker.name in tiling.cuts:
                held = tiling.cuts[maker.name]
                result = next(k for k, value in enumerate(maker.results) if value.name == operand)
                layout = geometry.made(maker, result, held)
                cost_s += prices.move_s(operand, layout, is_partial(maker, held), need)
            elif maker is None and graph.source[operand].kind != "input":
                cost_s += prices.spread_s(operand, need)
        found[name] = cost_s
    return found


def is_partial(op: Operator, cut: Cut) -> bool:
    """Whether the tiles of a cut make partial results, to be summed over the devices."""
    if op.rule is None:
        return False
    made = {axis for dims in op.rule.results for dim in dims for axis in dim}
    return any(axis not in made for axes in cut if axes for axis, _ in axes)


def is_plain(op: Operator, cut: Cut) -> bool:
    """Whether a cut neither leaves sums to be made nor needs the operator rewritten."""
    rewritten = op.rule.rewritten if op.rule is not None else frozenset()
    return not is_partial(op, cut) and not any(axis in rewritten for axes in cut if axes for axis, _ in axes)
