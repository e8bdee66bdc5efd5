"""The survey's message formulas, counted on real steps: forward and backward of dense layers on CPU workers.

A message is one tensor from one worker to another, in one direction. The formulas count the boundaries between layers
alone, so every parameter is at home where it is read, and every worker returns its own part of the last layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals
from tests.helpers.placements import along, copies, equal, place, result_axis, sent, spans

pytestmark = pytest.mark.sampled(6)

Groups = Sequence[Sequence[int]]
"""Per layer, the workers that hold a part of it."""


class Dense(nn.Module):
    """Dense layers of one width, each with its activation; returns the last one's features in pieces.

    Args:
        num_layers: how many.
        width: features of each.
        pieces: sizes of the pieces.
        activation: applied after each layer.
    """

    def __init__(self, num_layers: int, width: int, pieces: Sequence[int], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.activation = activation or nn.Identity()
        self.pieces = [part.runs[0] for part in spans(pieces)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            x = self.activation(layer(x))
        return tuple(x[:, start:stop] for start, stop in self.pieces)


class ByFeature:
    """A strategy: each layer's output features cut over its group of workers.

    Args:
        groups: workers of each layer.
        sizes: per layer, features of each worker's part; even parts where nothing is given.
        rows: layers that are cut along their input features in place of their output.
    """

    def __init__(self, groups: Groups, sizes: Sequence[Sequence[int]] = (), rows: Sequence[int] = ()) -> None:
        self.groups, self.sizes, self.rows = groups, sizes, rows

    def __call__(self, graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        tiles: dict[str, tuple[Tile, ...]] = {}
        layer, piece = -1, 0
        for op in graph.operators:
            if "slice" in op.target:  # each worker keeps its own part
                workers = self.groups[-1]
                tiles[op.name] = (Tile(workers[piece], {result_axis(op, 1): Intervals.full(op.results[0].shape[1])}),)
                piece += 1
                continue
            is_layer = op.target == "aten.linear.default"
            layer += is_layer
            workers = self.groups[layer]
            parts = spans(self.sizes[layer] if self.sizes else equal(op.results[0].shape[1], len(workers)))
            if len(workers) == 1 or (layer in self.rows and not is_layer):
                tiles[op.name] = copies(workers)  # an activation needs the sum of a row split's partial results
            else:
                tiles[op.name] = along("k" if layer in self.rows else result_axis(op, 1), parts, workers)
        return place(graph, tiles)


def step(model: nn.Module, strategy: Any, num_devices: int, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Run one training step; its messages and bytes forward, and in all. Gradients have to be the plain model's."""
    plain = copy.deepcopy(model)
    parted = gp.partition(model, num_devices, strategy=strategy)
    out = parted(x)
    forward = sent(parted)
    loss(out).backward()
    loss(plain(x)).backward()
    tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
    for (name, expected), found in zip(plain.named_parameters(), parted.grad_dict().values(), strict=True):
        assert found is not None and expected.grad is not None
        torch.testing.assert_close(found, expected.grad, rtol=tolerance, atol=tolerance, msg=name)
    return forward, sent(parted)


