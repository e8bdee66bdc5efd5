"""Axis rules, checked by execution: tile each axis, run the local operators, assemble, compare with the whole."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from random import Random
from typing import Any

import pytest
import torch

import tests.helpers.rules_cases
import tests.helpers.rules_cases_moves  # noqa: F401 -- adds its cases
from graphpart.ir.axes import AxisRule
from graphpart.ir.graph import Operator, Ref, Symbol, Value, map_refs, refs
from graphpart.ir.region import Intervals, Region
from graphpart.rules import rule_for
from graphpart.rules.local.calls import local_call
from graphpart.runtime.kernels.table import kernel_of
from graphpart.runtime.kernels.tile_kernels import embedding_part
from tests.helpers.rules_case import CASES, Case

pytestmark = pytest.mark.sampled(8)


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
        values = tuple(Value(f"r{i}", tuple(r.shape), named(r.dtype)) for i, r in enumerate(self.whole))
        self.op = Operator("op", case.target, self.args, self.kwargs, values, self.rule)

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
        """The local call of a tile on the regions that it reads."""
        regions = tuple(rule.region(dims, tile) for dims in rule.operands)
        call = local_call(self.op, tile, regions)
        names = [ref.name for ref in refs((call.args, call.kwargs))]
        assert names == [self.order[i] for i in call.operands], "the references stand for the operands that it says"
        assert all(regions[i] for i in call.operands if self.tensors[self.order[i]].numel())
        local = {self.order[i]: part(self.tensors[self.order[i]], regions[i]) for i in call.operands}
        args, kwargs = map_refs((call.args, call.kwargs), lambda ref: local[ref.name])
        args, kwargs = (map_symbols(each) for each in (args, kwargs))
        found = (kernel_of if call.target.startswith("graphpart.") else operator)(call.target)(*args, **kwargs)
        return list(found) if isinstance(found, (tuple, list)) else [found]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def map_symbols(arguments: Any) -> Any:
    """Arguments with every symbol made torch's."""
    if isinstance(arguments, Symbol):
        return torch.device("cpu") if arguments.kind == "device" else getattr(torch, arguments.name)
    if isinstance(arguments, dict):
        return {key: map_symbols(item) for key, item in arguments.items()}
    return tuple(map_symbols(item) for item in arguments) if isinstance(arguments, tuple) else arguments


def part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, indices in enumerate(region.dims):
        tensor = tensor.index_select(dim, torch.tensor(list(indices), dtype=torch.long))
    return tensor.contiguous()


def add(into: torch.Tensor, region: Region, value: torch.Tensor) -> None:
    if not region.dims:
        into.add_(value)
        return
    grid = torch.meshgrid(*[torch.tensor(list(d), dtype=torch.long) for d in region.dims], indexing="ij")
    into[grid] = into[grid] + value


def prefixed(text: str) -> Callable[[str], str]:
    return lambda message: f"{text}: {message}"


