"""A model trained with parameters whose home is cut, against the plain model: threads, several devices, processes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import graphpart as gp
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Shard, Tile
from graphpart.ir.region import Intervals, Region
from graphpart.runtime.parameters.tiled_tensor import TiledTensor
from tests.helpers.processes import process_group, run_processes

STEPS = 5
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
}


class Net(nn.Module):
    """Two layers, of which ``extra`` is only added on request, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 12)
        self.down = nn.Linear(12, 6)
        self.extra = nn.Linear(5, 6)
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, more: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        main, side = self.down(torch.tanh(self.up(x))), self.extra(x)
        return main + side if more else main, side


LAYOUTS = ("runs", "scattered", "homes alone")


def cut_by_columns(world: int, layout: str) -> Any:
    """A strategy: every layer's results cut over the devices, and the homes of its parameters alike.

    Args:
        world: number of devices.
        layout: each device has one run of results, every so-manieth result, or these as homes alone, while the last
            device computes whole layers.
    """

    def share(extent: int, device: int) -> Intervals:
        if layout != "runs":
            return Intervals.indices(range(device, extent, world))
        edges = [0, *(extent * (2 * i + 1) // (2 * world) for i in range(1, world)), extent]  # uneven
        return Intervals.span(*list(pairwise(edges))[device])

    def columns(graph: Graph, cluster: gp.Cluster, **options: object) -> gp.Placement:
        tiles, shards = {}, {}
        for op in graph.operators:
            axis = op.rule.results[0][-1][0] if op.rule is not None and op.target == "aten.linear.default" else None
            if axis is None:
                tiles[op.name] = (Tile(0),)
                continue
            parts = [share(op.rule.extents[axis], device) for device in range(world)]
            tiles[op.name] = tuple(Tile(device, {axis: part}) for device, part in enumerate(parts))
            if layout == "homes alone":
                tiles[op.name] = (Tile(world - 1),)
            for name in op.operands[1:]:
                rest = [Intervals.full(n) for n in graph.values[name].shape[1:]]
                shards[name] = tuple(Shard(device, Region((part, *rest))) for device, part in enumerate(parts))
        homes = {s.value.name: world - 1 for s in graph.sources if s.kind != "input" and s.value.name not in shards}
        return gp.Placement(tiles, homes, shards)

    return columns


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Train with scaled and clipped gradients, two forms of the call and one step that overflows.

    Returns:
        Losses and norms, then every parameter, then the last step's gradients.
    """
    optimizer, scaler = OPTIMIZERS[name](model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    found = []
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        main, _ = model(x, more=step % 2 == 1)  # the layer ``extra`` has no gradient at every other step
        loss = main.square().mean() * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found += [loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 0.05)]
        scaler.step(optimizer)
        scaler.update()
        model.load_state_dict(model.state_dict())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = model.grad_dict() if isinstance(model, gp.PartitionedModule) else plain_gradients(model)
    state.update({f"gradient of {n}": g for n, g in gradients.items() if g is not None})
    return {"losses": torch.stack(found), **state}


def plain_gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def agree(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.sampled(6)
@pytest.mark.parametrize("several", [False, True], ids=["one torch device", "several torch devices"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_threads_train_as_the_plain_model(name: str, layout: str, several: bool) -> None:
    """S7: with uneven parts."""
    expected = train(net(), name)
    parted = gp.partition(net(), 2, strategy=cut_by_columns(2, layout))
    if several:  # two names of the same memory: to torch, the devices are unlike, as two GPUs are
        parted._state.devices = (torch.device("cpu"), torch.device("cpu:0"))
    agree(train(parted, name), expected)
    tiled = {n for n, p in parted.named_parameters() if isinstance(p, TiledTensor)}
    assert tiled == (
        {"up.weight", "up.bias", "down.weight", "down.bias", "extra.weight", "extra.bias"} if several else set()
    )
    parted.verify(batches()[0], loss_fn=lambda result: result[0].square().sum())
    parted.verify(batches()[0], more=True, loss_fn=lambda result: result[0].square().sum())


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with process_group(rank, world, folder):
        for name, layout in zip(OPTIMIZERS, LAYOUTS, strict=True):
            parted = gp.partition(net(), world, strategy=cut_by_columns(world, layout))
            torch.save(train(parted, name), f"{folder}/{name}{rank}.pt")
            for more in (False, True):
                parted.verify(batches()[0], more=more, loss_fn=lambda result: result[0].square().sum())
            tiles = parted.up.weight.local_tiles
            assert len(tiles) == 1 and tiles[0].numel() < parted.up.weight.numel()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_as_the_plain_model_and_as_threads(world: int) -> None:
    folder = run_processes(_process, world)
    for name, layout in zip(OPTIMIZERS, LAYOUTS, strict=True):
        threads = train(gp.partition(net(), world, strategy=cut_by_columns(world, layout)), name)
        agree(threads, train(net(), name))
        for rank in range(world):
            found = torch.load(folder / f"{name}{rank}.pt")
            agree(found, threads)
