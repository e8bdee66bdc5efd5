"""Pictures of real plans with cut operators: tiles, collectives, and bridges node by node."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.draw.picture.detail import Detail, DetailNode, detail
from graphpart.draw.picture.fold import fold
from graphpart.draw.picture.tiles import cut_lines, drawn_axes, runs_text, tile_text
from graphpart.errors import DrawError
from graphpart.ir.region import Intervals

pytestmark = pytest.mark.sampled(3)


def mlp(num_devices: int = 2, axes: Sequence[str] = ("n", "k", "n"), **options: int) -> gp.Plan:
    """Three linear layers, each cut along one axis, with pointwise ones between."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6))
    cut = {str(2 * i): gp.split(axis, list(range(num_devices))) for i, axis in enumerate(axes)}
    return gp.plan(model, num_devices, (torch.zeros(4, 8),), strategy=cut, **options)


def chain(**options: int) -> gp.Plan:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    return gp.plan(model, 2, (torch.zeros(4, 8),), strategy={"0": 0, "2": 1, "4": 0}, **options)


def halo() -> gp.Plan:
    """Two convolutions, cut in three along their positions: the middle part talks to both neighbours."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Conv1d(2, 1, 3, padding=1))
    cut = {"0": gp.split(2, [0, 1, 2]), "1": gp.split(2, [0, 1, 2])}
    return gp.plan(model, 3, (torch.zeros(2, 1, 12),), strategy=cut)


def blocks(num_blocks: int = 12) -> gp.Plan:
    """Many alike blocks of two linear layers, cut by columns and then by rows."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    cut = {"*.up": gp.split("n", [0, 1]), "*.down": gp.split("k", [0, 1])}
    return gp.plan(nn.Sequential(*(Block() for _ in range(num_blocks))), 2, (torch.zeros(4, 8),), strategy=cut)


def drawn(plan: gp.Plan, max_boxes: int = 60) -> Detail:
    return detail(plan.graph, plan.program, fold(plan.graph, plan.placement, max_boxes=max_boxes), inner=True)


def of_kind(found: Detail, *kinds: str) -> list[DetailNode]:
    return [node for node in found.nodes.values() if node.kind in kinds]


