"""Regions that cuts of a graph's operators make and need, each worked out once for all operators of equal structure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from graphpart.ir.axes import AxisRule, OperandDim
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.region import Region
from graphpart.strategies.cuts.inverse_rules import Cut, cut_axes, even_cut, is_legal, owned, solve

Layout = tuple[Region | None, ...]
"""The region of one value per device of a group; None where a device has, or needs, nothing of it."""


class Geometry:
    """The questions that candidates and their prices ask again and again.

    Attributes:
        graph: the traced model.
        weights: the share of each device of the group.
    """

    def __init__(self, graph: Graph, weights: Sequence[float]) -> None:
        self.graph = graph
        self.weights = tuple(weights)
        self._rules: list[AxisRule] = []
        self._rule_of: dict[str, int] = {}
        known: dict[object, int] = {}
        for op in graph.operators:
            if op.rule is not None:
                key = _structure(op.rule)
                if key not in known:
                    known[key] = len(self._rules)
                    self._rules.append(op.rule)
                self._rule_of[op.name] = known[key]
        self._legal = cache(lambda rule, cut: is_legal(self._rules[rule], cut))
        self._forward = cache(lambda rule, i, layout: self._follow(rule, self._rules[rule].operands[i], layout))
        self._backward = cache(lambda rule, k, layout: self._follow(rule, self._rules[rule].results[k], layout))
        self._owned = cache(self._owned_once)
        self._touched = cache(self._touched_once)

    def rule(self, op: Operator) -> int:
        """A number that operators with equal rules share; -1 where there is none."""
        return self._rule_of.get(op.name, -1)

    def is_legal(self, op: Operator, cut: Cut) -> bool:
        """Whether an operator can be cut so."""
        return op.name in self._rule_of and self._legal(self._rule_of[op.name], cut)

    def made(self, op: Operator, result: int, cut: Cut) -> Layout:
        """What each device makes of a result."""
        if op.rule is None:
            return _whole(op.results[result].shape, cut)
        return self._touched(self._rule_of[op.name], True, result, cut)

    def needed(self, op: Operator, operand: int, cut: Cut) -> Layout:
        """What each device needs of an operand."""
        if op.rule is None:
            return _whole(self.graph.values[op.operands[operand]].shape, cut)
        return self._touched(self._rule_of[op.name], False, operand, cut)

    def owned(self, op: Operator, operand: int, cut: Cut) -> Layout:
        """What each device should find at hand of an operand: what it needs, without the overlap of windows."""
        return self._owned(self._rule_of[op.name], operand, cut)

    def readers(self, op: Operator, operand: int, layout: Layout) -> tuple[Cut, ...]:
        """Cuts of an operator that need just these regions of an operand, or cut it along the same dimensions."""
        return self._forward(self._rule_of[op.name], operand, layout) if op.name in self._rule_of else ()

    def makers(self, op: Operator, result: int, layout: Layout) -> tuple[Cut, ...]:
        """Cuts of an operator that make just these regions of a result, or cut it along the same dimensions."""
        return self._backward(self._rule_of[op.name], result, layout) if op.name in self._rule_of else ()

    def _touched_once(self, rule: int, of_result: bool, index: int, cut: Cut) -> Layout:
        dims = (self._rules[rule].results if of_result else self._rules[rule].operands)[index]
        return tuple(None if axes is None else self._rules[rule].region(dims, dict(axes)) for axes in cut)

    def _owned_once(self, rule: int, operand: int, cut: Cut) -> Layout:
        found = self._rules[rule]
        return tuple(None if axes is None else owned(found, found.operands[operand], axes) for axes in cut)

    def _follow(self, number: int, dims: Sequence[OperandDim], layout: Layout) -> tuple[Cut, ...]:
        """The cut whose regions are these; failing that, the even cuts of the axes along which they differ."""
        rule = self._rules[number]
        solved = tuple(None if region is None else solve(rule, dims, region) for region in layout)
        unsolved = any(axes is None and region is not None for axes, region in zip(solved, layout, strict=True))
        if not unsolved and is_legal(rule, solved):
            return (solved,)
        held = [region for region in layout if region is not None]
        cuts = [even_cut(rule, axis, self.weights) for axis in cut_axes(rule, dims, held)]
        return tuple(cut for cut in cuts if cut is not None)


def _whole(shape: Sequence[int], cut: Cut) -> Layout:
    return tuple(None if axes is None else Region.full(shape) for axes in cut)


def _structure(rule: AxisRule) -> object:
    """What two rules have to share to answer every question alike."""
    return (tuple(rule.extents.items()), rule.operands, rule.results, rule.sums, rule.whole, rule.rewritten)
