"""What TensorFlow, MXNet and DistBelief do with one value, one worker, one label and one neuron, on real steps.

Each test's name begins with the requirement it holds.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import graphpart as gp
from graphpart.errors import ArgumentError, GraphError, PlanError
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement, Tile
from graphpart.ir.program import Bridge
from graphpart.ir.region import Intervals
from graphpart.runtime.executors.post import LocalMailbox
from tests.helpers.placements import along, place, result_axis, sent, spans

pytestmark = pytest.mark.sampled(6)


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest value expected."""
    return float((found - expected).detach().abs().max()) / max(float(expected.detach().abs().max()), floor)


def compare(parted: gp.PartitionedModule, plain: nn.Module, args: Sequence[Tensor], tolerance: float) -> None:
    """One step of both: results and gradients may differ by a relative tolerance, and no gradient may be missing."""
    out, expected = parted(*args), plain(*args)
    assert relative(out, expected) <= tolerance
    out.square().mean().backward()
    expected.square().mean().backward()
    found = parted.grad_dict()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, gradient in found.items() if gradient is not None}
    # A gradient that is zero but for rounding (of a bias before a BatchNorm) has no scale of its own.
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert relative(found[name], gradient, floor) <= tolerance, name


# --- T1, X2: one message per value and destination -----------------------------------------------------------------


class Fan(nn.Module):
    """One value with many readers: three on device 1, two on device 2, and one where it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Linear(4, 6)
        self.one = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.two = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.near = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.source(x)
        return (
            self.one[0](y) + self.one[1](y) * self.one[2](y),
            self.two[0](y) * self.two[1](y),
            self.near(y),
        )


FAN = {"source": 0, "near": 0, "one": 1, "two": 2}


def fan_placement(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
    """Modules as in :data:`FAN`; sums and products where their operands are made."""
    tiles: dict[str, tuple[Tile, ...]] = {}
    for op in graph.operators:
        known = next((device for name, device in FAN.items() if op.module_path.startswith(name)), None)
        tiles[op.name] = tiles[op.operands[0]] if known is None else (Tile(known),)
    return place(graph, tiles)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_T1_X2_a_value_is_sent_once_to_each_destination_however_many_read_it(num_microbatches: int) -> None:
    torch.manual_seed(0)
    parted = gp.partition(Fan(), 3, strategy=fan_placement, num_microbatches=num_microbatches)
    out = parted(torch.randn(9, 4))
    assert sent(parted) == (2 * num_microbatches, 2 * 9 * 6 * 4)
    sum(piece.square().sum() for piece in out).backward()
    assert sent(parted) == (4 * num_microbatches, 4 * 9 * 6 * 4)  # gradients are added up before they go back
    assert parted.last_step is not None
    assert {d: c.num_messages for d, c in parted.last_step.counters.items()} == {
        0: 2 * num_microbatches, 1: num_microbatches, 2: num_microbatches
    }  # fmt: skip


class Late(nn.Module):
    """A value whose second reader on the same device waits for another device."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.near, self.far, self.late = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.source(x)
        return self.late(y * self.far(self.near(y)))


def test_T1_a_value_is_kept_for_later_consumers_on_its_destination() -> None:
    """Source to near and to the product, near to far, far to the product: three messages, and their gradients."""
    torch.manual_seed(0)
    model, x = Late(), torch.randn(9, 6)
    parted = gp.partition(model, 3, strategy={"source": 0, "far": 2, "*": 1})
    compare(parted, copy.deepcopy(model), [x], 1e-5)
    assert sent(parted) == (6, 6 * 9 * 6 * 4)
    readers = [s for s in parted.plan.program.segments if s.device == 1 and "linear" in s.inputs]
    assert len(readers) == 2  # in two pieces of work, before and after device 2's


