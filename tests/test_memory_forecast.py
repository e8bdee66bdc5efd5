"""The forecast of saved activations against what autograd keeps in the workers' segments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graphpart as gp
from graphpart.ir.graph import Graph
from graphpart.ir.program import Segment
from graphpart.ir.region import Intervals
from graphpart.runtime.device.worker import DeviceRun
from tests.test_cut_homes import cut_by_columns

TOLERANCE = 0.05

Example = tuple[nn.Module, Mapping[str, Tensor]]


def gpt2(dropout: float) -> Example:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=301, n_positions=64, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    ids = torch.randint(301, (4, 32))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids.clone()}


def bert(dropout: float) -> Example:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=301,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    ids = torch.randint(301, (4, 32))
    return transformers.BertForMaskedLM(config), {"input_ids": ids, "labels": ids.clone()}


def resnet(_: float) -> Example:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    images = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(10, (4,))}
    return transformers.ResNetForImageClassification(config), images


@contextmanager
def saved_storages() -> Iterator[Mapping[int, dict[int, Tensor]]]:
    """Per device, every storage that its segments save for backward, by address."""
    found: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)
    forward = DeviceRun._forward

    def noted(self: DeviceRun, segment: Segment) -> None:
        def pack(tensor: Tensor) -> Tensor:
            found[self.code.device_index][tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(self, segment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceRun, "_forward", noted)
        yield found


def measured_bytes(parted: Any, inputs: Mapping[str, Tensor]) -> dict[int, int]:
    """Per device, bytes of the unique storages kept for backward; parameters and buffers aside."""
    with saved_storages() as found:
        parted(**inputs)
    own = {t.untyped_storage()._cdata for t in (*parted.parameters(), *parted.buffers())}
    return {
        device: sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
        for device, storages in found.items()
    }


@pytest.mark.sampled(16)
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("make", [gpt2, bert, resnet])
def test_saved_activations_are_forecast(make: Any, dropout: float, num_devices: int, num_microbatches: int) -> None:
    torch.manual_seed(0)
    model, inputs = make(dropout)
    parted = gp.partition(model.train(), num_devices, strategy="layer", num_microbatches=num_microbatches)
    measured = measured_bytes(parted, inputs)
    forecast = parted.plan.memory.devices
    assert len(measured) == num_devices
    for device, size_bytes in measured.items():
        assert forecast[device].saved_bytes == pytest.approx(size_bytes, rel=TOLERANCE)


def test_the_mask_of_dropout_takes_a_byte_an_element() -> None:
    parted = gp.partition(nn.Sequential(nn.Dropout(0.5), nn.Tanh()).train(), 1, strategy="single")
    measured = measured_bytes(parted, {"input": torch.randn(8, 1000, requires_grad=True)})
    assert measured[0] == 8000 * (1 + 4)  # the mask, and tanh's result
    assert parted.plan.memory.devices[0].saved_bytes == measured[0]


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_memory_rises_and_falls_over_a_step(num_microbatches: int) -> None:
    model, inputs = gpt2(0.1)
    plan = gp.plan(model.train(), 2, (), inputs, strategy="layer", num_microbatches=num_microbatches)
    for curve, whole in zip(plan.memory_over_time, plan.memory.devices, strict=True):
        first, last = curve.moments[0].memory, curve.moments[-1].memory
        assert first.saved_bytes == first.gradients_bytes == first.bridges_bytes == 0
        assert last.saved_bytes == last.bridges_bytes == 0
        assert max(m.memory.saved_bytes for m in curve.moments) == pytest.approx(whole.saved_bytes, rel=0.01)
        assert last.gradients_bytes <= whole.gradients_bytes
        assert all(m.memory.optimizer_bytes == whole.optimizer_bytes for m in curve.moments)
        times = [m.time_s for m in curve.moments]
        assert times == sorted(set(times)) and times[-1] <= plan.timeline.makespan_s
        assert curve.peak.memory.total_bytes <= whole.total_bytes + max(m.memory.bridges_bytes for m in curve.moments)
    assert max(m.memory.bridges_bytes for m in plan.memory_over_time[1].moments) > 0


@pytest.mark.slow
def test_memory_follows_the_schedule() -> None:
    model, inputs = gpt2(0.0)
    inputs = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    plans = {
        name: gp.plan(model.train(), 2, (), inputs, strategy="layer", num_microbatches=8, schedule=name)
        for name in ("gpipe", "1f1b", "zero-bubble")
    }
    peaks = {
        name: [max(m.memory.saved_bytes for m in curve.moments) for curve in plan.memory_over_time]
        for name, plan in plans.items()
    }
    for device in (0, 1):
        in_flight = (2, 1)[device]  # of eight microbatches, at most as many as there are stages left (Narayanan 2019)
        assert peaks["1f1b"][device] == pytest.approx(peaks["gpipe"][device] * in_flight / 8, rel=0.1)
        assert peaks["zero-bubble"][device] >= peaks["1f1b"][device]
    for plan in plans.values():
        for curve in plan.memory_over_time:
            assert max(m.memory.gradients_bytes for m in curve.moments) > 0
            assert curve.moments[-1].memory.gradients_bytes == curve.moments[-1].memory.saved_bytes == 0
    assert [t.peak_memory_bytes for t in map(gp.simulate, plans.values())] == [
        tuple(curve.peak.memory.total_bytes for curve in plan.memory_over_time) for plan in plans.values()
    ]


def test_what_gradients_of_weights_need_is_held_for_them() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(16, 8)
    plan = gp.plan(model, 1, (x,), strategy="single", schedule="zero-bubble", num_microbatches=2)
    ends = {(e.kind, e.microbatch): e.end_s for e in plan.timeline.events if e.is_work}
    held = {m.time_s: m.memory.saved_bytes for m in plan.memory_over_time[0].moments}
    # A microbatch of 8 samples keeps x (as it is: an input), tanh's result, and, from its B to its W, the gradients of
    # both products' results; tanh's result is the second product's other factor.
    before, after = held[ends["B", 1]], held[ends["W", 1]]
    assert after < before and before - after >= 8 * (32 + 32 + 4) * 4


def test_saved_activations_of_tiles_are_forecast() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 32))
    parted = gp.partition(model, 2, strategy=cut_by_columns(2, "runs"))
    measured = measured_bytes(parted, {"input": torch.randn(50, 64)})
    forecast = parted.plan.memory.devices
    for device, size_bytes in measured.items():
        assert forecast[device].saved_bytes == pytest.approx(size_bytes, rel=TOLERANCE)
    for curve, whole in zip(parted.plan.memory_over_time, forecast, strict=True):
        assert max(m.memory.saved_bytes for m in curve.moments) == pytest.approx(whole.saved_bytes, rel=0.01)
        assert curve.moments[-1].memory.gradients_bytes <= whole.gradients_bytes


@pytest.mark.parametrize(("axis", "most"), [("b", 1 + TOLERANCE), ("c", 2.0)])
def test_saved_activations_of_a_rewritten_loss_are_forecast(axis: str, most: float) -> None:
    """The samples, or the classes, of a cross-entropy that is computed in parts: over classes it keeps the scores
    alone, and the forecast is that of the whole one, which keeps probabilities too.
    """

    class Classifier(nn.Module):
        def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(scores.tanh(), labels)

    def cut(graph: Graph, cluster: gp.Cluster, **options: object) -> gp.Placement:
        tiles = {}
        for op in graph.operators:
            assert op.rule is not None
            dim = op.rule.operands[0][0 if axis == "b" else 1]
            assert isinstance(dim, tuple)
            half = op.rule.extents[dim[0]] // 2
            runs = Intervals.span(0, half), Intervals.span(half, 2 * half)
            tiles[op.name] = tuple(gp.Tile(device, {dim[0]: run}) for device, run in enumerate(runs))
        return gp.Placement(tiles)

    parted = gp.partition(Classifier(), 2, strategy=cut)
    scores = torch.randn(64, 40, requires_grad=True)
    measured = measured_bytes(parted, {"scores": scores, "labels": torch.randint(40, (64,))})
    forecast = parted.plan.memory.devices
    for device, size_bytes in measured.items():
        assert (1 - TOLERANCE) * size_bytes <= forecast[device].saved_bytes <= most * size_bytes
    for curve, whole in zip(parted.plan.memory_over_time, forecast, strict=True):
        assert max(m.memory.saved_bytes for m in curve.moments) == pytest.approx(whole.saved_bytes, rel=0.01)
        assert curve.moments[-1].memory.saved_bytes == 0
