"""Cuts of operators: axis rules read backwards, candidates that follow along edges, and the exact choice among them."""

from __future__ import annotations

import random
from itertools import pairwise, product
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

from graphpart.cost import make_cluster
from graphpart.errors import PlacementError
from graphpart.ir.axes import AxisRule, Window
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Shard, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.strategies.batch import batch
from graphpart.strategies.cuts.bucket_elimination import Factor, choose
from graphpart.strategies.cuts.candidates import propagate
from graphpart.strategies.cuts.inverse_rules import axes_of, even_cut, is_legal, owned, shares_of, solve
from graphpart.strategies.cuts.layouts import Geometry
from graphpart.strategies.cuts.seeds import feature_seeds
from graphpart.strategies.feature import feature
from graphpart.strategies.free import free
from graphpart.strategies.hybrid import hybrid
from graphpart.strategies.memory.homes import homes_for
from graphpart.strategies.spatial import spatial
from graphpart.trace import trace

SEEDS = range(20)


def graph_of(model: nn.Module, *args: torch.Tensor) -> Graph:
    return trace(model, args, {}).graph


def operators(graph: Graph, part: str) -> list[str]:
    return [op.name for op in graph.operators if part in op.target]


def cut_of(placement: Placement, name: str) -> list[dict[str, str]]:
    return [{axis: str(part) for axis, part in tile.axes.items()} for tile in placement.tiles[name]]


def unlike(*speeds: float) -> Cluster:
    devices = tuple(Device(f"cpu:{i}", f"s{s}", {"float32": 1e9 * s}, 10**12, 1e9 * s) for i, s in enumerate(speeds))
    return Cluster(devices, Link(1e-6, 1e9))


