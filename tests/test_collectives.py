"""Messages that are one collective, on the runtime's own counters; gradients that leave in buckets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.ir.graph import Graph, Operator
from graphpart.ir.placement import Placement, Tile, default_homes
from graphpart.ir.region import Intervals
from graphpart.lower import bridges, segments
from graphpart.lower.collectives import Transfer, kind_of

WIDTH, BATCH = 12, 6


def evenly(extent: int, parts: int) -> list[Intervals]:
    return [Intervals.span(i * extent // parts, (i + 1) * extent // parts) for i in range(parts)]


def placed(cut: Callable[[Operator, int], str | None]) -> Callable[..., Placement]:
    """Every operator on all devices: cut along the axis that ``cut`` names for its number, or replicated."""

    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        tiles = {}
        for number, op in enumerate(graph.operators):
            axis = cut(op, number)
            assert op.rule is not None
            parts = evenly(op.rule.extents[axis], len(cluster)) if axis else []
            tiles[op.name] = tuple(Tile(d, {axis: parts[d]} if axis else {}) for d in range(len(cluster)))
        return Placement(tiles, default_homes(graph, dict.fromkeys(tiles, 0)))

    return strategy


def run(
    strategy: Callable[..., Placement], model: nn.Module, devices: int
) -> tuple[Counter[str], gp.PartitionedModule]:
    """One training step, checked; the collectives of activations and their gradients that were counted."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH)
    parted = gp.partition(model, devices, strategy=strategy)
    parted.verify(x).check(1e-5)
    parted(x).sum().backward()
    assert parted.last_step is not None
    sources = parted.plan.graph.source
    return Counter(c.kind for c in parted.last_step.collectives if c.value not in sources), parted


def layers(number: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(number)))


@pytest.mark.parametrize("devices", [2, 3])
def test_contracted_then_whole_is_an_all_reduce_both_ways(devices: int) -> None:
    # Row, then replicated: the sum is wanted everywhere. The last layer's output is wanted on one device only.
    found, _ = run(placed(lambda op, i: "k" if i == 0 else "n"), layers(2), devices)
    assert found["all-reduce"] == 2
    assert found["all-gather"] == found["reduce-scatter"] == 0


@pytest.mark.parametrize("devices", [2, 3])
def test_columns_then_columns_are_an_all_gather_and_a_reduce_scatter(devices: int) -> None:
    found, _ = run(placed(lambda op, i: "n"), layers(2), devices)
    assert found["all-gather"] == found["reduce-scatter"] == 1 and not found["all-reduce"]


@pytest.mark.parametrize("devices", [2, 3])
def test_contracted_then_samples_is_a_reduce_scatter_and_an_all_gather(devices: int) -> None:
    found, _ = run(placed(lambda op, i: ("k", "b0")[i]), layers(2), devices)
    assert found["reduce-scatter"] == found["all-gather"] == 1


@pytest.mark.parametrize("devices", [2, 3])
def test_features_to_samples_is_an_all_to_all_both_ways(devices: int) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    found, _ = run(placed(lambda op, i: ("n", "d0")[i]), model, devices)
    assert found["all-to-all"] == 2


def test_what_no_gradient_passes_takes_no_part_in_the_backward() -> None:
    model = layers(2)
    model[0].requires_grad_(False)
    found, _ = run(placed(lambda op, i: "k" if i == 0 else "n"), model, 2)
    assert found["all-reduce"] == 1


def test_large_all_reduces_go_in_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = placed(lambda op, i: "k" if i == 0 else "n")
    _, small = run(strategy, layers(2), 3)
    monkeypatch.setattr(bridges, "SMALLEST_IN_ROUNDS", 1)
    found, parted = run(strategy, layers(2), 3)
    assert found["all-reduce"] == 0 and found["reduce-scatter"] == found["all-gather"] == 2
    assert small.last_step is not None and parted.last_step is not None
    # From n-1 times the value to 2(n-1)/n, forward and backward, on each of 3 devices.
    saved = 2 * 3 * BATCH * WIDTH * 4 * 2 // 3
    assert small.last_step.message_bytes - parted.last_step.message_bytes == saved


def test_gradients_of_shared_parameters_leave_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(op: Operator, number: int) -> str:
        return "b0"

    _, whole = run(placed(samples), layers(6), 2)
    monkeypatch.setattr(segments, "BUCKET_BYTES", 2 * WIDTH * (WIDTH + 1) * 4)
    _, parted = run(placed(samples), layers(6), 2)
    shared = {s.value.name for s in parted.plan.graph.parameters}

    def buckets(plan: Any) -> list[set[str]]:
        return [set(s.inputs) & shared for s in plan.program.segments if s.device == 1 and set(s.inputs) & shared]

    assert [len(bucket) for bucket in buckets(whole.plan)] == [12]
    assert [len(bucket) for bucket in buckets(parted.plan)] == [4, 4, 4]
    for bucket in buckets(parted.plan):  # each bucket's gradients come from a segment of its own
        assert len({parted.plan.backward.contributors[name] for name in bucket}) == 1


def test_shapes_that_are_no_collective() -> None:
    def sent(*pairs: tuple[int, int, str]) -> str:
        return kind_of([Transfer(wire, source, to, False, wire.islower()) for source, to, wire in pairs])

    assert sent((0, 1, "a")) == ""
    assert sent((0, 1, "a"), (0, 2, "a")) == "broadcast"
    assert sent((0, 1, "A"), (0, 2, "B")) == "scatter"
    assert sent((1, 0, "a"), (2, 0, "b")) == "gather"
    assert sent((0, 1, "a"), (1, 0, "b")) == "all-gather"
    assert sent((0, 1, "A"), (1, 0, "B")) == "all-to-all"
    assert sent((0, 1, "a"), (1, 2, "b")) == ""
    assert sent((0, 1, "a"), (0, 2, "a"), (1, 0, "b"), (1, 2, "b"), (2, 0, "c")) == ""


def test_a_whole_slice_elsewhere_receives_only_what_it_slices() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return torch.tanh(y[:, 2:5]) + y[:, 7:8]

    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        return Placement.whole(graph, {op.name: int(op.target != "aten.linear.default") for op in graph.operators})

    _, parted = run(strategy, Sliced(), 2)
    program = parted.plan.program
    sent = [b for b in program.bridges if program.wire[b.wire].value == "linear"]
    assert sum(b.size_bytes for b in sent) == BATCH * (3 + 1) * 4
