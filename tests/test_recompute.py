"""Groups of operators that run again for their backward: the same bits, less memory, as forecast."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpart as gp
from graphpart.cost import forecast_memory, operator_works
from graphpart.cost.memory.recompute import rerun_s
from graphpart.errors import ArgumentError, ExecutionError, OutOfMemoryError
from graphpart.ir.program import Program
from graphpart.strategies import Terms
from graphpart.strategies.memory.recompute_blocks import Modules, modules_of
from graphpart.strategies.memory.recompute_groups import groups_by_pattern
from graphpart.strategies.memory.recompute_milp import least_recomputation
from graphpart.trace import trace
from tests.helpers.saved_meter import metered

pytestmark = pytest.mark.sampled(16)

BLOCKS = ["transformer.h.*"]

TOLERANCE = 0.1
"""Of peak memory, measured against forecast."""


def gpt2(num_layers: int = 2, dropout: float = 0.1) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=num_layers, n_head=4, vocab_size=301, n_positions=64, use_cache=False, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(301, (8, 32))
    return transformers.GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids.clone()}


def step(
    model: nn.Module, inputs: Mapping[str, Tensor], devices: Any, **options: Any
) -> tuple[Any, Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """The partitioned model after one training step: its loss, gradients and buffers."""
    parted = gp.partition(copy.deepcopy(model), devices, **options)
    torch.manual_seed(1)
    result = parted(**inputs)
    loss = result.loss if hasattr(result, "loss") else result.square().mean()
    loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parted.named_parameters()}
    return parted, loss.detach(), gradients, {name: b.clone() for name, b in parted.named_buffers()}


def check_same_bits(
    model: nn.Module, inputs: Mapping[str, Tensor], devices: Any, *, roomy: Any = None, **options: Any
) -> Any:
    """A step with recomputation gives the bits of one without, on devices with room; returns the partitioned model."""
    _, loss, gradients, buffers = step(model, inputs, roomy or devices, **{**options, "recompute": "none"})
    parted, our_loss, our_gradients, our_buffers = step(model, inputs, devices, **options)
    assert torch.equal(our_loss, loss)
    for name, gradient in gradients.items():
        ours = our_gradients[name]
        assert ours is gradient if gradient is None or ours is None else torch.equal(ours, gradient), name
    for name, buffer in buffers.items():
        assert torch.equal(our_buffers[name], buffer), name
    return parted


def recomputed_segments(program: Program) -> list[str]:
    return [segment.name for segment in program.segments if segment.recompute]


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize(
    ("strategy", "num_devices"),
    [("single", 1), ("layer", 3), ("batch", 2), ("feature", 3)],
)
def test_the_same_bits_with_dropout(strategy: str, num_devices: int, num_microbatches: int) -> None:
    model, inputs = gpt2()
    options = {"strategy": strategy, "num_microbatches": num_microbatches, "recompute": BLOCKS}
    parted = check_same_bits(model, inputs, num_devices, **options)
    assert len(recomputed_segments(parted.plan.program)) >= 2 * num_microbatches


class Normed(nn.Module):
    """Convolutions with BatchNorm, and a buffer whose old value takes part in the result."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.scaled = Scaled()

    def forward(self, input: Tensor) -> Tensor:
        return self.scaled(self.second(self.first(input))).mean((2, 3))


