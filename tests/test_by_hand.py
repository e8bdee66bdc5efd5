"""Placements by hand: constraints as values, and every wish that cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.cost import make_cluster
from graphpart.errors import ArgumentError, PlacementError
from graphpart.ir.graph import Graph
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.strategies import by_pattern
from graphpart.trace import trace


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        y = self.norm(x)
        q, k, v = (w(y).view(b, s, self.heads, d // self.heads).transpose(1, 2) for w in self.qkv)
        scores = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(b, s, d))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 4) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(Model(), (torch.zeros(3, 5, 8),), {}).graph


def placed(graph: Graph, wishes: Any, num_devices: int = 3) -> dict[str, list[tuple[int, dict[str, str]]]]:
    """Per module path, the tiles of its last operator."""
    plan = make_plan(graph, make_cluster(num_devices), Choices(strategy=wishes))
    return {
        op.module_path: [(t.device, {a: str(p) for a, p in t.axes.items()}) for t in plan.placement.tiles[op.name]]
        for op in graph.operators
    }


def test_several_axes_are_cut_on_a_mesh_of_devices(graph: Graph) -> None:
    found = placed(graph, {"blocks.0.up": gp.split((0, "n"), [[0, 1], [2, 3]])}, 4)
    dim = next(iter(found["blocks.0.up"][0][1]))
    assert [(device, part[dim], part["n"]) for device, part in found["blocks.0.up"]] == [
        (0, "0:2", "0:8"),
        (1, "0:2", "8:16"),
        (2, "2", "0:8"),
        (3, "2", "8:16"),
    ]
    model = Model()
    parted = gp.partition(model, 4, strategy={"blocks.*.up": gp.split((0, "n"), [["cpu:1", 0], [2, 3]])})
    parted.verify(torch.randn(3, 5, 8)).check(1e-5)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ((("n", "n"), [[0, 1], [2, 3]]), "give each once"),
        ((("n", 0), [0, 1, 2, 3]), "for 2 axes; give lists in lists, a level for each"),
        ((("n", 0), [[0, 1], [2]]), "give lists in lists"),
        ((("n", 0), [[0, 1], [1, 2]]), "has device 1 twice"),
        ((("n", 1.5), [[0, 1], [1, 2]]), "the axis is 1.5"),
    ],
)
def test_what_is_no_mesh_is_refused(how: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        gp.split(*how)


def test_an_axis_of_a_mesh_that_nothing_has_is_named(graph: Graph) -> None:
    for axes, said in ((("n", "z"), "has no axis 'z'"), ((0, "n"), "has 3 indices, too few for 4 parts")):
        with pytest.raises(PlacementError, match=said):
            placed(
                graph,
                {"blocks.0.up": gp.split(axes, [[i, i + 4] for i in range(4)] if said[-1] == "s" else [[0, 1]])},
                8,
            )


def test_split_in_a_mapping_cuts_and_the_neighbours_follow(graph: Graph) -> None:
    found = placed(graph, {"blocks.*.up": gp.split("n", [0, 1])})
    for block in ("blocks.0", "blocks.1"):
        assert found[f"{block}.up"] == [(0, {"n": "0:8"}), (1, {"n": "8:16"})]
        assert found[f"{block}.down"] == [(0, {"k": "0:8"}), (1, {"k": "8:16"})]
        assert found[f"{block}.norm"] == [(0, {}), (1, {})]


def test_the_same_split_in_a_list_and_alone(graph: Graph) -> None:
    wishes = [{"blocks.0.up": gp.split("n", [0, 1])}, [gp.split("blocks.0.up", "n", [0, 1])]]
    found = [placed(graph, w) for w in (*wishes, gp.split("blocks.0.up", "n", [0, 1]))]
    assert found[0] == found[1] == found[2]


def test_unequal_shares_index_sets_and_device_names(graph: Graph) -> None:
    found = placed(graph, {"blocks.0.up": gp.split("n", {"cpu:2": 3, 0: 1})})
    assert found["blocks.0.up"] == [(0, {"n": "12:16"}), (2, {"n": "0:12"})]
    found = placed(graph, {"blocks.0.up": gp.split("n", {0: [0, 1, 2, 7], 1: [*range(3, 7), *range(8, 16)]})})
    assert found["blocks.0.up"] == [(0, {"n": "0:3,7"}), (1, {"n": "3:7,8:16"})]
    assert found["blocks.0.down"] == [(0, {"k": "0:3,7"}), (1, {"k": "3:7,8:16"})]


def test_a_dimension_by_number_is_that_of_the_modules_result(graph: Graph) -> None:
    by_name = placed(graph, {"blocks.0.up": gp.split("n", [0, 1])})
    assert placed(graph, {"blocks.0.up": gp.split(-1, [0, 1])}) == by_name
    found = placed(graph, {"blocks.0.up": gp.split(0, [0, 1])})
    assert found["blocks.0.up"] == [(0, {"b0": "0:2"}), (1, {"b0": "2"})]


def test_split_of_heads_reaches_the_projections(graph: Graph) -> None:
    softmax = next(op.name for op in graph.operators if "softmax" in op.target)
    found = placed(graph, {softmax: gp.split("d1", [0, 1, 2])})
    assert found["blocks.0.qkv.0"] == [(0, {"n": "0:4"}), (1, {"n": "4:6"}), (2, {"n": "6:8"})]
    assert found["blocks.0.out"] == [(0, {"k": "0:4"}), (1, {"k": "4:6"}), (2, {"k": "6:8"})]


def test_pins_beside_splits(graph: Graph) -> None:
    found = placed(graph, {"blocks.0.up": gp.split("n", [0, 1]), "head": 2, "blocks.1": gp.pin("cpu:1")})
    assert found["head"] == [(2, {})] and found["blocks.1"] == [(1, {})]
    assert found["blocks.0.up"] == [(0, {"n": "0:8"}), (1, {"n": "8:16"})]


def test_the_first_pattern_that_fits_counts(graph: Graph) -> None:
    found = placed(graph, [gp.pin("blocks.0.up", 2), gp.split("blocks.*.up", "n", [0, 1])])
    assert found["blocks.0.up"] == [(2, {})] and len(found["blocks.1.up"]) == 2


UP, UPS = "blocks.0.up", "blocks.*.up"


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ([gp.pin(UPS, 0), gp.pin(UP, 1)], r"operator \S+ .*pin\(\S+ 0\) comes before pin\('blocks\.0\.up', 1\)"),
        ([gp.pin(UP, 0), gp.split(UP, "n", [0, 1])], r"pin\(\S+ 0\) comes before split\('blocks\.0\.up', 'n', \[0, 1"),
        ([gp.split(UPS, "n", [0, 1]), gp.pin(UP, 0)], "split.* comes before pin"),
        ([gp.split(UPS, "n", [0, 1]), gp.keep_whole(UP)], "split.* comes before keep_whole.*narrower pattern first"),
        ([gp.keep_whole(UP), gp.split(UP, "n", [0, 1])], "keep_whole.* comes before split"),
        ([gp.split(UP, "n", [0, 1]), gp.split(UP, "k", [0, 1])], "split.*'n'.* comes before split.*'k'"),
        ({UP: 0, "blocks.1.up": 1, UPS: gp.split("n", [0, 1])}, "pin.* comes before split"),
        (
            [gp.pin("head", 0), gp.pin(UP, 1), gp.colocate("head", "blocks.1.up"), gp.colocate("blocks.1.up", UP)],
            "are to go together, but are pinned to devices 0 and 1",
        ),
    ],
)  # fmt: skip
def test_constraints_that_contradict_each_other_are_refused(graph: Graph, wishes: Any, message: str) -> None:
    with pytest.raises((ArgumentError, PlacementError), match=message):
        make_plan(graph, make_cluster(2), Choices(strategy=wishes))


def test_exceptions_rests_and_repetitions_are_no_contradictions(graph: Graph) -> None:
    split = gp.split(UPS, "n", [0, 1])
    found = placed(graph, [gp.keep_whole(UP), split])
    assert len(found["blocks.1.up"]) == 2 and all(axes == {} for _, axes in found[UP])
    assert placed(graph, {UP: 0, "blocks.*": 1, "*": 0}) == placed(graph, {UP: 0, "blocks.*": 1, "*": 0, "**": 0})
    assert placed(graph, [gp.pin("*", 1), gp.pin("*", 0)]) == placed(graph, {"*": 1})  # a rest of nothing
    assert placed(graph, [gp.pin("*", 1), gp.pin(UP, 1), gp.keep_whole(UPS)]) == placed(graph, {"*": 1})


@pytest.mark.parametrize("first", [True, False])
def test_what_is_kept_whole_goes_where_it_is_pinned(graph: Graph, first: bool) -> None:
    both = [gp.keep_whole("head"), gp.pin("head", 1)]
    found = placed(graph, [*(both if first else both[::-1]), gp.split("blocks.*.up", "n", [0, 1])], 2)
    assert found["head"] == [(1, {})]


def test_groups_that_share_an_operator_go_together(graph: Graph) -> None:
    groups = [gp.colocate("head", "blocks.1.up"), gp.colocate("blocks.1.up", UP)]
    for rest in ([], [gp.split("blocks.*.down", "k", [0, 1])]):
        found = placed(graph, [gp.pin("head", 1), *groups, *rest], 2)
        assert found["head"] == found["blocks.1.up"] == found[UP] == [(1, {})]


def test_keep_whole_and_colocate(graph: Graph) -> None:
    wishes = [gp.split("blocks.*.up", "n", [0, 1]), gp.keep_whole("head"), gp.colocate("blocks.*.norm", "blocks.*.out")]
    found = placed(graph, wishes, 2)
    (head,) = found["head"]
    assert head[1] == {}
    together = [found[f"blocks.{i}.{part}"] for i in (0, 1) for part in ("norm", "out")]
    assert len(together[0]) == 1 and together == [together[0]] * 4


def test_X1_pins_alone_place_what_is_named_and_the_rest_follows(graph: Graph) -> None:
    patterns = {"blocks.0.*": 0, "blocks.1.*": 1}
    expected = by_pattern(graph, patterns)
    for wishes in (patterns, [gp.pin(p, d) for p, d in patterns.items()], {p: f"cpu:{d}" for p, d in patterns.items()}):
        assert make_plan(graph, make_cluster(2), Choices(strategy=wishes)).placement == expected
    found = placed(graph, [gp.pin("blocks.0.*", 0), gp.pin("blocks.1.*", 1), gp.colocate("blocks.0.norm", "head")])
    assert found["head"] == [(0, {})]


def test_a_split_over_one_device_is_a_pin(graph: Graph) -> None:
    found = placed(graph, {"blocks.0.up": gp.split("n", {1: range(16)}), "blocks.1.up": gp.split("n", [0, 1])})
    assert found["blocks.0.up"] == [(1, {})]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"head": gp.split("m", [0, 1])}, r"linear\S* .*has no axis 'm'.*'n' \(10 in dimension 2 of its result"),
        ({"head": gp.split("nn", [0, 1])}, "did you mean 'n'"),
        ({"blocks.0.norm": gp.split("s0", [0, 1])}, "cannot be cut along 's0': every index of it is needed at once"),
        ({"blocks.0.norm": gp.split(2, [0, 1])}, "has no dimension 2 that can be cut"),
        ({"head": gp.split(7, [0, 1])}, "has no dimension 7 that can be cut"),
        ({"*softmax*": gp.split("d3", [0, 1])}, "softmax.*cannot be cut along 'd3'.*It can be cut along 'd0'"),
        ({"*softmax*": gp.split("d1", [0, 1, 2, 3, 4])}, "has 4 indices, too few for 5 parts; give at most 4 devices"),
        ({"head": gp.split("n", {0: range(4), 1: range(3, 10)})}, "index 3 goes to device 0 and to 1"),
        ({"head": gp.split("n", {0: range(4), 1: range(5, 10)})}, "nobody gets 4 of its 10 indices"),
        ({"head": gp.split("n", {0: range(4), 1: range(4, 11)})}, "no index 10; give indices from 0 to 9"),
        ({"head": gp.split("n", [0, 9])}, "pattern 'head': 9 is no device index; there are 5: 0 to 4"),
        ({"head": 9}, "pattern 'head': 9 is no device index"),
        ({"head": gp.pin("cuda:7")}, "'cuda:7' is no device index"),
        ({"heads": gp.split("n", [0, 1])}, "pattern 'heads' matches no operator of Model; the nearest.*'head'"),
        ({"head": gp.colocate("head")}, "colocate.. names its own patterns"),
        ({"head": gp.pin("head", 0)}, "names 'head' as well; leave out one"),
        ([gp.pin(0)], "has no pattern"),
        ([0], "0 is no constraint"),
        ([gp.keep_whole("head")], "not where anything goes; add gp.pin or gp.split"),
        ([gp.pin("head", 0), gp.pin("blocks.1.up", 1), gp.colocate("head", "blocks.1.up")], "pin them to one"),
        ([gp.split("head", "n", [0, 1]), gp.colocate("head", "blocks.1.up")], "is split or pinned elsewhere"),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be_met_are_refused(graph: Graph, wishes: Any, message: str) -> None:
    with pytest.raises((ArgumentError, PlacementError), match=message):
        make_plan(graph, make_cluster(5), Choices(strategy=wishes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gp.split("n"), r"write split\('mlp.up', 'n', \[0, 1\]\)"),
        (lambda: gp.split("head", 1.5, [0]), "the axis is 1.5"),
        (lambda: gp.split("n", 3), "the devices are 3"),
        (lambda: gp.split("n", []), "there are no devices"),
        (lambda: gp.split("n", {0: 1, 1: [2]}), "some devices have a share and some have indices"),
        (lambda: gp.split("n", {0: -1}), "a share of -1"),
        (lambda: gp.split("n", {0: "a"}), "device 0 gets 'a'"),
        (lambda: gp.pin(), "is not understood"),
        (lambda: gp.colocate(), "needs patterns"),
    ],
)
def test_constraints_are_checked_where_they_are_made(make: Any, message: str) -> None:
    with pytest.raises((ArgumentError, PlacementError), match=message):
        make()


def test_strategy_options_need_a_strategy_by_name(graph: Graph) -> None:
    with pytest.raises(ArgumentError, match=r"strategy_options \['shard_parameters'\] need the name"):
        make_plan(graph, make_cluster(2), Choices(strategy={"*": 0}, strategy_options={"shard_parameters": True}))
