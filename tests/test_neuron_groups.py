"""Tiles that read only what a masked weight has edges to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import graphpart as gp
from graphpart.errors import PlacementError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals

GROUPS = (Intervals.indices([0, 2, 5]), Intervals.indices([1, 3, 4]))
EXTRA = 4  # the one neuron of group 1 that group 0 has an edge from


def masked_layers() -> nn.Module:
    """Two linear layers whose weights connect two interleaved groups of neurons, but for one edge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    for layer in (model[0], model[2]):
        mask = torch.zeros(6, 6)
        for group in GROUPS:
            mask[torch.tensor(list(group))[:, None], torch.tensor(list(group))] = 1
        mask[0, EXTRA] = 1
        prune.custom_from_mask(layer, "weight", mask)
    return model


def by_groups(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
    needs = (GROUPS[0] | Intervals.indices([EXTRA]), GROUPS[1])
    tiles = {}
    for op in graph.operators:
        if op.target == "aten.linear.default":
            tiles[op.name] = tuple(Tile(d, {"n": GROUPS[d]}, {"k": needs[d]}) for d in (0, 1))
        elif op.target == "aten.tanh.default":
            tiles[op.name] = tuple(Tile(d, {"d1": GROUPS[d]}) for d in (0, 1))
        else:
            tiles[op.name] = (Tile(0),)
    return Placement(tiles)


def test_D1_only_values_with_an_edge_across_are_sent() -> None:
    model, x = masked_layers(), torch.randn(5, 6)
    parted = gp.partition(model, 2, strategy=by_groups)
    parted.verify(x)
    program = parted.plan.program
    hidden = [b for b in program.bridges if program.wire[b.wire].value == "tanh"]
    assert [(b.source, b.destination, b.size_bytes) for b in hidden] == [(1, 0, 5 * 4)]  # one neuron of five samples
    out: Tensor = parted(x)
    out.sum().backward()
    assert parted.last_step is not None
    sent = [c for counters in parted.last_step.counters.values() for c in counters.tags]
    assert hidden[0].tag in sent


def test_a_tile_may_leave_out_only_contracted_axes() -> None:
    def wrong(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        placement = by_groups(graph, cluster)
        tiles = {n: (Tile(0, {}, {"n": GROUPS[0]}),) if n == "linear" else t for n, t in placement.tiles.items()}
        return Placement(tiles)

    with pytest.raises(PlacementError, match=r"reads only n=0,2,5; .*: k"):
        gp.partition(masked_layers(), 2, strategy=wrong)(torch.randn(5, 6))