class Scaled(nn.Module):
    """Scales by a running average, which it updates afterwards."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((1,), 2.0))

    def forward(self, input: Tensor) -> Tensor:
        made = input * torch.tanh(self.average.clone() * input)
        with torch.no_grad():
            self.average.copy_(0.9 * self.average + 0.1 * input.mean())
        return made


@pytest.mark.parametrize(("strategy", "num_microbatches"), [("layer", 1), ("layer", 2), ("batch", 1)])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_buffers_are_updated_once(strategy: str, num_devices: int, num_microbatches: int) -> None:
    torch.manual_seed(0)
    model, inputs = Normed().train(), {"input": torch.randn(8, 3, 12, 12)}
    options = {"strategy": strategy, "num_microbatches": num_microbatches, "recompute": ["first", "second", "scaled"]}
    parted = check_same_bits(model, inputs, num_devices, **options)
    assert recomputed_segments(parted.plan.program)
    assert int(parted.module.first[1].num_batches_tracked) == 1


def test_a_source_changed_before_the_backward_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    parted = gp.partition(model, 1, recompute=["*"])
    result = parted(torch.randn(4, 8))
    with torch.no_grad():
        parted.module[0].bias.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(ExecutionError, match=r"'0.bias', which it read, was changed in place"):
        result.sum().backward()


def test_nothing_runs_again_without_gradients() -> None:
    model, inputs = gpt2()
    parted = gp.partition(model.eval(), 1, strategy="single", recompute=BLOCKS)
    with torch.no_grad():
        result = parted(**inputs)
    torch.testing.assert_close(result.loss, model(**inputs).loss)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_devices"), [("layer", 1), ("layer", 2), ("batch", 2), ("feature", 2)])
@pytest.mark.parametrize("recompute", [BLOCKS, ["transformer.h.[024]", "*.mlp"]], ids=["all", "some"])
def test_peak_memory_falls_as_forecast(strategy: str, num_devices: int, recompute: Sequence[str]) -> None:
    model, inputs = gpt2(num_layers=6)
    peaks = []
    for chosen in ("none", recompute):
        parted = gp.partition(
            copy.deepcopy(model), num_devices, strategy=strategy, num_microbatches=4, recompute=chosen
        )
        with metered(parted) as meter:
            parted(**inputs).loss.backward()
        for device, curve in enumerate(parted.plan.memory_over_time):
            most = max(moment.memory.saved_bytes for moment in curve.moments)
            assert most == pytest.approx(meter.peak_bytes[device], rel=TOLERANCE)
            assert curve.moments[-1].memory.saved_bytes == meter.now_bytes[device] == 0
            assert most <= parted.plan.memory.devices[device].saved_bytes * (1 + TOLERANCE)
        peaks.append(max(meter.peak_bytes.values()))
    assert peaks[1] < 0.75 * peaks[0]


def test_recomputation_takes_the_forward_once_more() -> None:
    model, inputs = gpt2()
    plain, again = (gp.plan(model, 1, (), inputs, strategy="single", recompute=chosen) for chosen in ("none", BLOCKS))
    events = [e for e in again.timeline.events if e.kind == "F" and e.name in recomputed_segments(again.program)]
    assert len(events) == 2
    more_s = again.timeline.makespan_s - plain.timeline.makespan_s
    assert more_s == pytest.approx(sum(e.end_s - e.start_s for e in events), rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_fused_steps_have_the_same_bits(schedule: str) -> None:
    model, inputs = gpt2()
    found = []
    for chosen in ("none", BLOCKS):
        options = {"strategy": "layer", "num_microbatches": 4, "schedule": schedule, "recompute": chosen}
        parted = gp.partition(copy.deepcopy(model), 2, **options)
        optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
        torch.manual_seed(1)
        losses = [parted.train_step(**inputs, optimizer=optimizer).loss for _ in range(2)]
        found.append((losses, [p.detach().clone() for p in parted.parameters()]))
    (losses, weights), (our_losses, our_weights) = found
    assert all(torch.equal(a, b) for a, b in zip((*losses, *weights), (*our_losses, *our_weights), strict=True))


def test_peak_memory_of_fused_steps_falls_as_forecast() -> None:
    model, inputs = gpt2(num_layers=6)
    peaks = []
    for chosen in ("none", BLOCKS):
        options = {"strategy": "layer", "num_microbatches": 4, "schedule": "1f1b", "recompute": chosen}
        parted = gp.partition(copy.deepcopy(model), 2, **options)
        with metered(parted) as meter:
            parted.train_step(**inputs, optimizer=torch.optim.SGD(parted.parameters(), lr=0.1))
        for device, curve in enumerate(parted.plan.memory_over_time):
            most = max(moment.memory.saved_bytes for moment in curve.moments)
            assert most == pytest.approx(meter.peak_bytes[device], rel=TOLERANCE)
        peaks.append(max(meter.peak_bytes.values()))
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("stash_weights", [False, True])
def test_asynchronous_steps_run_again_too(stash_weights: bool) -> None:
    model, inputs = gpt2()
    schedule = gp.Async(2, 1, stash_weights)
    parted = gp.partition(model, 2, strategy="layer", num_microbatches=4, schedule=schedule, recompute=BLOCKS)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    losses = [float(parted.train_step(**inputs, optimizer=optimizer).loss) for _ in range(8)]
    assert losses[-1] < losses[0]


# --- the user's own checkpoints -----------------------------------------------------------------------------------


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(101, (4, 12))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(("make", "block"), [(gpt2, "transformer.h.1"), (llama, "model.layers.1")])
def test_checkpoints_of_transformers_are_groups(make: Any, block: str) -> None:
    model, inputs = make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parted = check_same_bits(model, inputs, 2, strategy="layer", num_microbatches=2)
    graph, groups = parted.plan.graph, parted.plan.placement.recompute
    assert set(groups.values()) == {"checkpoint 0", "checkpoint 1"}
    for op in graph.operators:
        assert (groups.get(op.name) == "checkpoint 1") == op.module_path.startswith(block)
    assert recomputed_segments(parted.plan.program)


def test_checkpoints_lower_the_peak_as_forecast() -> None:
    model, inputs = gpt2(num_layers=6)
    peaks = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parted = gp.partition(copy.deepcopy(model), 2, strategy="layer", num_microbatches=4)
        with metered(parted) as meter:
            parted(**inputs).loss.backward()
        for device, curve in enumerate(parted.plan.memory_over_time):
            most = max(moment.memory.saved_bytes for moment in curve.moments)
            assert most == pytest.approx(meter.peak_bytes[device], rel=TOLERANCE)
        peaks.append(max(meter.peak_bytes.values()))
    assert peaks[1] < 0.25 * peaks[0]


class Checkpointed(nn.Module):
    """A checkpoint in a checkpoint, with a region without gradients, and a part outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def inner(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean()
        return torch.tanh(self.b(x)) * scale

    def outer(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, torch.tanh(self.a(x)), use_reentrant=False)

    def forward(self, input: Tensor) -> Tensor:
        made = checkpoint(self.outer, input, use_reentrant=False)
        return checkpoint(self.inner, torch.tanh(self.c(made)), use_reentrant=False)


def test_the_outermost_checkpoint_counts() -> None:
    model, inputs = Checkpointed(), {"input": torch.randn(4, 6)}
    parted = check_same_bits(model, inputs, 1, strategy="single")
    found = Counter((op.recompute, op.target.split(".")[1]) for op in parted.plan.graph.operators)
    of_one = {"abs": 1, "mean": 1, "detach": 1, "linear": 1, "tanh": 1, "mul": 1}
    wanted = {"checkpoint 0": {**of_one, "linear": 2, "tanh": 2, "add": 1}, "checkpoint 1": of_one}
    wanted[""] = {"linear": 1, "tanh": 1}
    assert found == {(call, name): number for call, names in wanted.items() for name, number in names.items()}


def test_checkpoints_of_a_later_trace_count() -> None:
    model, inputs = gpt2()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parted = gp.partition(model.eval(), 2, strategy="layer")
    parted(**inputs)
    assert not parted.plan.placement.recompute
    parted.train()(**inputs).loss.backward()
    assert recomputed_segments(parted.last_step.program)


def test_each_call_of_a_module_is_a_group() -> None:
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=101,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(101, (4, 12))
    model, inputs = transformers.AlbertForMaskedLM(config).train(), {"input_ids": ids, "labels": ids.clone()}
    options = {"strategy": "layer", "recompute": ["*.albert_layers.0"]}
    _, loss, gradients, _ = step(model, inputs, 2, **{**options, "recompute": "none"})
    parted, our_loss, our_gradients, _ = step(model, inputs, 2, **options)
    assert torch.equal(our_loss, loss)
    # Each call of the shared layer is a segment now, so its gradients are summed in another order.
    torch.testing.assert_close(our_gradients, gradients)
    layer = "albert.encoder.albert_layer_groups.0{0}.albert_layers.0{0}"
    assert set(parted.plan.placement.recompute.values()) == {layer.format(call) for call in ("", "@1", "@2")}


# --- host memory --------------------------------------------------------------------------------------------------


class CopyShelf:
    """A stand-in for pinned host memory: copies that a test can count."""

    def __init__(self) -> None:
        self.num_put, self.now, self.most = 0, 0, 0

    def put(self, tensor: Tensor) -> CopyOf:
        self.num_put += 1
        self.now += 1
        self.most = max(self.most, self.now)
        found = CopyOf(tensor.clone())
        weakref.finalize(found, self._left)
        return found

    def _left(self) -> None:
        self.now -= 1


class CopyOf:
    def __init__(self, host: Tensor) -> None:
        self.host = host

    def back(self) -> Tensor:
        return self.host.clone()


class Reader(nn.Module):
    """A block that reads a memory besides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return torch.sin(self.linear(x) * memory)


class Cross(nn.Module):
    """Two blocks that read the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.blocks = nn.ModuleList(Reader() for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        memory = x = self.encoder(input)
        for block in self.blocks:
            x = torch.tanh(block(x, memory))
        return x


def test_what_is_kept_goes_away_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = Cross(), {"input": torch.randn(8, 16)}
    shelf = CopyShelf()
    monkeypatch.setattr("graphpart.runtime.device.device_code.shelf_of", lambda device: shelf)
    monkeypatch.setattr("graphpart.runtime.device.offload.SMALLEST_BYTES", 0)
    monkeypatch.setattr("graphpart.api.check_offload", lambda offload, cluster: None)
    options = {"strategy": "single", "num_microbatches": 2, "recompute": ["blocks.*"]}
    _, loss, gradients, _ = step(model, inputs, 1, **options)
    assert shelf.num_put == 0
    parted, our_loss, our_gradients, _ = step(model, inputs, 1, **options, offload=True)
    assert parted.plan.program.offload
    assert torch.equal(our_loss, loss)
    torch.testing.assert_close(our_gradients, gradients, rtol=0, atol=0)
    # For each microbatch, the memory (once, though both blocks read it) and what the second block reads besides.
    assert shelf.num_put == shelf.most == 2 * 2
    assert shelf.now == 0


def test_offload_is_for_gpus() -> None:
    model, inputs = gpt2()
    with pytest.raises(ArgumentError, match="is for GPUs, but 'cpu:0' is a CPU"):
        gp.partition(model, 2, offload=True)
    with pytest.raises(ArgumentError, match="is for GPUs, but 'cpu:0' is a CPU"):
        gp.plan(model, 2, (), inputs, offload=True)


def test_a_plan_for_gpus_keeps_offload(tmp_path: Any) -> None:
    model, inputs = gpt2()
    plan = gp.plan(model, "2xH100", (), inputs, strategy="layer", recompute=BLOCKS, offload=True)
    assert plan.choices.offload and plan.program.offload
    assert gp.Plan.load(plan.save(tmp_path / "plan.json")).choices.offload


@pytest.mark.gpu
def test_a_gpu_keeps_what_runs_again_in_host_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(8)]
    model, x = nn.Sequential(*blocks).cuda(), torch.randn(8192, 1024, device="cuda")
    peaks, gradients = [], []
    for offload in (False, True):
        options = {"strategy": "single", "num_microbatches": 2, "recompute": ["?"], "offload": offload}
        parted = gp.partition(copy.deepcopy(model), ["cuda:0"], **options)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            parted.zero_grad()
            parted(x).square().mean().backward()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        gradients.append([p.grad.clone() for p in parted.parameters()])
        del parted
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # Seven inputs of 8192 x 1024 float32 go away; two of them at a time are on their way.
    assert peaks[1] < peaks[0] - 4 * 8192 * 1024 * 4


# --- what is named ------------------------------------------------------------------------------------------------


def test_the_outermost_module_that_matches_is_a_group() -> None:
    model, inputs = gpt2()
    graph = trace(model, (), inputs).graph
    groups = groups_by_pattern(graph, BLOCKS)
    assert set(groups.values()) == {"transformer.h.0", "transformer.h.1"}
    assert all(graph.operator[name].module_path.startswith(group) for name, group in groups.items())
    assert set(groups_by_pattern(graph, ["*.mlp", "*.h.0"]).values()) == {"transformer.h.0", "transformer.h.1.mlp"}


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (["transformer.g.*"], r"matches no module of GPT2LMHeadModel; the nearest module paths are 'transformer"),
        ("of", r"pattern 'of' matches no module"),
        (3, r"recompute=3; give 'auto', 'none', or patterns"),
        ([3], r"recompute=\[3\]; give"),
    ],
)
def test_what_names_no_module_is_refused(recompute: Any, message: str) -> None:
    model, inputs = gpt2()
    with pytest.raises(ArgumentError, match=message):
        gp.plan(model, 2, (), inputs, recompute=recompute)