class Tied(nn.Module):
    """One weight with three readers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6, False), nn.Linear(6, 6, False), nn.Linear(6, 6, False)
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_T1_a_parameter_is_sent_once_a_step_however_many_operators_and_microbatches_read_it() -> None:
    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        return Placement({op.name: (Tile(1),) for op in graph.operators}, {graph.parameters[0].value.name: 0})

    torch.manual_seed(0)
    parted = gp.partition(Tied(), 2, strategy=strategy, num_microbatches=4)
    out = parted(torch.randn(8, 6))
    assert sent(parted) == (1, 6 * 6 * 4)
    out.sum().backward()
    assert sent(parted) == (2, 2 * 6 * 6 * 4)


def test_T1_readers_of_different_parts_share_one_message_of_all_that_they_need() -> None:
    """Neurons 1, 2 and 2, 3, 5 are needed on device 1: neurons 1, 2, 3, 5 are sent."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.source(x)
            return torch.tanh(y)[:, 1:3], torch.sigmoid(y)[:, 2:6]

    def strategy(graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        tiles: dict[str, tuple[Tile, ...]] = {"linear": (Tile(0),)}
        kept = {"tanh": [1, 2], "sigmoid": [2, 3, 5]}
        for op in graph.operators[1:]:
            own = next((Intervals.indices(part) for name, part in kept.items() if name in op.target), None)
            if own is not None:
                rest = Intervals.full(6) - own
                tiles[op.name] = along(result_axis(op, 1), [own, rest], [1, 0])
            else:
                tiles[op.name] = (Tile(0),)
        return place(graph, tiles)

    torch.manual_seed(0)
    parted = gp.partition(Parts(), 2, strategy=strategy)
    parted(torch.randn(5, 4))
    assert parted.last_step is not None
    first = parted.last_step.counters[0]
    assert (first.num_messages, first.message_bytes) == (1, 5 * 4 * 4)


@pytest.mark.parametrize(("devices", "on"), [(1, 0), (3, 0), (3, 2)])
def test_X2_on_one_device_the_graph_is_unchanged(devices: int, on: int) -> None:
    """One segment, of just the graph's operators in their order, with their arguments, and no message."""
    torch.manual_seed(0)
    parted = gp.partition(Fan(), devices, strategy={"*": on})
    parted.record = True
    sum(piece.square().sum() for piece in parted(torch.randn(9, 4))).backward()
    assert sent(parted) == (0, 0)
    assert [(event.device, event.kind) for event in parted.timeline().events] == [(on, "F"), (on, "B")]
    (segment,) = parted.plan.program.segments
    ran = [(step.operator, step.target, step.args, dict(step.kwargs)) for step in segment.steps]
    assert ran == [(op.name, op.target, op.args, dict(op.kwargs)) for op in parted.plan.graph.operators]


# --- T3: send and receive share one key ----------------------------------------------------------------------------


def test_T3_send_and_receive_share_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message that is sent is received, under its own tag, by the worker that it was for."""
    calls: list[tuple[str, str, int, int, int]] = []
    lock = threading.Lock()

    def noted(kind: str, original: Any) -> Any:
        def call(self: LocalMailbox, bridge: Bridge, *args: Any) -> Any:
            with lock:
                calls.append((kind, threading.current_thread().name, bridge.tag, bridge.source, bridge.destination))
            return original(self, bridge, *args)

        return call

    torch.manual_seed(0)
    parted = gp.partition(Fan(), 3, strategy=fan_placement, num_microbatches=3)
    parted.prepare(torch.randn(9, 4))
    monkeypatch.setattr(LocalMailbox, "send", noted("send", LocalMailbox.send))
    monkeypatch.setattr(LocalMailbox, "receive", noted("receive", LocalMailbox.receive))
    sum(piece.square().sum() for piece in parted(torch.randn(9, 4))).backward()
    sends = {tag: (source, to) for kind, _, tag, source, to in calls if kind == "send"}
    receives = {tag: (source, to) for kind, _, tag, source, to in calls if kind == "receive"}
    assert len(calls) == 2 * len(sends) == 2 * sent(parted)[0] == 2 * 12  # no tag is used twice
    assert sends == receives
    workers: dict[int, set[str]] = {}
    for kind, thread, _, source, to in calls:
        workers.setdefault(source if kind == "send" else to, set()).add(thread)
    assert all(len(threads) == 1 for threads in workers.values()) and len(workers) == 3


# --- T5: a missing input is refused --------------------------------------------------------------------------------


def test_T5_an_operator_without_its_input_is_refused_by_name(tmp_path: Path) -> None:
    x, y = Value("x", (2,), "float32"), Value("y", (2,), "float32")
    source = Source(x, "input", ("x",))
    lost = Operator("relu", "aten.relu.default", (Ref("gone"),), results=(y,))
    with pytest.raises(GraphError, match=r"relu.* reads 'gone', which nothing before it makes"):
        Graph("Net", (source,), (lost,), (Ref("y"),))
    with pytest.raises(GraphError, match="the output 'y' is made by no operator"):
        Graph("Net", (source,), (), (Ref("y"),))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    path = gp.plan(model, 2, (torch.randn(2, 4),), strategy={"0": 0, "*": 1}).save(tmp_path / "plan.json")
    saved = json.loads(path.read_text())
    del saved["graph"]["operators"][1], saved["placement"]["tiles"]["relu"]
    path.write_text(json.dumps(saved))
    with pytest.raises(PlanError, match=r"linear_1.* reads 'relu', which nothing before it makes"):
        gp.partition(model, plan=path)


def test_T5_a_call_without_an_argument_is_refused_by_name() -> None:
    parted = gp.partition(nn.Bilinear(3, 4, 5), 2, strategy={"*": 1})
    parted(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises((TypeError, gp.GraphpartError), match="input2"):
        parted(torch.randn(2, 3))


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
    ids, embedded, partial = 24 * 8, 24 * 8 * 4, 24 * 8 * 4  # to the hidden layer on device 0, and its partial sum back
    scalar = plain_forward[1] - ids - embedded - partial
    assert 4 <= scalar <= 4 * num_microbatches
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
    assert parted.plan.choices.wire_dtype == "bfloat16"
    parted(*args)
    assert sent(parted) == (narrow.program.num_messages, narrow.program.message_bytes)


def test_T4_refuses_what_is_no_wire_dtype() -> None:
    for wrong in ("int8", "float32", torch.bfloat16):
        with pytest.raises(ArgumentError, match=r"wire_dtype=.*'bfloat16' or 'float16'"):
            gp.partition(Cast(), 2, wire_dtype=wrong)
    with pytest.raises(ArgumentError, match="wire_dtype"):
        gp.partition(Cast(), 2, plan="plan.json", wire_dtype="bfloat16")


# --- X1: group labels ----------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """An embedding, two recurrent layers and a decoder; what is between them has no name."""

    def __init__(self, layers: int = 2, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.decoder = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * 0.5
        for layer in self.layers:
            x = x + torch.tanh(layer(x)[0])
        return self.decoder(x)


def test_X1_labels_pin_named_parts_and_the_rest_is_placed_automatically() -> None:
    """MXNet's ``group2ctx``: labels to devices, by number or by name."""
    torch.manual_seed(0)
    model, ids = Labelled(), torch.randint(0, 11, (3, 5))
    plain = copy.deepcopy(model)
    labels = {"embed": 0, "layers.0": "cpu:2", "layers.1": gp.pin(1), "decoder": 0}
    parted = gp.partition(model, 3, strategy=labels)
    parted.record = True
    compare(parted, plain, [ids], 1e-6)
    segment, graph = parted.plan.program.segment, parted.plan.graph
    ran: dict[str, set[int]] = {}
    for event in parted.timeline().events:
        for step in segment[event.name].steps if event.kind == "F" else ():
            if not step.is_bridge:
                ran.setdefault(step.operator, set()).add(event.device)
    assert set(ran) == set(graph.operator) and all(len(devices) == 1 for devices in ran.values())
    expected = {"embed": {0}, "layers.0": {2}, "layers.1": {1}, "decoder": {0}}
    labelled = [op for op in graph.operators if op.module_path]
    assert all(ran[op.name] == expected[op.module_path] for op in labelled)
    near = {
        op.name: set().union(*(ran[graph.producer[n].name] for n in op.operands if n in graph.producer))
        for op in graph.operators
    }
    others = [op.name for op in graph.operators if not op.module_path]
    assert len(others) >= 3 and all(ran[name] <= near[name] for name in others)  # beside a neighbour
    homes = {source.names[0]: parted.plan.placement.homes[source.value.name] for source in graph.parameters}
    assert all({device} == expected[".".join(name.split(".")[:-1])] for name, device in homes.items())


# --- X5: split and unsplit agree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_X5_a_deep_lstm_split_by_layers_agrees_with_the_unsplit_one(dtype: torch.dtype, num_microbatches: int) -> None:
    """Embedding and first layer first, decoder last, as in MXNet's model-parallel LSTM."""
    torch.manual_seed(0)
    model, ids = Labelled(layers=4, width=8).to(dtype), torch.randint(0, 11, (6, 7))
    plain = copy.deepcopy(model)
    labels = {"embed": 0, **{f"layers.{i}": i for i in range(4)}, "decoder": 3}
    parted = gp.partition(model, 4, strategy=labels, num_microbatches=num_microbatches)
    compare(parted, plain, [ids], 1e-6)
    assert parted.last_step is not None
    assert all(parted.last_step.counters[device].num_messages > 0 for device in range(4))


class Images(nn.Module):
    """Convolutions, BatchNorm, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.classify = nn.Linear(6 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.classify(self.second(x).flatten(1))


class Attention(nn.Module):
    """A transformer layer without dropout, heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (w(y).unflatten(-1, (3, 4)).transpose(1, 2) for w in self.qkv)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("make", "shape", "strategy"),
    [
        (Images, (5, 3, 8, 8), {"first": gp.split(0, [0, 1, 2])}),
        (Images, (5, 3, 8, 8), {"first": gp.split(1, [2, 0]), "second": gp.split(3, {0: 1, 1: 2}), "classify": 2}),
        (Images, (5, 3, 8, 8), {"first": gp.split(2, [0, 1, 2]), "classify": gp.split("k", [0, 1])}),
        (Attention, (2, 5, 12), {"qkv.*": gp.split("n", [0, 1, 2]), "up": gp.split("n", {0: 2, 1: 1})}),
        (Attention, (2, 5, 12), {"norm": gp.split(1, [0, 1, 2])}),
        (Attention, (2, 5, 12), {"norm": 0, "qkv.*": 1, "out": 2, "up": 0, "down": 1}),
    ],
)  # fmt: skip
def test_X5_other_models_and_splits_agree_with_the_unsplit_ones(
    make: type[nn.Module], shape: tuple[int, ...], strategy: Any
) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    parted = gp.partition(model, 3, strategy=strategy)
    compare(parted, copy.deepcopy(model), [x], 1e-6)
    assert parted.last_step is not None and parted.last_step.num_messages > 0