def tilings(rule: AxisRule, axis: str) -> Iterator[list[Intervals]]:
    """Uneven spans, single indices, and, where tiles need not be runs, sets that are not contiguous."""
    extent = rule.extents[axis]
    cuts = sorted({0, 1, max(1, extent // 2), extent})
    yield [Intervals.span(a, b) for a, b in pairwise(cuts)]
    yield [Intervals.span(i, i + 1) for i in range(extent)]
    if not rule.needs_runs(axis):
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
    legal = [axis for axis in rule.cuttable if axis not in rule.rewritten]
    check_tilings(ready, case)
    found = sorted(("+" if a in rule.sums else "") + str(rule.extents[a]) for a in legal)
    found += sorted(f"*{rule.extents[a]}" for a in rule.cuttable if a not in legal)
    assert sorted(found) == sorted(case.cuts.split()), f"{rule}: can cut {legal} of {dict(rule.extents)}"


def tile_sets(rule: AxisRule) -> Iterator[list[dict[str, Intervals]]]:
    """Every axis cut alone, in several ways, and every two axes cut at once."""
    legal = [axis for axis in rule.cuttable if axis not in rule.rewritten]
    for axis in legal:
        for pieces in tilings(rule, axis):
            yield [{axis: piece} for piece in pieces]
    for one, other in combinations(legal, 2):
        ways = zip(tilings(rule, one), [*tilings(rule, other)][::-1], strict=False)
        first, second = next(ways)
        yield [{one: a, other: b} for a in first for b in second]


def check_tilings(ready: Prepared, case: Case) -> None:
    assert ready.rule is not None
    for tiles in tile_sets(ready.rule):
        check(ready, ready.rule, tiles, case)


def check(ready: Prepared, rule: AxisRule, tiles: list[dict[str, Intervals]], case: Case) -> None:
    made = [torch.zeros_like(r) for r in ready.whole]
    seen = [torch.zeros(r.shape, dtype=torch.long) for r in ready.whole]
    terms = len({tuple((a, p) for a, p in tile.items() if a in rule.sums) for tile in tiles})
    text = f"{rule} in {', '.join(str({a: str(p) for a, p in tile.items()}) for tile in tiles)}"
    for tile in tiles:
        for i, value in enumerate(ready.tile(rule, tile)):
            region = rule.region(rule.results[i], tile)
            assert tuple(value.shape) == region.shape, text
            assert value.dtype == ready.whole[i].dtype, text
            add(made[i], region, value)
            add(seen[i], region, torch.ones(region.shape, dtype=torch.long))
    for i, (got, want) in enumerate(zip(made, ready.whole, strict=True)):
        if case.shape_only:
            continue
        torch.testing.assert_close(got, want, msg=prefixed(f"{text}, result {i}"), equal_nan=True)
        assert bool((seen[i] == terms).all()), f"{text}: result {i} has holes"


def test_words_outside_the_vocabulary_are_refused_by_every_part_of_it() -> None:
    for words in (torch.tensor([3, 11]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            embedding_part(torch.randn(4, 5), words, [(2, 6)], 11, -1)


def random_windows(seed: int) -> Case:
    """A convolution or a pooling of random size, stride, padding, dilation and groups, and an input that fits."""
    random = Random(seed)
    spatial = random.choice([1, 1, 2])
    kind = random.choice(["conv", "conv", "conv", "max_pool", "avg_pool"])
    size, stride, dilation = ([random.randint(1, most) for _ in range(spatial)] for most in (3, 3, 2))
    if kind == "avg_pool":
        dilation = [1] * spatial
    most = [d * (k - 1) if kind == "conv" else k // 2 for k, d in zip(size, dilation, strict=True)]
    padding = [random.randint(0, m) for m in most]
    extents = [d * (k - 1) + random.randint(1, 9) for k, d in zip(size, dilation, strict=True)]
    groups = random.choice([1, 1, 2, 4])
    image = torch.randn(2, 4, *extents, dtype=torch.float64)
    rounds = random.random() < 0.5
    if kind == "conv":
        weight = torch.randn(2 * groups, 4 // groups, *size, dtype=torch.float64)
        bias = torch.randn(2 * groups, dtype=torch.float64) if rounds else None
        arguments: Any = (image, weight, bias, stride, padding, dilation, groups)
    elif kind == "max_pool":
        arguments = (image, size, stride, padding, dilation, rounds)
    else:
        arguments = (image, size, stride, padding, rounds, random.random() < 0.5)
    return Case(f"aten.{kind}{spatial}d.default", "", lambda: (arguments, {}), seed)


@pytest.mark.parametrize("seed", range(60))
def test_windows_of_any_geometry(seed: int) -> None:
    case = random_windows(seed)
    ready = Prepared(case)
    assert ready.rule is not None and len(ready.rule.cuttable) >= 2
    check_tilings(ready, case)
    check_gradients(ready, case)


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
    free = [t for name, t in ready.tensors.items() if name not in fixed]
    return [t.requires_grad_() for t in free if t.is_floating_point() or t.is_complex()]


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    loss = torch.view_as_real(loss).sum() if loss.is_complex() else loss
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("case", [c for c in CASES if c.cuts and not c.shape_only], ids=str)
def test_gradients_of_tiles_add_up(case: Case) -> None:
    check_gradients(Prepared(case), case)


def check_gradients(ready: Prepared, case: Case) -> None:
    if case.target == "aten.aminmax.default" and torch.__version__ < "2.12":
        pytest.skip("torch has no derivative of aminmax before 2.12")
    rule = ready.rule
    assert rule is not None
    leaves = leaves_of(ready, case.target)
    whole = ready.results(ready.args, ready.tensors)
    upstream = [torch.randn_like(r) if r.requires_grad else None for r in whole]
    pulled = [(r * u).sum() for r, u in zip(whole, upstream, strict=True) if u is not None]
    want = gradients(sum(pulled, torch.zeros(())), leaves)
    for tiles in tile_sets(rule):
        got = [torch.zeros_like(leaf) for leaf in leaves]
        for tile in tiles:
            loss = torch.zeros(())
            for value, u, dims in zip(ready.tile(rule, tile), upstream, rule.results, strict=True):
                if u is not None:
                    loss = loss + (value * part(u, rule.region(dims, tile))).sum()
            got = [a + b for a, b in zip(got, gradients(loss, leaves), strict=True)]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, msg=prefixed(f"{rule}: gradient in {tiles}"), equal_nan=True)