def test_a_plan_keeps_its_groups(tmp_path: Any) -> None:
    model, inputs = gpt2()
    plan = gp.plan(model, 2, (), inputs, strategy="layer", num_microbatches=2, recompute=BLOCKS)
    loaded = gp.Plan.load(plan.save(tmp_path / "plan.json"))
    assert loaded.placement == plan.placement
    assert set(loaded.placement.recompute.values()) == {"transformer.h.0", "transformer.h.1"}
    assert recomputed_segments(loaded.program) == recomputed_segments(plan.program)
    with pytest.raises(ArgumentError, match="recompute cannot be combined with plan="):
        gp.partition(model, 2, plan=loaded, recompute=BLOCKS)


def test_groups_are_carried_to_other_shapes() -> None:
    model, inputs = gpt2()
    parted = gp.partition(model, 2, strategy="layer", recompute=BLOCKS)
    parted(**inputs)
    parted(**{name: tensor[:3, :20] for name, tensor in inputs.items()}).loss.backward()
    assert len(recomputed_segments(parted.last_step.program)) >= 2


# --- the planner's choice -----------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A part with modules of its own, of sizes that differ."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.act = nn.Sequential(nn.GELU(), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def branches() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(Branch(64), Branch(24)).train(), {"input": torch.randn(8, 16)}


