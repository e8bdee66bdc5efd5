"""What TensorFlow, MXNet, DistBelief, Krizhevsky's trick and Megatron-LM do, on real runs and their counters.

Each test's name begins with the requirement it holds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from placements import along, place, result_axis, sent, spans
from torch import Tensor, nn

import graphpart as gp
from graphpart.errors import PlanError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Tile


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


# --- T4: a cast on the wire ---------------------------------------------------------------------------------------


class Cast(nn.Module):
    """Floats, integers and a scalar that all cross between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.loss = nn.MSELoss()

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        found = self.down(torch.tanh(self.up(self.embed(ids + 1))))
        return self.loss(found, wanted) * 2


def cast_placement(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
    """Integers and floats leave device 0; the hidden layer is cut; a scalar leaves device 1 for device 0."""
    tiles: dict[str, tuple[Tile, ...]] = {op.name: (Tile(1),) for op in graph.operators}
    for op in graph.operators:
        if op.name == "add" or op.module_path == "embed":
            tiles[op.name] = (Tile(0 if op.name == "add" else 1),)
        elif op.module_path == "up" or "tanh" in op.target:
            tiles[op.name] = along(result_axis(op, 1), spans([12, 20]), [0, 1])
        elif op.module_path == "down":
            tiles[op.name] = along("k", spans([12, 20]), [0, 1])
        elif op.name == "mul":
            tiles[op.name] = (Tile(0),)
    return place(graph, tiles)


def cast_step(wire_dtype: str | None, num_microbatches: int = 1) -> tuple[list[tuple[int, int]], dict[str, Tensor]]:
    """Messages and bytes forward and in all, and what came out: the loss and every gradient."""
    torch.manual_seed(0)
    model, ids, wanted = Cast(), torch.randint(0, 15, (24,)), torch.randn(24, 8)
    parted = gp.partition(model, 2, strategy=cast_placement, wire_dtype=wire_dtype, num_microbatches=num_microbatches)
    loss = parted(ids, wanted)
    counts = [sent(parted)]
    loss.backward()
    counts.append(sent(parted))
    found = {name: gradient for name, gradient in parted.grad_dict().items() if gradient is not None}
    return counts, {"loss": loss.detach(), **found}


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_T4_cast_on_the_wire_halves_bytes_of_activations_and_gradients(wire_dtype: str, num_microbatches: int) -> None:
    (plain_forward, plain_all), plain = cast_step(None, num_microbatches)
    (forward, both), found = cast_step(wire_dtype, num_microbatches)
    assert (forward[0], both[0]) == (plain_forward[0], plain_all[0])
    ids, scalar = 24 * 8, 4
    embedded = partial = 24 * 8 * 4  # to the hidden layer on device 0, and its partial sum back
    assert plain_forward[1] == ids + embedded + partial + scalar
    assert forward[1] == ids + embedded // 2 + partial // 2 + scalar
    assert plain_all[1] - plain_forward[1] == embedded + partial + scalar
    assert both[1] - forward[1] == embedded // 2 + partial // 2 + scalar
    for name, expected in plain.items():
        assert relative(found[name], expected) < 2e-2, name
    assert max(relative(found[name], expected) for name, expected in plain.items()) > 1e-5  # digits were lost


class Normed(nn.Module):
    """BatchNorm: statistics are exchanged, and buffers overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def norm_placement(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
    """Samples of everything cut over two devices; parameters and buffers on device 1."""
    tiles = {}
    for op in graph.operators:
        cut = op.results[0].shape[:1] == (10,)
        axis = result_axis(op, 0) if cut else ""
        tiles[op.name] = along(axis, spans([4, 6]), [0, 1]) if cut else (Tile(1),)
    return Placement(tiles, {s.value.name: 1 for s in graph.sources if s.kind != "input"})


def test_T4_parameters_statistics_and_buffers_stay_exact() -> None:
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(10, 4)
    counts, buffers = [], []
    for wire_dtype in (None, "bfloat16"):
        parted = gp.partition(copy.deepcopy(model), 2, strategy=norm_placement, wire_dtype=wire_dtype)
        out = parted(x)
        out.square().sum().backward()
        counts.append(sent(parted))
        buffers.append({name: b.clone() for name, b in parted.named_buffers()})
        gathered = 4 * 6 * 4  # the result's rows from device 0 to device 1, and their gradient back
    assert counts[0][0] == counts[1][0] > 2
    assert counts[0][1] - counts[1][1] == 2 * gathered // 2
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert not torch.equal(buffers[0]["norm.running_mean"], model.norm.running_mean)


def test_T4_no_wire_dtype_changes_nothing_and_a_plan_keeps_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = Cast(), (torch.randint(0, 15, (24,)), torch.randn(24, 8))
    exact = gp.plan(model, 2, args, strategy=cast_placement)
    narrow = gp.plan(model, 2, args, strategy=cast_placement, wire_dtype="bfloat16")
    assert "graphpart.cast" not in {step.target for segment in exact.program.segments for step in segment.steps}
    assert narrow.program.message_bytes < exact.program.message_bytes
    parted = gp.partition(model, plan=narrow.save(tmp_path / "plan.json"))
    assert parted.verify(*args).worst[1] > 1e-5
    assert parted.plan.wire_dtype == "bfloat16"
    parted(*args)
    assert sent(parted) == (narrow.program.num_messages, narrow.program.message_bytes)


def test_T4_refuses_what_is_no_wire_dtype() -> None:
    for wrong in ("int8", "float32", torch.bfloat16):
        with pytest.raises(PlanError, match=r"wire_dtype=.*'bfloat16' or 'float16'"):
            gp.partition(Cast(), 2, wire_dtype=wrong)
    with pytest.raises(PlanError, match="wire_dtype"):
        gp.partition(Cast(), 2, plan="plan.json", wire_dtype="bfloat16")