# --- D1: any map from neurons to devices -----------------------------------------------------------------------------


class ByNeuron:
    """A strategy: every layer's neurons on the devices that a map says, reading only neurons that they have edges from.

    Args:
        maps: per layer, the device of every neuron; the first is of the input.
        masks: per layer, which edges there are, ``[neuron, neuron before]``.
    """

    def __init__(self, maps: Sequence[Sequence[int]], masks: Sequence[Tensor]) -> None:
        self.maps, self.masks = maps, masks

    def __call__(self, graph: Graph, cluster: gp.Cluster, **_: Any) -> Placement:
        tiles: dict[str, tuple[Tile, ...]] = {}
        for op in graph.operators:
            layer = int(op.module_path or 0) // 2
            own = [
                Intervals.indices(i for i, d in enumerate(self.maps[layer + 1]) if d == device) for device in range(3)
            ]
            if op.target == "aten.linear.default":
                reads = [
                    Intervals.indices(self.masks[layer][list(part)].any(0).nonzero().flatten().tolist()) for part in own
                ]
                tiles[op.name] = tuple(Tile(d, {"n": own[d]}, {"k": reads[d]}) for d in range(3) if own[d])
            else:  # an activation, or a weight times its mask
                axis = result_axis(op, 0 if op.target == "aten.mul.Tensor" else 1)
                tiles[op.name] = tuple(Tile(d, {axis: own[d]}) for d in range(3) if own[d])
        return place(graph, tiles)