def with_memory(cluster: gp.Cluster, size_bytes: float) -> gp.Cluster:
    return replace(cluster, devices=tuple(replace(d, memory_bytes=int(size_bytes)) for d in cluster.devices))


def every_choice(modules: Modules) -> Iterator[tuple[str, ...]]:
    """All sets of modules that do not share an operator."""
    names = {path: {op.name for op in ops} for path, ops in modules.items()}

    def extended(chosen: tuple[str, ...], rest: Sequence[str]) -> Iterator[tuple[str, ...]]:
        yield chosen
        for i, path in enumerate(rest):
            if all(names[path].isdisjoint(names[other]) for other in chosen):
                yield from extended((*chosen, path), rest[i + 1 :])

    yield from extended((), list(modules))


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(1, 1), (2, 4)])
def test_the_planner_runs_the_least_again(num_devices: int, num_microbatches: int) -> None:
    model, inputs = branches()
    counted = {"num_microbatches": num_microbatches, "optimizer_bytes_per_element": 0}
    plan = gp.plan(model, num_devices, (), inputs, strategy="layer", recompute="none", **counted)
    graph, cluster, works = plan.graph, plan.cluster, operator_works(plan.graph)
    modules = modules_of(graph)
    found: list[tuple[float, list[int]]] = []
    for chosen in every_choice(modules):
        groups = {op.name: path for path in chosen for op in modules[path]}
        placement = replace(plan.placement, recompute=groups)
        forecast = forecast_memory(graph, placement, num_devices, **counted)
        again = (op for path in chosen for op in modules[path])
        more_s = sum(rerun_s(again, placement, cluster, works, num_microbatches).values())
        found.append((more_s, [device.total_bytes for device in forecast.devices]))
    assert len(found) > 100
    most, fewest = max(max(sizes) for _, sizes in found), min(max(sizes) for _, sizes in found)
    for share in (0.02, 0.3, 0.6, 1.0):
        limits = [fewest + share * (most - fewest) + 1] * num_devices
        best_s = min(
            more_s for more_s, sizes in found if all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        )
        chosen = least_recomputation(graph, plan.placement, cluster, limits, Terms(**counted))
        assert chosen is not None
        again = (graph.operator[name] for name in chosen.recompute)
        our_s = sum(rerun_s(again, chosen, cluster, works, num_microbatches).values())
        assert our_s == pytest.approx(best_s, rel=1e-4, abs=1e-12)
        forecast = forecast_memory(graph, chosen, num_devices, **counted)
        assert all(device.total_bytes <= limit for device, limit in zip(forecast.devices, limits, strict=True))
    assert least_recomputation(graph, plan.placement, cluster, [fewest * 0.9] * num_devices, Terms(**counted)) is None


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_devices"), [("layer", 1), ("layer", 2), ("auto", 1)])
def test_too_little_memory_makes_the_planner_recompute(strategy: str, num_devices: int) -> None:
    model, inputs = gpt2(num_layers=6)
    options = {"strategy": strategy, "num_microbatches": 4}
    plain = gp.plan(model, num_devices, (), inputs, recompute="none", **{**options, "strategy": "layer"})
    most = max(plain.memory.devices, key=lambda device: device.total_bytes)
    cluster = with_memory(plain.cluster, most.total_bytes - 0.5 * most.saved_bytes)
    with pytest.raises(OutOfMemoryError):
        gp.plan(model, cluster, (), inputs, recompute="none", **options)
    parted = gp.partition(copy.deepcopy(model), cluster, **options)
    with metered(parted) as meter:
        parted(**inputs).loss.backward()
    assert recomputed_segments(parted.plan.program)
    for device, curve in enumerate(parted.plan.memory_over_time):
        saved_bytes = max(moment.memory.saved_bytes for moment in curve.moments)
        assert saved_bytes == pytest.approx(meter.peak_bytes[device], rel=TOLERANCE)
        assert curve.peak.memory.total_bytes <= cluster.devices[device].memory_bytes
    assert max(meter.peak_bytes.values()) < 0.75 * most.saved_bytes
    assert "Run again for backward" in parted.plan.explain()
    if strategy == "layer":
        roomy = with_memory(cluster, most.total_bytes)
        check_same_bits(model, inputs, cluster, roomy=roomy, num_microbatches=4, strategy=parted.plan.placement)