def loss(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The mean square of all of the result, piece by piece."""
    pieces = out if isinstance(out, tuple) else (out,)
    return torch.stack([piece.square().sum() for piece in pieces]).sum() / sum(piece.numel() for piece in pieces)


def count(groups: Groups, *, width: int = 12, sizes: Sequence[Sequence[int]] = (), rows: Sequence[int] = ()) -> int:
    """Messages of one step of dense layers cut by feature; half of them go forward."""
    torch.manual_seed(0)
    pieces = sizes[-1] if sizes else equal(width, len(groups[-1]))
    model = Dense(len(groups), width, pieces, nn.Tanh()).double()
    num_devices = 1 + max(device for group in groups for device in group)
    x = torch.randn(4, width, dtype=torch.float64)
    (forward, _), (both, _) = step(model, ByFeature(groups, sizes, rows), num_devices, x)
    assert both == 2 * forward
    return both


def distinct(num_layers: int, num_parts: int) -> list[list[int]]:
    """Layers that share no worker, each on its own group."""
    return [[layer * num_parts + part for part in range(num_parts)] for layer in range(num_layers)]


@pytest.mark.parametrize(("layers", "messages"), [(1, 0), (2, 2), (4, 6), (8, 14)])
def test_formula_layer(layers: int, messages: int) -> None:
    """(L-1)*2, a chain of L workers."""
    assert count(distinct(layers, 1)) == messages == (layers - 1) * 2


@pytest.mark.parametrize(("layers", "parts", "messages"), [(4, 2, 12), (5, 4, 96), (3, 1, 0), (1, 4, 0), (2, 3, 12)])
def test_formula_feature(layers: int, parts: int, messages: int) -> None:
    """(L-1)*F(F-1)*2: F workers, each with 1/F of each of L dense layers."""
    assert count([range(parts)] * layers) == messages == (layers - 1) * parts * (parts - 1) * 2


@pytest.mark.parametrize(("layers", "parts", "messages"), [(3, 2, 16), (4, 3, 54), (4, 4, 96), (2, 1, 2)])
def test_formula_hybrid(layers: int, parts: int, messages: int) -> None:
    """(L-1)*F²*2, on L x F distinct workers."""
    assert count(distinct(layers, parts)) == messages == (layers - 1) * parts**2 * 2


@pytest.mark.parametrize(
    ("dense", "groups", "parts", "messages"), [(8, 4, 2, 40), (6, 2, 3, 66), (4, 4, 2, 24), (6, 1, 2, 20)]
)
def test_formula_groups_of_dense_layers(dense: int, groups: int, parts: int, messages: int) -> None:
    """2[(L-1)F² + (D-L)F(F-1)]: D dense layers in L groups of F workers."""
    placed = [group for group in distinct(groups, parts) for _ in range(dense // groups)]
    assert count(placed) == messages == 2 * ((groups - 1) * parts**2 + (dense - groups) * parts * (parts - 1))


def test_formula_counts_messages_of_any_size_so_uneven_parts_cost_no_more() -> None:
    sizes = [[7, 3, 2], [1, 1, 10], [4, 5, 3]]
    assert count([range(3)] * 3, sizes=sizes) == count([range(3)] * 3) == 2 * 6 * 2


@pytest.mark.parametrize(
    ("split", "groups", "size_bytes"),
    [
        ("layer", [[0], [1]], 262_144),
        ("feature", [range(4), range(4)], 786_432),
        ("hybrid", [range(4), range(4, 8)], 1_048_576),
    ],
)
def test_formula_bytes_of_a_boundary(split: str, groups: Groups, size_bytes: int) -> None:
    """Forward, float32, batch 64, width 1024, F=4; the gradients take as many bytes again."""
    torch.manual_seed(0)
    model = Dense(2, 1024, equal(1024, len(groups[-1])))
    (_, forward), (_, both) = step(model, ByFeature(groups), 1 + groups[-1][-1], torch.randn(64, 1024))
    assert forward == size_bytes
    assert both == 2 * size_bytes


class Elementwise(nn.Module):
    """One dense layer, and operators that take element by element after it."""

    def __init__(self, pieces: Sequence[int]) -> None:
        super().__init__()
        self.layers = Dense(1, 12, pieces, nn.Sequential(nn.Tanh(), nn.GELU(), nn.Sigmoid()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers(x)


class Shifted(ByFeature):
    """The operators after the first activation are cut elsewhere than what they read."""

    def __call__(self, graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        placement = super().__call__(graph, cluster)
        tiles = dict(placement.tiles)
        for op in graph.operators:
            if "gelu" in op.target or "sigmoid" in op.target:
                tiles[op.name] = along(result_axis(op, 1), spans([2, 4, 6]), [0, 1, 2])
        return place(graph, tiles)


def test_formula_elementwise_boundaries_of_equal_split_are_free() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert step(Elementwise([4, 4, 4]).double(), ByFeature([range(3)]), 3, x)[1] == (0, 0)
    crossing = step(Elementwise([2, 4, 6]).double(), Shifted([range(3)]), 3, x)[1]
    assert crossing == (2 * 2, 2 * (2 + 2) * 5 * 8)  # two columns from 0 to 1, and two from 1 to 2; and their gradients


@pytest.mark.parametrize(("layers", "parts"), [(3, 2), (5, 4), (7, 3)])
def test_formula_is_no_lower_bound_column_row_pairs_take_every_second_exchange(layers: int, parts: int) -> None:
    formula = (layers - 1) * parts * (parts - 1) * 2
    assert count([range(parts)] * layers, rows=range(1, layers, 2)) == formula // 2


@pytest.mark.parametrize(("layers", "parts"), [(4, 2), (5, 4)])
def test_formula_counts_more_than_the_feature_strategy_sends(layers: int, parts: int) -> None:
    """Even with the result brought to one device, and biases to where they are added, which the formula leaves out."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(12, 12), nn.Tanh()))).double()
    _, (messages, _) = step(model, "feature", parts, torch.randn(4, 12, dtype=torch.float64))
    assert 0 < messages < (layers - 1) * parts * (parts - 1) * 2
