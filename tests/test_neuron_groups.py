"""Tiles that read only what a masked weight has edges to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import graphpart as gp
from graphpart.cost.memory.saved import Savings
from graphpart.draw.words.share import device_flops
from graphpart.errors import ParameterError, PlacementError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.region import Intervals
from graphpart.lower import lower
from graphpart.runtime.parameters.edge_guard import masks_of
from graphpart.strategies.cuts.neuron_groups import neuron_groups
from graphpart.trace import trace

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


# --- groups found by the strategy ---------------------------------------------------------------------------------


def block_structured(num_blocks: int, width: int, extra: int, layers: int = 3) -> tuple[nn.Module, list[np.ndarray]]:
    """Masked layers of ``num_blocks`` blocks whose neurons are shuffled, with ``extra`` more edges a layer."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    blocks = np.kron(np.eye(num_blocks), np.ones((width // num_blocks, width // num_blocks)))
    order = [rng.permutation(width) for _ in range(layers + 1)]
    parts: list[nn.Module] = []
    masks = []
    for i in range(layers):
        mask = blocks[order[i + 1]][:, order[i]]
        mask[rng.integers(width, size=extra), rng.integers(width, size=extra)] = 1
        layer = nn.Linear(width, width)
        prune.custom_from_mask(layer, "weight", torch.tensor(mask, dtype=torch.float32))
        parts += [layer, nn.Tanh()]
        masks.append(mask)
    return nn.Sequential(*parts), masks


def hidden_messages(parted: gp.PartitionedModule) -> tuple[int, int]:
    """Messages and bytes forward between layers, on what was sent."""
    assert parted.last_step is not None
    sent = {tag for counters in parted.last_step.counters.values() for tag in counters.tags}
    program, graph = parted.plan.program, parted.plan.graph
    outputs = {ref.name for ref in graph.outputs}
    between = [
        b
        for b in program.bridges
        if b.tag in sent
        and (value := program.wire[b.wire].value) in graph.producer
        and value not in outputs
        and graph.producer[value].target != "aten.mul.Tensor"
    ]
    return len(between), sum(b.size_bytes for b in between)


@pytest.mark.parametrize("devices", [2, 4])
def test_D1_blocks_of_neurons_are_found_and_nothing_crosses(devices: int) -> None:
    model, _ = block_structured(4, 32, extra=0)
    x = torch.randn(6, 32)
    parted = gp.partition(model, devices, strategy="free")
    parted.verify(x).check(1e-5)
    parted(x)
    assert hidden_messages(parted) == (0, 0)
    assert {t.device for tiles in parted.plan.placement.tiles.values() for t in tiles} == set(range(devices))


def test_D1_sparse_cuts_carry_fewer_bytes_than_equal_ones() -> None:
    model, masks = block_structured(2, 32, extra=3)
    x = torch.randn(6, 32)
    parted = gp.partition(model, 2, strategy="free")
    parted.verify(x).check(1e-5)
    parted(x)
    _, sparse_bytes = hidden_messages(parted)
    # At most one crossing an extra edge; equal contiguous halves need nearly every neuron of the other half.
    assert 0 < sparse_bytes <= 2 * 3 * 6 * 4
    halves = np.arange(32) // 16
    equal = sum(int((m[halves == d].any(0) & (halves != d)).sum()) for m in masks[1:] for d in (0, 1))
    assert sparse_bytes < equal * 6 * 4 / 4


def test_an_edge_that_grows_after_planning_is_refused() -> None:
    model, masks = block_structured(2, 8, extra=0)
    x = torch.randn(3, 8)
    parted = gp.partition(model, 2, strategy="free")
    parted(x)
    state = parted.state_dict()
    parted.load_state_dict(state)  # the same mask, written again
    parted(x)
    row, column = np.argwhere(masks[1] == 0)[0]
    with torch.no_grad():
        model[2].weight_mask[row, column] = 1
    with pytest.raises(ParameterError, match=r"'2\.weight_mask' masks, but its entry .* partition the model again"):
        parted(x)


def test_unlike_devices_get_unlike_groups() -> None:
    model, _ = block_structured(4, 32, extra=0)
    graph = trace(model, (torch.randn(2, 32),), {}).graph
    groups = neuron_groups(graph, masks_of(graph, dict(model.named_buffers())), (3.0, 1.0))
    assert {tuple(map(len, g.outputs)) for g in groups.values()} == {(24, 8)}
    inner = list(groups.values())[1:]
    assert all(set(g.inputs[0]).isdisjoint(g.inputs[1]) for g in inner)


@pytest.mark.slow
def test_all_processes_find_the_same_groups() -> None:
    program = """
import torch
from tests.test_neuron_groups import block_structured, masks_of, neuron_groups, trace
model, _ = block_structured(4, 16, extra=3)
graph = trace(model, (torch.zeros(2, 16),)).graph
print(neuron_groups(graph, masks_of(graph, dict(model.named_buffers())), (1.0, 1.0, 1.0)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1 and "Groups" in printed.pop()


def test_a_share_of_a_masked_layer_counts_what_the_mask_leaves_out() -> None:
    graph = trace(masked_layers(), (torch.randn(5, 6),)).graph
    placement = by_groups(graph, gp.make_cluster(2))
    program = lower(graph, placement, 2)
    shares = {d: (0.5 * n / 6) for d, n in ((0, 4), (1, 3))}
    flops = dict.fromkeys(shares, 0.0)
    for op in graph.operators:
        own = [(s.device, step) for s in program.segments for step in s.steps if step.operator == op.name]
        steps = {device: step.share for device, step in own if not step.is_bridge}
        assert {tile.device: tile.share(op) for tile in placement.tiles[op.name]} == steps
        if op.target == "aten.linear.default":
            assert steps == pytest.approx(shares)
        for device, share in steps.items():
            flops[device] += share * (op.flops_forward + op.flops_backward)
    assert device_flops(graph, placement, 2) == pytest.approx(list(flops.values()))


def test_a_masked_tile_keeps_and_holds_only_what_it_reads() -> None:
    graph = trace(masked_layers(), (torch.randn(5, 6),)).graph
    placement = by_groups(graph, gp.make_cluster(2))
    last = [op for op in graph.operators if op.target == "aten.linear.default"][-1]
    hidden, weight = (graph.values[name] for name in last.operands[:2])
    own, other = (tile.region(last, hidden) for tile in placement.tiles[last.name])
    assert (own.num_elements, other.num_elements) == (5 * 4, 5 * 3)
    assert placement.tiles[last.name][1].region(last, weight).num_elements == 3 * 3
    storages = Savings(graph, placement, 2).of([last])[1]
    (kept,) = {size_bytes for storage, size_bytes in storages.items() if storage.name == hidden.name}
    assert kept == 4 * other.num_elements