class Mlp(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


# --- regions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_cover_without_gaps_and_are_nearest_to_the_weights(seed: int) -> None:
    draw = random.Random(seed)
    weights = [draw.choice([1.0, 1.0, 2.0, 3.5, 0.1]) for _ in range(draw.randint(1, 6))]
    extent = draw.randint(len(weights), 40)
    parts = shares_of(extent, weights)
    assert parts is not None
    assert [i for part in parts for i in part] == list(range(extent))
    quotas = [extent * w / sum(weights) for w in weights]
    if min(quotas) >= 1:
        assert all(abs(len(part) - quota) < 1 for part, quota in zip(parts, quotas, strict=True))
    assert shares_of(len(weights) - 1, weights) is None


def test_S7_shares_that_do_not_divide() -> None:
    assert [len(p) for p in shares_of(12, [1] * 5) or ()] == [3, 3, 2, 2, 2]
    assert [len(p) for p in shares_of(50257, [1] * 4) or ()] == [12565, 12564, 12564, 12564]
    assert [len(p) for p in shares_of(7, [3, 1]) or ()] == [5, 2]


def random_rule(draw: random.Random) -> AxisRule:
    axes = [f"a{i}" for i in range(draw.randint(1, 5))]
    extents = {axis: draw.randint(1, 5) for axis in axes}
    dims: list[tuple[str, ...]] = []
    left = list(axes)
    while left:
        size = draw.randint(1, min(3, len(left)))
        dims.append(tuple(left[:size]))
        left = left[size:]
    return AxisRule(extents, (tuple(dims),), (tuple(dims),))


@pytest.mark.parametrize("seed", range(60))
def test_solve_is_the_inverse_of_region(seed: int) -> None:
    draw = random.Random(seed)
    rule = random_rule(draw)
    tile = {
        axis: part
        for axis in rule.cuttable
        if draw.random() < 0.6
        and (part := Intervals.indices(i for i in range(rule.extents[axis]) if draw.random() < 0.5))
        and len(part) < rule.extents[axis]
    }
    dims = rule.results[0]
    assert solve(rule, dims, rule.region(dims, tile)) == axes_of(tile)


def test_solve_refuses_a_region_that_no_tile_has() -> None:
    rule = AxisRule({"h": 3, "d": 4}, ((("h", "d"),),), ((("h",), ("d",)),))
    assert solve(rule, rule.operands[0], Region((Intervals.span(0, 6),))) is None  # one head and a half
    whole = AxisRule({"s": 6}, ((("s",),),), ((("s",),),), whole=frozenset("s"))
    assert solve(whole, whole.results[0], Region((Intervals.span(0, 3),))) is None


@pytest.mark.parametrize(
    ("stride", "start", "size"), [(1, -1, 3), (2, -1, 3), (2, -3, 7), (4, -2, 11), (2, 0, 2), (1, 0, 5)]
)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_windows_own_disjoint_parts_and_find_back_to_their_tile(stride: int, start: int, size: int, count: int) -> None:
    extent = 24
    window = Window("o", (extent - 1) * stride + size + 2 * start, stride, start, size)
    rule = AxisRule({"o": extent}, ((window,),), ((("o",),),))
    cut = even_cut(rule, "o", [1.0] * count)
    assert cut is not None and is_legal(rule, cut)
    parts = [owned(rule, rule.operands[0], axes or ()) for axes in cut]
    assert [i for part in parts for i in part.dims[0]] == list(range(window.extent))
    for part, axes in zip(parts, cut, strict=True):
        assert solve(rule, rule.operands[0], part) == axes
        assert part <= rule.region(rule.operands[0], dict(axes or ())) or size < stride


def test_a_concatenation_is_cut_operand_by_operand() -> None:
    dims = ((Window("c", 4),), (Window("c", 6, 1, -4),))
    rule = AxisRule({"c": 10}, dims, ((("c",),),))
    cut = even_cut(rule, "c", [1, 1])
    assert cut == ((("c", Intervals.of([(0, 2), (4, 7)])),), (("c", Intervals.of([(2, 4), (7, 10)])),))
    for i, operand in enumerate(dims):
        regions = [rule.region(operand, dict(axes or ())) for axes in cut]
        assert not regions[0] & regions[1] and sum(r.num_elements for r in regions) == (4, 6)[i]


# --- the exact choice --------------------------------------------------------------------------------------------


def random_factors(draw: random.Random, sizes: list[int]) -> list[Factor]:
    table = np.random.default_rng(draw.randrange(10**6))
    factors = [Factor((v,), table.random(size)) for v, size in enumerate(sizes)]
    for _ in range(2 * len(sizes)):
        a, b = sorted(draw.sample(range(len(sizes)), 2))
        values = table.random((sizes[a], sizes[b]))
        values[table.random(values.shape) < 0.1] = inf
        factors.append(Factor((a, b), values))
    return factors


def cost_of(factors: list[Factor], values: tuple[int, ...]) -> float:
    return sum(float(f.table[tuple(values[v] for v in f.scope)]) for f in factors)


@pytest.mark.parametrize("seed", SEEDS)
def test_elimination_finds_the_least_sum(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(6)]
    factors = random_factors(draw, sizes)
    best = min(cost_of(factors, values) for values in product(*map(range, sizes)))
    found = choose(sizes, factors)
    assert found.cost == pytest.approx(best) and cost_of(factors, found.values) == pytest.approx(best)
    assert found.bound == pytest.approx(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_elimination_with_small_tables_keeps_a_bound(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [3] * 8
    factors = [f for f in random_factors(draw, sizes) if np.isfinite(f.table).all()]
    best = min(cost_of(factors, values) for values in product(*map(range, sizes)))
    found = choose(sizes, factors, max_cells=9)
    assert found.bound <= best + 1e-9 and found.cost >= best - 1e-9
    assert found.cost == pytest.approx(cost_of(factors, found.values))


# --- candidates --------------------------------------------------------------------------------------------------


def test_heads_cut_a_fused_projection_into_three_runs() -> None:
    graph = graph_of(FusedAttention(24, 6), torch.zeros(2, 5, 24))
    geometry = Geometry(graph, (1.0, 1.0))
    found = propagate(geometry, feature_seeds(geometry))
    first, second = operators(graph, "linear")
    runs = Intervals.of([(0, 12), (24, 36), (48, 60)])
    other = Intervals.of([(12, 24), (36, 48), (60, 72)])
    assert ((("n", runs),), (("n", other),)) in found[first]
    assert ((("k", Intervals.span(0, 12)),), (("k", Intervals.span(12, 24)),)) in found[second]
    (attention,) = operators(graph, "scaled_dot_product")
    assert ((("b1", Intervals.span(0, 3)),), (("b1", Intervals.span(3, 6)),)) in found[attention]


def test_candidates_are_legal_and_found_in_the_same_order_every_time() -> None:
    graph = graph_of(FusedAttention(24, 6), torch.zeros(2, 5, 24))
    every = []
    for _ in range(2):
        geometry = Geometry(graph, (2.0, 1.0, 1.0))
        found = propagate(geometry, feature_seeds(geometry))
        every.append(found)
        for name, cuts in found.items():
            rule = graph.operator[name].rule
            assert rule is not None and all(is_legal(rule, cut) for cut in cuts)
    assert list(every[0].items()) == list(every[1].items())


# --- strategies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_M1_linear_pairs_are_cut_by_columns_then_rows(num_devices: int) -> None:
    graph = graph_of(Mlp(16, 64, 16, 64, 16), torch.zeros(8, 16))
    placement = feature(graph, make_cluster(num_devices))
    cut = [[list(tile.axes) for tile in placement.tiles[name]] for name in operators(graph, "linear")]
    assert cut == [[["n"]] * num_devices, [["k"]] * num_devices] * 2
    for first, second in zip(operators(graph, "linear")[::2], operators(graph, "linear")[1::2], strict=True):
        columns = [tile.axes["n"] for tile in placement.tiles[first]]
        assert columns == [tile.axes["k"] for tile in placement.tiles[second]]
    assert not placement.homes and len(placement.shards) == 4


@pytest.mark.parametrize(("heads", "num_devices"), [(6, 2), (6, 4), (12, 5)])
def test_M1_attention_is_cut_by_heads(heads: int, num_devices: int) -> None:
    graph = graph_of(FusedAttention(4 * heads, heads), torch.zeros(2, 5, 4 * heads))
    placement = feature(graph, make_cluster(num_devices))
    (attention,) = operators(graph, "scaled_dot_product")
    sizes = [len(tile.axes["b1"]) for tile in placement.tiles[attention]]
    assert sizes == [len(part) for part in shares_of(heads, [1] * num_devices) or ()]
    qkv, out = operators(graph, "linear")
    assert [len(tile.axes["n"].runs) for tile in placement.tiles[qkv]] == [3] * num_devices
    assert [len(tile.axes["k"]) for tile in placement.tiles[out]] == [4 * n for n in sizes]


def test_S6_batch_cuts_samples_and_spreads_the_homes() -> None:
    graph = graph_of(Mlp(16, 64, 16), torch.zeros(7, 16))
    placement = batch(graph, make_cluster(3))
    for op in graph.operators:
        assert [len(tile.axes[op.rule.cuttable[0]]) for tile in placement.tiles[op.name]] == [3, 2, 2]
    assert not placement.shards and len(set(placement.homes.values())) == 2


def test_batch_gives_faster_devices_more_samples() -> None:
    graph = graph_of(Mlp(16, 64, 16), torch.zeros(8, 16))
    placement = batch(graph, unlike(3.0, 1.0))
    assert {tuple(len(t.axes["b0"]) for t in placement.tiles[n]) for n in operators(graph, "linear")} == {(6, 2)}


def test_batch_can_keep_parts_of_parameters() -> None:
    graph = graph_of(Mlp(16, 64, 3), torch.zeros(8, 16))
    placement = batch(graph, make_cluster(4), shard_parameters=True)
    (first, second) = (source.value for source in graph.parameters)
    assert [str(shard.region) for shard in placement.shards[first.name]] == [
        "[0:16, 0:16]", "[16:32, 0:16]", "[32:48, 0:16]", "[48:64, 0:16]"
    ]  # fmt: skip
    assert [str(shard.region) for shard in placement.shards[second.name]] == [  # three rows are too few for four
        "[0:3, 0:16]", "[0:3, 16:32]", "[0:3, 32:48]", "[0:3, 48:64]"
    ]  # fmt: skip


def test_batch_refuses_fewer_samples_than_devices() -> None:
    graph = graph_of(Mlp(16, 64, 16), torch.zeros(3, 16))
    with pytest.raises(PlacementError, match=r"has 3 samples, fewer than the 4 devices.*use 4 samples or more"):
        batch(graph, make_cluster(4))


def test_feature_and_spatial_refuse_what_they_cannot_cut() -> None:
    graph = graph_of(Mlp(2, 3, 2), torch.zeros(8, 2))
    with pytest.raises(PlacementError, match="no weight with an axis of at least 4"):
        feature(graph, make_cluster(4))
    with pytest.raises(PlacementError, match="no image among its inputs"):
        spatial(graph, make_cluster(2))


def test_hybrid_on_one_device_is_whole() -> None:
    graph = graph_of(Mlp(16, 64, 16), torch.zeros(8, 16))
    placement = hybrid(graph, make_cluster(1))
    assert all(tiles == (Tile(0),) for tiles in placement.tiles.values())


# --- homes -------------------------------------------------------------------------------------------------------


def test_homes_follow_the_readers() -> None:
    graph = graph_of(Mlp(8, 8, 8, 8), torch.zeros(4, 8))
    first, second, third = operators(graph, "linear")
    relu, other = operators(graph, "relu")
    half = (Intervals.span(0, 4), Intervals.span(4, 8))
    tiles = {
        first: tuple(Tile(d, {"n": part}) for d, part in enumerate(half)),
        second: (Tile(0), Tile(1)),
        third: (Tile(1),),
        relu: (Tile(0), Tile(1)),
        other: (Tile(1),),
    }
    placement = homes_for(graph, tiles)
    names = [source.value.name for source in graph.parameters]
    whole = Intervals.full(8)
    assert placement.shards == {names[0]: tuple(Shard(d, Region((part, whole))) for d, part in enumerate(half))}
    assert placement.homes == {names[1]: 0, names[2]: 1}
    placement.check(graph, 2)


# --- free --------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two towers that meet at the end."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(Mlp(*[width] * (depth + 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.towers[0](x) + self.towers[1](x)


def test_T8_free_runs_branches_on_different_devices() -> None:
    graph = graph_of(Branches(64, 4), torch.zeros(1, 64))  # one sample: only branches and features can be shared out
    slow = Cluster(unlike(1.0, 1.0).devices, Link(1e-4, 1e8))
    placement = free(graph, slow)
    placement.check(graph, 2)
    of = {
        tower: {
            tile.device
            for op in graph.operators
            if f"towers.{tower}" in op.module_path
            for tile in placement.tiles[op.name]
        }
        for tower in (0, 1)
    }
    assert sorted(map(len, of.values())) == [1, 1] and of[0] != of[1]


def test_free_cuts_where_links_are_fast() -> None:
    graph = graph_of(Mlp(512, 512, 512), torch.zeros(4096, 512))
    placement = free(graph, Cluster(unlike(1.0, 1.0).devices, Link(1e-9, 1e13)))
    assert all(len(placement.tiles[name]) == 2 for name in operators(graph, "linear"))
