"""Axis rules, checked by execution: tile each axis, run the local operators, assemble, compare with the whole."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import test_rules_cases  # noqa: F401 -- adds its cases
import test_rules_cases_moves  # noqa: F401 -- adds its cases
import torch
from test_rules_case import CASES, Case

from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Ref, map_refs, refs
from graphpart.ir.region import Intervals, Region
from graphpart.rules import rule_for


def operator(target: str) -> Any:
    namespace, packet, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


class Prepared:
    """A case with its tensors named, its whole results, and its rule."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(zlib.crc32(str(case).encode()))
        self.run = operator(case.target)
        args, kwargs = case.build()
        self.tensors: dict[str, torch.Tensor] = {}
        self.args = tuple(self._name(a) for a in args)
        self.kwargs = {k: self._name(v) for k, v in kwargs.items()}
        self.whole = self.results(self.args, self.tensors)
        self.rule = rule_for(
            case.target,
            self.args,
            self.kwargs,
            lambda name: tuple(self.tensors[name].shape),
            [tuple(r.shape) for r in self.whole],
            torch.Tag.pointwise in self.run.tags,
        )
        self.order = [ref.name for ref in refs((self.args, self.kwargs))]

    def _name(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = f"t{len(self.tensors)}"
            self.tensors[name] = value
            return Ref(name)
        return [self._name(v) for v in value] if isinstance(value, list) else value

    def results(self, args: tuple[Any, ...], operands: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        def whole(ref: Ref) -> torch.Tensor:
            return operands[ref.name]

        found = self.run(*map_refs(args, whole), **map_refs(self.kwargs, whole))
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def tile(self, rule: AxisRule, tile: dict[str, Intervals]) -> list[torch.Tensor]:
        """The operator on the part of its operands that a tile needs."""
        local = {
            name: part(self.tensors[name], rule.region(dims, tile))
            for name, dims in zip(self.order, rule.operands, strict=True)
        }
        args = list(self.args)
        if rule.shape_argument is not None:
            args[rule.shape_argument] = list(rule.region(rule.results[0], tile).shape)
        return self.results(tuple(args), local)


def part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, indices in enumerate(region.dims):
        tensor = tensor.index_select(dim, torch.tensor(list(indices), dtype=torch.long))
    return tensor.contiguous()


def place(into: torch.Tensor, region: Region, value: torch.Tensor) -> None:
    if not region.dims:
        into.copy_(value)
        return
    grid = torch.meshgrid(*[torch.tensor(list(d), dtype=torch.long) for d in region.dims], indexing="ij")
    into[grid] = value


def prefixed(text: str) -> Callable[[str], str]:
    return lambda message: f"{text}: {message}"


def tilings(extent: int) -> Iterator[list[Intervals]]:
    """Uneven spans, one of them a single index, and sets that are not contiguous."""
    cuts = sorted({0, 1, max(1, extent // 2), extent})
    yield [Intervals.span(a, b) for a, b in pairwise(cuts)]
    yield [Intervals.indices(range(0, extent, 2)), Intervals.indices(range(1, extent, 2))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_make_the_whole(case: Case) -> None:
    ready = Prepared(case)
    if case.cuts is None:
        assert ready.rule is None
        return
    rule = ready.rule
    assert rule is not None
    assert len(rule.operands) == len(ready.order) and len(rule.results) == len(ready.whole)
    for name, dims in zip(ready.order, rule.operands, strict=True):
        assert rule.shape(dims) == tuple(ready.tensors[name].shape)
    for result, dims in zip(ready.whole, rule.results, strict=True):
        assert rule.shape(dims) == tuple(result.shape)
    legal = [a for a, extent in rule.extents.items() if rule.can_cut(a) and extent > 1]
    for axis in legal:
        for pieces in tilings(rule.extents[axis]):
            check(ready, rule, axis, pieces, case)
    found = sorted(("+" if a in rule.sums else "") + str(rule.extents[a]) for a in legal)
    assert found == sorted(case.cuts.split()), f"{rule}: can cut {legal} of {dict(rule.extents)}"


def check(ready: Prepared, rule: AxisRule, axis: str, pieces: list[Intervals], case: Case) -> None:
    made = [torch.zeros_like(r) for r in ready.whole]
    seen = [torch.zeros(r.shape, dtype=torch.long) for r in ready.whole]
    for piece in pieces:
        for i, value in enumerate(ready.tile(rule, {axis: piece})):
            if axis in rule.sums:
                made[i] = made[i] + value
                continue
            region = rule.region(rule.results[i], {axis: piece})
            assert tuple(value.shape) == region.shape, f"{rule}, axis {axis}"
            place(made[i], region, value)
            place(seen[i], region, torch.ones(region.shape, dtype=torch.long))
    for i, (got, want) in enumerate(zip(made, ready.whole, strict=True)):
        if case.shape_only:
            continue
        torch.testing.assert_close(
            got, want, msg=prefixed(f"{rule}: axis {axis} in {pieces}, result {i}"), equal_nan=True
        )
        assert axis in rule.sums or bool((seen[i] == 1).all()), f"{rule}: axis {axis} leaves holes in result {i}"


@pytest.mark.parametrize("case", [c for c in CASES if c.cuts is not None], ids=str)
def test_linearity_holds(case: Case) -> None:
    ready = Prepared(case)
    assert ready.rule is not None
    for group in ready.rule.linear:
        a, b, both, zero = (dict(ready.tensors) for _ in range(4))
        for position in group:
            name = ready.order[position]
            other = torch.rand_like(a[name]) if a[name].is_floating_point() else a[name]
            b[name] = other
            both[name] = a[name] + other
            zero[name] = torch.zeros_like(other)
        at = [ready.results(ready.args, tensors) for tensors in (a, b, both, zero)]
        for one, two, sum_, nothing in zip(*at, strict=True):
            torch.testing.assert_close(one + two, sum_, msg=prefixed(f"{ready.rule} in {group}"))
            assert not nothing.any(), f"{ready.rule} in {group} does not map zero to zero"


WITHOUT_GRADIENT = {
    "batch_norm": "running_mean running_var",
    "_loss": "weight",
    "binary_cross_entropy": "weight pos_weight",
    "soft_margin_loss": "target",
    "aten.copy.": "self src",
}
"""Arguments in which torch does not differentiate, by part of the operator's name."""


def leaves_of(ready: Prepared, target: str) -> list[torch.Tensor]:
    """Its operands that get a gradient, made to require one."""
    frozen = {name for part, names in WITHOUT_GRADIENT.items() if part in target for name in names.split()}
    named = zip((a.name for a in ready.run._schema.arguments), ready.args, strict=False)
    fixed = {value.name for name, value in named if name in frozen and isinstance(value, Ref)}
    return [t.requires_grad_() for n, t in ready.tensors.items() if n not in fixed and t.is_floating_point()]


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("case", [c for c in CASES if c.cuts and not c.shape_only], ids=str)
def test_gradients_of_tiles_add_up(case: Case) -> None:
    ready = Prepared(case)
    rule = ready.rule
    assert rule is not None
    leaves = leaves_of(ready, case.target)
    whole = ready.results(ready.args, ready.tensors)
    upstream = [torch.randn_like(r) if r.requires_grad else None for r in whole]
    pulled = [(r * u).sum() for r, u in zip(whole, upstream, strict=True) if u is not None]
    want = gradients(sum(pulled, torch.zeros(())), leaves)
    for axis in (a for a, extent in rule.extents.items() if rule.can_cut(a) and extent > 1):
        got = [torch.zeros_like(leaf) for leaf in leaves]
        for piece in next(tilings(rule.extents[axis])):
            local = ready.tile(rule, {axis: piece})
            loss = torch.zeros(())
            for value, u, dims in zip(local, upstream, rule.results, strict=True):
                if u is not None:
                    loss = loss + (value * part(u, rule.region(dims, {axis: piece}))).sum()
            got = [a + b for a, b in zip(got, gradients(loss, leaves), strict=True)]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, msg=prefixed(f"{rule}: gradient, axis {axis}"), equal_nan=True)