def svg_of(source: str) -> str:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz's dot is not installed")
    done = subprocess.run(["dot", "-Tsvg"], input=source.encode(), capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout.decode()


def test_tiles_are_told_by_axis_and_range() -> None:
    plan = mlp()
    first, _, second = plan.graph.operators[:3]
    assert [tile_text(first, plan.placement, d) for d in (0, 1, 2)] == ["n 0:8", "n 8:16", ""]
    assert tile_text(second, plan.placement, 1) == "Σk 8:16"


def test_replicas_are_told_as_such() -> None:
    plan = mlp()
    tanh = plan.graph.operators[3]
    assert {tile.device for tile in plan.placement.tiles[tanh.name]} == {0, 1}
    assert tile_text(tanh, plan.placement, 0) == tile_text(tanh, plan.placement, 1) == "replica"
    halves = [gp.Tile(d, {"d0": Intervals.span(2 * (d // 2), 2 * (d // 2) + 2)}) for d in range(4)]
    pairs = gp.Placement({**plan.placement.tiles, tanh.name: tuple(halves)})
    assert tile_text(tanh, pairs, 3) == "d0 2:4, replica"


def test_tiles_on_one_device_are_told_together() -> None:
    plan = mlp()
    first = plan.graph.operators[0]
    runs = [(0, {"n": Intervals.span(0, 4)}), (1, {"n": Intervals.span(4, 12)}), (0, {"n": Intervals.span(12, 16)})]
    placement = gp.Placement({**plan.placement.tiles, first.name: tuple(gp.Tile(d, axes) for d, axes in runs)})
    assert tile_text(first, placement, 0) == "n 0:4,12:16"
    a, b = Intervals.span(0, 2), Intervals.span(2, 4)
    corners = [(0, a, a), (1, a, Intervals.span(2, 16)), (0, b, Intervals.span(2, 16)), (1, b, a)]
    tiles = tuple(gp.Tile(d, {"b0": rows, "n": columns}) for d, rows, columns in corners)
    assert tile_text(first, gp.Placement({first.name: tiles}), 0) == "2 tiles"


def test_long_index_sets_are_short_in_words() -> None:
    assert runs_text(Intervals.of([(0, 4), (8, 12)])) == "0:4,8:12"
    assert runs_text(Intervals.of([(0, 4), (8, 12), (16, 20)])) == "0:4 +2 runs"


def test_boxes_tell_the_cuts_of_what_costs_most() -> None:
    plan = mlp()
    names = [op.name for op in plan.graph.operators]
    assert cut_lines(plan.graph, plan.placement, names, 0) == ("n 0:8", "Σk 0:8", "n 0:3")
    assert cut_lines(plan.graph, plan.placement, names[3:4], 1) == ("replica",)
    assert drawn_axes(plan.graph, plan.placement, names) == ("n in 2", "d1 in 2", "Σk in 2")


def test_a_folded_box_has_a_cell_for_each_tile() -> None:
    source = mlp().dot(bridges=False)
    for text in ("n 0:8", "n 8:16", "Σk 0:8", "Σk 8:16", "replica"):
        assert f">{text}<" in source, text
    assert source.count("<B>all-reduce</B>") == 1
    svg_of(source)


def test_many_devices_say_how_often_and_not_where() -> None:
    source = mlp(6, ("n", "k", "n")).dot(bridges=False)
    assert ">n in 6<" in source and ">Σk in 6<" in source and "n 0:3" not in source


def test_alike_cut_blocks_fold() -> None:
    source = blocks().dot(bridges=False, max_boxes=8)
    assert "(×10)" in source and "⇄ 10 × all-reduce" in source
    assert source.count(">n 0:8<BR/>") == source.count(">n 8:16<BR/>") >= 1


@pytest.mark.slow
def test_small_cut_programs_show_their_bridges_by_themselves() -> None:
    assert mlp().dot() == mlp().dot(bridges=True) != mlp().dot(bridges=False)
    assert chain().dot() == chain().dot(bridges=False) != chain().dot(bridges=True)
    assert mlp().dot(max_boxes=12) == mlp().dot(max_boxes=12, bridges=False)
    assert blocks().dot() == blocks().dot(bridges=False)  # their all-reduces would be hidden in folded boxes


@pytest.mark.parametrize("plan", [mlp, chain, halo], ids=lambda make: make.__name__)
def test_send_and_recv_share_their_number(plan: object) -> None:
    made = plan()  # type: ignore[operator]
    source = made.dot(bridges=True)
    sends, recvs = (sorted(re.findall(rf'label="{kind} (#[^"]*)"', source)) for kind in ("send", "recv"))
    assert sends == recvs and sends
    together = {tag for c in made.program.collectives for tag in c.tags}
    tags = {int(tag) for text in sends for tag in re.findall(r"#(\d+)", text)}
    assert tags == {b.tag for b in made.program.bridges} - together
    svg_of(source)


@pytest.mark.parametrize("plan", [mlp, chain, halo], ids=lambda make: make.__name__)
def test_every_byte_is_drawn_once(plan: object) -> None:
    made = plan()  # type: ignore[operator]
    found = drawn(made)
    crossing = [*of_kind(found, "send"), *(n for n in found.nodes.values() if n.devices)]
    assert sum(node.size_bytes for node in crossing) == made.program.message_bytes
    assert sorted(tag for node in crossing for tag in node.tags) == [b.tag for b in made.program.bridges]


def test_a_collective_is_one_node_that_all_its_devices_reach() -> None:
    plan = mlp(3)
    found = drawn(plan)
    (node,) = of_kind(found, "all-reduce")
    assert node.devices == (0, 1, 2) and node.device is None
    into = {found.nodes[a].device for a, b in found.edges if b == node.key}
    out = {found.nodes[b].device for a, b in found.edges if a == node.key}
    assert into == out == {0, 1, 2}
    assert not of_kind(found, "sum")  # it is part of the all-reduce


def test_halos_are_sliced_sent_and_joined() -> None:
    plan = halo()
    found = drawn(plan)
    assert len(of_kind(found, "concat")) == 3 and len(of_kind(found, "slice", "split")) >= 4
    middle = [n for n in of_kind(found, "send") if n.device == 1]
    assert {found.nodes[b].device for n in middle for a, b in found.edges if a == n.key} == {0, 2}


def test_edges_change_device_only_between_send_and_recv() -> None:
    for plan in (mlp(), chain(), halo()):
        found = drawn(plan)
        for a, b in found.edges:
            source, destination = found.nodes[a], found.nodes[b]
            if source.device != destination.device and None not in (source.device, destination.device):
                assert (source.kind, destination.kind) == ("send", "recv")


def test_edges_go_forward() -> None:
    for plan in (mlp(), chain(), halo(), mlp(num_microbatches=2)):
        found = drawn(plan)
        left, waiting = set(found.nodes), dict.fromkeys(found.edges)
        while ready := {n for n in left if not any(b == n for _, b in waiting)}:
            left -= ready
            waiting = {(a, b): None for a, b in waiting if a in left}
        assert not left


def test_one_microbatch_stands_for_all() -> None:
    once, twice = drawn(mlp()), drawn(mlp(num_microbatches=2))
    assert {n.kind for n in once.nodes.values()} == {n.kind for n in twice.nodes.values()}
    assert of_kind(once, "tile") == of_kind(twice, "tile")
    assert "the first of 2 microbatches" in mlp(num_microbatches=2).dot(bridges=True)


@pytest.mark.parametrize("max_boxes", [10, 20, 60])
def test_bridges_fold_too(max_boxes: int) -> None:
    source = blocks().dot(bridges=True, max_boxes=max_boxes)
    assert len(re.findall(r"^n\d+ \[", source, re.MULTILINE)) <= max_boxes
    assert "all-reduce" in source and "⇄" in source  # what a folded box passes to itself is told, not drawn
    svg_of(source)


def test_too_few_boxes_for_bridges_are_refused() -> None:
    with pytest.raises(DrawError, match="more than 2 boxes"):
        blocks().dot(bridges=True, max_boxes=2)
