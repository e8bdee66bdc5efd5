"""Any mask of weights ends in groups of neurons, and soon: regular ones have eigenvalues that iterations choke on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Graph
from graphpart.strategies.cuts.bucket_elimination import Factor, choose
from graphpart.strategies.cuts.neuron_groups import MAX_DENSE, along, neuron_groups
from graphpart.trace import trace
from tests.helpers.time_limit import time_limit

LIMIT_S = 60.0


class Masked(nn.Module):
    """Masked layers between dense ones, and one right behind another."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, first.shape[1]), nn.Linear(second.shape[0], 4)
        for name, mask in (("first", first), ("second", second)):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.randn(*mask.shape)))
            self.register_buffer(f"{name}_mask", torch.tensor(mask, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(torch.tanh(self.a(x)), self.first_weight * self.first_mask))
        return self.b(torch.tanh(F.linear(x, self.second_weight * self.second_mask)))


def _blocks(count: int, rows: int, columns: int | None = None) -> np.ndarray:
    return np.kron(np.eye(count), np.ones((rows, columns or rows)))


def _permuted(mask: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    return mask[rng.permutation(len(mask))][:, rng.permutation(mask.shape[1])]


def _random(part: float, seed: int, size: int = 16) -> np.ndarray:
    return (np.random.default_rng(seed).random((size, size)) < part).astype(float)


def _without_rows(mask: np.ndarray) -> np.ndarray:
    mask = mask.copy()
    mask[::3] = 0
    return mask


MASKS: dict[str, np.ndarray] = {
    "two full blocks": _blocks(2, 4),
    "three full blocks": _blocks(3, 4),
    "blocks of one": np.eye(8),
    "blocks of two": _blocks(4, 2),
    "one full block": np.ones((8, 8)),
    "one block alone": np.pad(np.ones((4, 4)), (0, 4)),
    "nothing": np.zeros((8, 8)),
    "one edge": np.pad(np.ones((1, 1)), (3, 4)),
    "permuted blocks": _permuted(_blocks(4, 4)),
    "empty rows": _without_rows(_blocks(2, 6)),
    "empty columns": _without_rows(_blocks(2, 6)).T,
    "a ring": np.eye(12) + np.roll(np.eye(12), 1, 0),
    "a triangle": np.tril(np.ones((9, 9))),
    "a checkerboard": np.indices((10, 10)).sum(0) % 2,
    "a star": np.vstack([np.ones((1, 8)), np.pad(np.ones((7, 1)), ((0, 0), (0, 7)))]),
    "sparse": _random(0.1, 1),
    "sparser": _random(0.03, 2),
    "dense": _random(0.8, 3),
}


@cache
def _graph(size: int) -> Graph:
    return trace(Masked(np.ones((size, size)), np.ones((size, size))), (torch.zeros(2, 4),)).graph


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0, 1.0)], ids=["2", "3"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_has_groups_in_bounded_time(name: str, weights: tuple[float, ...]) -> None:
    mask = MASKS[name]
    graph = _graph(len(mask))
    with time_limit(LIMIT_S):
        groups = neuron_groups(graph, {"first_mask": mask, "second_mask": mask.T}, weights)
    assert len(groups) == 2
    for found, own in zip(groups.values(), (mask, mask.T), strict=True):
        owned = sorted(i for part in found.outputs for i in part)
        assert owned == list(range(len(mask)))
        for outputs, inputs in zip(found.outputs, found.inputs, strict=True):
            assert set(np.flatnonzero(own[list(outputs)].any(0))) <= set(inputs)


@pytest.mark.parametrize(("count", "rows"), [(2, 4), (4, 4), (2, 8)])
def test_nothing_crosses_between_permuted_blocks(count: int, rows: int) -> None:
    first = _permuted(_blocks(count, rows))
    masks = {"first_mask": first, "second_mask": first.T}
    groups = list(neuron_groups(_graph(len(first)), masks, (1.0, 1.0)).values())
    assert all(set(own) == set(read) for own, read in zip(groups[0].outputs, groups[1].inputs, strict=True))


def test_a_layer_with_fewer_neurons_than_devices_is_no_neighbour() -> None:
    model = Masked(_blocks(2, 1, 4), _blocks(2, 4, 1))
    graph = trace(model, (torch.zeros(2, 4),)).graph
    masks = {name: np.asarray(mask) for name, mask in model.named_buffers()}
    assert len(neuron_groups(graph, masks, (1.0, 1.0, 1.0))) == 1


@pytest.mark.parametrize("strategy", ["free", pytest.param("auto", marks=pytest.mark.slow)])
def test_full_blocks_between_dense_layers_train_like_one_device(strategy: str) -> None:
    with time_limit(LIMIT_S):
        model, x = Masked(_blocks(2, 4), _blocks(2, 4)), torch.randn(8, 4)
        gp.partition(model, 2, strategy=strategy).verify(x)


GRAPHS: dict[str, Callable[[int], np.ndarray]] = {
    "a path": lambda n: np.eye(n, k=1),
    "a ring": lambda n: np.roll(np.eye(n), 1, 0),
    "a star": lambda n: np.pad(np.ones((1, n - 1)), ((0, n - 1), (1, 0))),
    "two sides": lambda n: np.kron([[0, 1], [0, 0]], np.ones((n // 2, n // 2))),
    "all": lambda n: np.triu(np.ones((n, n)), 1),
}


@pytest.mark.parametrize("size", [2, 4, 40, MAX_DENSE + 200])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_connected_graph_has_an_order_in_bounded_time(name: str, size: int) -> None:
    edges = GRAPHS[name](size)
    neighbours = csr_array(((edges + edges.T) > 0).astype(float))
    with time_limit(LIMIT_S):
        order = along(neighbours)
    assert sorted(order.tolist()) == list(range(size))
    if name == "a path":  # the one with a single best order; its ends are alike to the last digits
        assert np.abs(np.diff(order)).max() <= (1 if size <= MAX_DENSE else 4)


def test_a_choice_that_is_not_proved_best_is_improved_in_a_bounded_number_of_sweeps() -> None:
    rng = np.random.default_rng(0)
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8)]
    factors = [Factor(pair, rng.random((3, 3))) for pair in pairs]
    with time_limit(LIMIT_S):
        found = choose([3] * 8, factors, max_cells=9)
    assert found.bound <= found.cost
    for variable in range(8):  # no single change helps
        for value in range(3):
            values = [*found.values[:variable], value, *found.values[variable + 1 :]]
            assert sum(f.table[tuple(values[v] for v in f.scope)] for f in factors) >= found.cost - 1e-9
