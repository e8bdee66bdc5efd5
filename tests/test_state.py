"""Parameters whose home is cut: where their parts lie, how they are read, and how gradients are put together."""

import gc
import weakref

import pytest
import torch
from torch import nn

from graphpart.errors import ParameterError
from graphpart.ir.graph import Graph
from graphpart.ir.placement import Placement, Shard
from graphpart.ir.region import Intervals, Region
from graphpart.runtime.parameters.model_state import ModelState
from graphpart.runtime.parameters.tiled_tensor import TiledTensor
from graphpart.trace import trace

ONE_CPU = (torch.device("cpu"), torch.device("cpu"))
TWO_CPUS = (torch.device("cpu"), torch.device("cpu:0"))  # the same memory, but to torch another device


class Pair(nn.Module):
    """Two layers, the second tied to an unused name, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.down.twin = self.down.weight
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


def region(*dims: object) -> Region:
    """A region from one set for each dimension: ``(start, stop)`` or a list of indices."""
    return Region(tuple(Intervals.span(*dim) if isinstance(dim, tuple) else Intervals.indices(dim) for dim in dims))


ODD, EVEN = region([1, 3, 5], (0, 4)), region([0, 2, 4], (0, 4))
LEFT, RIGHT = region((0, 4), (0, 2)), region((0, 4), (2, 6))
SHARDS = {
    "up.weight": (Shard(0, EVEN), Shard(1, ODD)),
    "down.weight": (Shard(1, LEFT), Shard(0, RIGHT)),
}


def homed(devices: tuple[torch.device, ...]) -> tuple[ModelState, Graph, Placement]:
    torch.manual_seed(0)
    module = Pair()
    state = ModelState(module, devices)
    with state.shapes_only():
        graph = trace(module, (torch.randn(3, 4),), {}).graph
    shards = {s.value.name: SHARDS[s.names[0]] for s in graph.parameters if s.names[0] in SHARDS}
    homes = {s.value.name: 1 for s in graph.sources if s.kind != "input" and s.value.name not in shards}
    placement = Placement({}, homes, shards)
    state.rehome(graph, placement)
    return state, graph, placement


def value_name(graph: Graph, name: str) -> str:
    return next(s.value.name for s in graph.sources if name in s.names)


def test_parts_on_one_torch_device_stay_a_plain_tensor_and_are_views_of_it() -> None:
    state, graph, placement = homed(ONE_CPU)
    up, down = state.module.up.weight, state.module.down.weight
    assert type(up) is type(down) is nn.Parameter
    part = state.read(value_name(graph, "down.weight"), RIGHT)
    assert torch.equal(part, down[:, 2:]) and part.untyped_storage()._cdata == down.untyped_storage()._cdata
    assert not part.requires_grad
    assert torch.equal(state.read(value_name(graph, "up.weight"), ODD), up[1::2])
    whole = state.read(value_name(graph, "up.bias"), Region.full((6,)))
    assert whole.data_ptr() == state.module.up.bias.data_ptr() and not whole.requires_grad
    before = {name: t.data_ptr() for name, t in state.module.state_dict().items()}
    state.rehome(graph, placement)
    assert before == {name: t.data_ptr() for name, t in state.module.state_dict().items()}


def test_gradients_of_a_plain_parameter() -> None:
    state, graph, _ = homed(ONE_CPU)
    name, bias = value_name(graph, "up.weight"), value_name(graph, "up.bias")
    whole = torch.randn(6)
    assert state.gradient(bias, {Region.full((6,)): whole}) is whole
    odd, even = torch.randn(3, 4), torch.randn(3, 4)
    found = state.gradient(name, {ODD: odd, EVEN: even})
    assert type(found) is torch.Tensor and not found.requires_grad
    assert torch.equal(found[1::2], odd) and torch.equal(found[::2], even)
    found = state.gradient(name, {ODD: odd})  # nothing reads the even rows
    assert torch.equal(found[1::2], odd) and not found[::2].any()


def test_parts_on_several_torch_devices_are_tiles() -> None:
    state, graph, placement = homed(TWO_CPUS)
    up, down = state.module.up.weight, state.module.down.weight
    assert isinstance(up, TiledTensor) and isinstance(down, TiledTensor) and isinstance(up, nn.Parameter)
    assert type(state.module.up.bias) is nn.Parameter
    assert state.module.down.twin is down and dict(state.module.named_parameters())["up.weight"] is up
    assert [tile.device for tile in up.tiling.tiles] == ["cpu", "cpu:0"]
    torch.manual_seed(0)
    plain = Pair()
    assert torch.equal(state.read(value_name(graph, "up.weight"), ODD), plain.up.weight[1::2])
    assert state.read(value_name(graph, "down.weight"), LEFT) is down.local_tiles[0]
    tiles = [*up.local_tiles, *down.local_tiles]
    state.rehome(graph, placement)
    assert all(a is b for a, b in zip(tiles, [*up.local_tiles, *down.local_tiles], strict=True))
    left = torch.randn(4, 2)
    found = state.gradient(value_name(graph, "down.weight"), {LEFT: left})
    assert isinstance(found, TiledTensor) and found.lies_as(down) and found.local_tiles[0] is left
    assert torch.equal(found.full_tensor(), torch.cat([left, torch.zeros(4, 4)], 1))


@pytest.mark.parametrize("devices", [ONE_CPU, TWO_CPUS])
def test_state_speaks_whole_values_in_original_names(devices: tuple[torch.device, ...]) -> None:
    state, graph, _ = homed(devices)
    torch.manual_seed(0)
    expected = Pair().state_dict()
    for prefix in ("", "model."):
        found = state.state_dict(prefix=prefix)
        assert list(found) == [prefix + name for name in expected]
        assert all(torch.equal(found[prefix + name], value) for name, value in expected.items())
        assert all(type(value) is torch.Tensor for value in found.values())
    other = {name: torch.randn_like(value) for name, value in expected.items()}
    other["down.twin"] = other["down.weight"]
    state.load_state_dict(other)
    assert all(torch.equal(value, other[name]) for name, value in state.state_dict().items())
    assert torch.equal(state.read(value_name(graph, "down.weight"), LEFT), other["down.weight"][:, :2])
    whole = torch.randn(6, 4)
    state.module.up.weight.grad = state.gradient(value_name(graph, "up.weight"), {ODD: whole[1::2], EVEN: whole[::2]})
    grads = state.grad_dict()
    assert torch.equal(grads.pop("up.weight"), whole) and list(grads.values()) == [None, None]


def test_a_gradient_from_before_follows_the_tiles() -> None:
    torch.manual_seed(0)
    module = Pair()
    state = ModelState(module, TWO_CPUS)
    module(torch.randn(3, 4)).sum().backward()
    whole = module.up.weight.grad.clone()
    with state.shapes_only():
        graph = trace(module, (torch.randn(3, 4),), {}).graph
    name = value_name(graph, "up.weight")
    state.rehome(graph, Placement({}, {}, {name: SHARDS["up.weight"]}))
    assert isinstance(module.up.weight.grad, TiledTensor)
    assert torch.equal(module.up.weight.grad.full_tensor(), whole)


def test_a_home_is_given_once() -> None:
    for devices in (ONE_CPU, TWO_CPUS):
        state, graph, placement = homed(devices)
        name = value_name(graph, "up.weight")
        swapped = {**placement.shards, name: (Shard(1, EVEN), Shard(0, ODD))}
        with pytest.raises(ParameterError, match=r"up.weight.*device 0 \[0,2,4, 0:4\], device 1.*wants it on device 1"):
            state.rehome(graph, Placement({}, placement.homes, swapped))


def test_tracing_stand_ins_take_no_memory_and_leave_nothing_behind() -> None:
    module = Pair()
    state = ModelState(module, TWO_CPUS)
    tensors = list(module.parameters())
    with state.shapes_only():
        stand_ins = list(module.parameters())
        assert all(s is not p and s.shape == p.shape for s, p in zip(stand_ins, tensors, strict=True))
        assert all(s.untyped_storage().nbytes() == 0 for s in stand_ins)
        assert module.down.twin is module.down.weight
        trace(module, (torch.randn(3, 4),), {})
    assert list(module.parameters()) == tensors and module.down.twin is module.down.weight
    gc.collect()
    assert not any(weakref.getweakrefs(p) for p in tensors)
    with ModelState(module, ONE_CPU).shapes_only():  # these can never become tiles
        assert list(module.parameters()) == tensors