def masked_layers(sizes: Sequence[int], masks: Sequence[Tensor]) -> nn.Module:
    """Dense layers, of whose edges masks keep some."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    for layer, mask in zip(layers, masks, strict=True):
        prune.custom_from_mask(layer, "weight", mask)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_D1_a_neurons_value_crosses_to_each_destination_once_however_many_edges_go_there(
    seed: int, density: float
) -> None:
    """Random maps and random edges: what crosses is one number a sample for each neuron and device it has edges to."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes, batch = [5, 14, 11, 4], 6
    maps = [[rng.randrange(3) for _ in range(size)] for size in sizes[:-1]] + [[2] * sizes[-1]]
    masks = [(torch.rand(b, a) < density) for a, b in itertools.pairwise(sizes)]
    for mask in masks:  # every neuron has an edge to it and one from it
        after, before = mask.shape
        mask[torch.arange(after), torch.randint(0, before, (after,))] = True
        mask[torch.randint(0, after, (before,)), torch.arange(before)] = True
    model, plain = masked_layers(sizes, masks), masked_layers(sizes, masks)
    parted = gp.partition(model, 3, strategy=ByNeuron(maps, masks))
    compare(parted, plain, [torch.randn(batch, sizes[0], dtype=torch.float64)], 1e-10)
    crossing: Counter[tuple[int, int, int]] = Counter()  # layer, source, destination
    for layer in (1, 2):
        for neuron, source in enumerate(maps[layer]):
            readers = masks[layer][:, neuron].nonzero().flatten().tolist()
            for destination in {maps[layer + 1][reader] for reader in readers} - {source}:
                crossing[layer, source, destination] += 1
    assert sent(parted) == (2 * len(crossing), 2 * sum(crossing.values()) * batch * 8)
    edges = sum(maps[i][a] != maps[i + 1][b] for i in (1, 2) for b, a in masks[i].nonzero().tolist())
    assert density < 0.3 or sum(crossing.values()) < edges  # edges that share a message