def test_what_fits_runs_nothing_again() -> None:
    model, inputs = gpt2()
    plan = gp.plan(model, 2, (), inputs, strategy="layer")
    assert not plan.placement.recompute
    assert "Run again" not in plan.explain()


@pytest.mark.parametrize("strategy", ["single", "auto"])
def test_memory_that_no_recomputation_would_save_is_said(strategy: str) -> None:
    model, inputs = gpt2()
    cluster = with_memory(gp.plan(model, 1, (), inputs).cluster, 1e6)
    with pytest.raises(OutOfMemoryError, match=r"Nor would it fit if all \d+ blocks ran again for their backward"):
        gp.plan(model, cluster, (), inputs, strategy=strategy)


def test_a_placement_by_hand_is_made_to_fit() -> None:
    model, inputs = gpt2()
    plain = gp.plan(model, 2, (), inputs, strategy={"*": 0})
    memory = plain.memory.devices[0]
    cluster = with_memory(plain.cluster, memory.total_bytes - 0.3 * memory.saved_bytes)
    plan = gp.plan(model, cluster, (), inputs, strategy={"*": 0})
    assert plan.placement.recompute and not plan.notes
    assert plan.memory.devices[0].total_bytes <= cluster.devices[0].memory_bytes
    assert gp.plan(model, cluster, (), inputs, strategy={"*": 0}, recompute="none").notes


def test_what_groups_save_while_they_run_again_has_to_fit() -> None:
    """One group that is the whole model saves all of it at once."""
    model, inputs = gpt2()
    plain = gp.plan(model, 1, (), inputs, strategy="single", recompute="none")
    memory = plain.memory.devices[0]
    cluster = with_memory(plain.cluster, memory.total_bytes - 0.3 * memory.saved_bytes)
    with pytest.raises(OutOfMemoryError):
        gp.plan(model, cluster, (), inputs, strategy="single", recompute=["*"])
    assert gp.plan(model, cluster, (), inputs, strategy="single", recompute=BLOCKS).memory.peak_bytes <= (
        cluster.devices[0].memory_bytes
    )
