"""Splits, and what runs again, weigh memory by what the plan's schedule keeps in flight."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from math import inf
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graphpart as gp
from graphpart.cost import DeviceMemory, MemoryForecast, forecast_memory
from graphpart.cost.memory.rerun_report import rerun_costs
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.axes import AxisRule
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.graph import Graph, Operator, Ref, Source, Value
from graphpart.ir.placement import Placement
from graphpart.order import SCHEDULES, Async, asynchronous, held_on_chain, in_flight, make_schedule
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.planning.plan import Plan
from graphpart.strategies import InFlight, StepPeak, Terms, plan_layers
from graphpart.trace import trace
from tests.helpers.pipelines import pipeline
from tests.helpers.saved_meter import metered
from tests.test_layer_partition import naive_loads, random_cluster, random_graph
from tests.test_recompute import gpt2, with_memory

SAMPLES = 16


def chain(widths: Sequence[int], flops: float = 1e9) -> Graph:
    """Blocks that each keep what they read; block i makes ``widths[i + 1]`` numbers a sample."""
    sources = [Source(Value("x", (SAMPLES, widths[0]), "float32"), "input", ("x",))]
    operators: list[Operator] = []
    for i, (k, n) in enumerate(pairwise(widths)):
        read, weight, made = operators[-1].name if operators else "x", f"w{i}", f"o{i}"
        sources.append(Source(Value(weight, (n,), "float32", True), "parameter", (weight,), trainable=True))
        rule = AxisRule(
            {"b": SAMPLES, "k": k, "n": n}, ((("b",), ("k",)), (("n",),)), ((("b",), ("n",)),), frozenset({"k"})
        )
        results = (Value(made, (SAMPLES, n), "float32", True),)
        saved = (read, weight)
        operators.append(
            Operator(
                made, "aten.toy.default", (Ref(read), Ref(weight)), {}, results, rule, flops, 2 * flops, saved, 0,
                f"layers.{i}",
            )
        )  # fmt: skip
    return Graph("Chain", tuple(sources), tuple(operators), (Ref(operators[-1].name),), sample_dims={"x": 0})


def toys(num_devices: int, memory_bytes: float) -> Cluster:
    devices = (Device(f"cuda:{i}", "toy", {"float32": 1e12}, int(memory_bytes), 1e12) for i in range(num_devices))
    return Cluster(tuple(devices), Link(1e-6, 1e11))


def peaks(plan: Plan) -> list[int]:
    return [curve.peak.memory.total_bytes for curve in plan.memory_over_time]


def blocks(plan: Plan) -> list[int]:
    """Operators of each device."""
    found = Counter(plan.placement.device(name) for name in plan.placement.tiles)
    return [found[device] for device in range(len(plan.cluster))]


# --- what schedules hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 16])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 5])
def test_chains_hold_what_is_counted_on(num_devices: int, num_microbatches: int) -> None:
    def counted_on(choice: str | Async) -> tuple[float, ...]:
        return held_on_chain(choice, num_devices, num_microbatches)

    workload = pipeline(num_devices, num_microbatches)
    for name in ("gpipe", "1f1b", "interleaved"):
        assert in_flight(workload, make_schedule(name, workload)) == counted_on(name), name
    for options in (Async(), Async(in_flight=2)):
        assert in_flight(workload, asynchronous(workload, options)) == counted_on(options)
    assert counted_on("auto") == counted_on("zero-bubble") == counted_on("async") == counted_on("1f1b")
    assert counted_on("list") == (num_microbatches,) * num_devices


@pytest.mark.parametrize(("num_devices", "num_chunks", "num_microbatches"), [(2, 2, 8), (4, 2, 16), (3, 3, 12)])
def test_rounds_hold_what_is_counted_on(num_devices: int, num_chunks: int, num_microbatches: int) -> None:
    workload = pipeline(num_devices, num_microbatches, num_chunks=num_chunks)
    num_stages = num_devices * num_chunks
    for name in ("interleaved", "1f1b"):
        counted_on = held_on_chain(name, num_stages, num_microbatches, num_chunks)
        assert counted_on == counted_on[:num_devices] * num_chunks
        for device, line in enumerate(make_schedule(name, workload).tasks):
            held = most = 0
            for task in line:
                held += {"F": 1, "B": -1}.get(task.kind, 0)
                most = max(most, held)
            assert most / num_chunks <= counted_on[device]
            assert name == "1f1b" or most / num_chunks == counted_on[device]


# --- layer splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "auto", "zero-bubble", "async", gp.Async(in_flight=2)])
def test_what_fits_by_1f1b_alone_is_accepted(schedule: Any) -> None:
    graph = chain([1000] * 17)
    roomy = make_plan(graph, toys(4, 1e9), Choices(strategy="layer", num_microbatches=16))
    assert blocks(roomy) == [4, 4, 4, 4]
    plans = (replace(roomy, choices=replace(roomy.choices, schedule=name)) for name in ("1f1b", "gpipe"))
    least, most = (max(peaks(plan)) for plan in plans)
    cluster = toys(4, 0.8 * least + 0.2 * most)
    options: dict[str, Any] = {"strategy": "layer", "num_microbatches": 16}
    for refused in (None, "gpipe", "list"):
        with pytest.raises(OutOfMemoryError):
            make_plan(graph, cluster, Choices(schedule=refused, recompute="none", **options))
    plan = make_plan(graph, cluster, Choices(schedule=schedule, **options))
    assert not plan.placement.recompute and blocks(plan) == [4, 4, 4, 4]
    assert max(peaks(plan)) <= cluster.devices[0].memory_bytes
    assert plan.training.schedule.name != "gpipe"


def test_stages_that_hold_more_microbatches_get_fewer_blocks() -> None:
    """All blocks are alike, so that only what is in flight makes them uneven."""
    graph, options = chain([4000] * 17), {"strategy": "layer", "num_microbatches": 16, "recompute": "none"}
    found = peaks(make_plan(graph, toys(4, 1e9), Choices(schedule="1f1b", **options)))
    cluster = toys(4, (5 * max(found) + min(found)) / 6)
    plan = make_plan(graph, cluster, Choices(schedule="1f1b", **options))
    assert blocks(plan) == sorted(blocks(plan)) and blocks(plan)[0] < 4 < blocks(plan)[-1]
    assert max(peaks(plan)) <= cluster.devices[0].memory_bytes
    whole = make_plan(graph, toys(4, 1e9), Choices(schedule="gpipe", **options)).all_in_flight.peak_bytes
    even = make_plan(graph, toys(4, 1.05 * whole), Choices(schedule="gpipe", **options))
    assert blocks(even) == [4, 4, 4, 4]


NUM_MICROBATCHES = 4


def by_1f1b(num_stages: int, chunks: int) -> tuple[float, ...]:
    return held_on_chain("1f1b", num_stages, NUM_MICROBATCHES, chunks)


def fits_always(placement: Placement) -> StepPeak:
    num_devices = max(placement.devices) + 1
    return StepPeak(MemoryForecast((DeviceMemory(),) * num_devices), (0.0,) * num_devices)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chained", [True, False])
def test_the_bottleneck_is_the_least_of_all_cuts_that_fit(seed: int, chained: bool) -> None:
    graph = random_graph(seed, n=7, chain=chained)
    even = [replace(op, saved_extra_bytes=op.saved_extra_bytes // 8 * 8) for op in graph.operators]
    graph, names = replace(graph, operators=tuple(even)), [op.name for op in graph.operators]
    whole = forecast_memory(graph, Placement.whole(graph, dict.fromkeys(names, 0)), 1).peak_bytes
    cluster = random_cluster(0, 3, memory_bytes=int(whole * random.Random(seed).uniform(0.3, 0.6)))
    cluster = replace(cluster, devices=tuple(replace(cluster.devices[0], name=f"cuda:{i}") for i in range(3)))
    expected = inf
    for num_stages in (3, 2, 1):  # as many devices as memory allows
        flights = [*by_1f1b(num_stages, 1), *[0] * (3 - num_stages)]
        for cuts in combinations(range(1, len(names)), num_stages - 1):
            stages = enumerate(pairwise((0, *cuts, len(names))))
            device_of = {name: stage for stage, (i, j) in stages for name in names[i:j]}
            memory = forecast_memory(
                graph, Placement.whole(graph, device_of), 3, num_microbatches=NUM_MICROBATCHES, in_flight=flights
            )
            if memory.peak_bytes <= cluster.devices[0].memory_bytes:
                expected = min(expected, max(naive_loads(graph, cluster, device_of, NUM_MICROBATCHES)))
        if expected < inf:
            break
    terms = Terms(num_microbatches=NUM_MICROBATCHES, in_flight=InFlight(by_1f1b, fits_always))
    if expected == inf:
        with pytest.raises(OutOfMemoryError, match="has"):
            plan_layers(graph, cluster, terms)
        return
    plan = plan_layers(graph, cluster, terms)
    assert plan.bottleneck_s == pytest.approx(expected)
    assert all(stage.memory_bytes <= cluster.devices[0].memory_bytes for stage in plan.stages)


# --- what every accepted plan keeps to ----------------------------------------------------------------------------


def random_case(seed: int) -> tuple[Graph, dict[str, Any], int, random.Random]:
    """A chain whose blocks differ in time and memory, how to split it, and over how many devices."""
    draw = random.Random(seed)
    graph = chain([draw.choice([50, 200, 1000, 3000]) for _ in range(draw.randint(4, 13))])
    operators = []
    for op in graph.operators:
        flops = draw.uniform(1e8, 1e9)
        saved = tuple(name for name in (*op.operands, op.name) if draw.random() < 0.7)
        extra = draw.choice([0, 0, 5000])
        operators.append(
            replace(op, flops_forward=flops, flops_backward=2 * flops, saved=saved, saved_extra_bytes=extra)
        )
    choices = [*SCHEDULES, "auto", "async", gp.Async(2, 2), "1f1b"]
    options: dict[str, Any] = {
        "strategy": draw.choice(["layer", "layer", "auto", "batch", "hybrid", "free", "single"]),
        "num_microbatches": draw.choice([2, 4, 8]),
        "schedule": choices[seed % len(choices)],
    }
    num_devices = draw.randint(1, 4)
    if options["strategy"] == "layer" and 2 * num_devices <= len(operators) and draw.random() < 0.4:
        options["strategy_options"] = {"chunks": 2}
    return replace(graph, operators=tuple(operators)), options, num_devices, draw


@pytest.mark.parametrize("part", range(4))
def test_every_moment_of_an_accepted_step_fits(part: int) -> None:
    accepted = refused = 0
    for seed in range(25 * part, 25 * part + 25):
        graph, options, num_devices, draw = random_case(seed)
        try:
            roomy = make_plan(graph, toys(num_devices, 1e12), Choices(**options))
        except PlacementError:  # more devices than there is to split
            continue
        fullest = max(roomy.all_in_flight.devices, key=lambda device: device.total_bytes)
        cluster = toys(num_devices, fullest.total_bytes - draw.uniform(0.1, 0.9) * fullest.saved_bytes)
        try:
            plan = make_plan(graph, cluster, Choices(**options))
        except OutOfMemoryError:
            refused += 1
            continue
        accepted += 1
        plan.trainer.check(plan.training)
        assert max(peaks(plan)) <= cluster.devices[0].memory_bytes, seed
        assert [memory.total_bytes for memory in plan.memory.devices] == peaks(plan)
    assert accepted > 4 and refused > 2


class Normed(nn.Module):
    """BatchNorm waits for all microbatches: what is before it holds them all, whatever the schedule."""

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.BatchNorm1d(width))
        self.head = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(width, width), nn.Tanh())))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()


def test_what_waits_for_the_whole_batch_is_seen() -> None:
    graph = trace(Normed().train(), (torch.randn(512, 64),)).graph
    options: dict[str, Any] = {"strategy": "layer", "num_microbatches": 16, "recompute": "none"}
    roomy = make_plan(graph, toys(4, 1e9), Choices(schedule="1f1b", **options))
    holds = roomy.trainer.in_flight(roomy.training)
    assert holds[0] == 16 and max(holds[2:]) <= 2
    sizes = [
        make_plan(graph, toys(4, 1e9), Choices(schedule=name, **options)).memory.peak_bytes
        for name in ("1f1b", "gpipe")
    ]
    accepted = 0
    for size_bytes in range(int(0.5 * min(sizes)), max(sizes), max(sizes) // 20):
        try:
            plan = make_plan(graph, toys(4, size_bytes), Choices(schedule="1f1b", **options))
        except OutOfMemoryError:
            assert size_bytes < min(sizes)
            continue
        accepted += 1
        assert max(peaks(plan)) <= size_bytes
    assert accepted


def test_memory_that_stays_free_stays_free_by_auto() -> None:
    """Of the schedules, ``auto`` takes one that leaves the reserve alone; a saved plan knows of it."""
    graph, options = chain([1000] * 17), {"strategy": "layer", "num_microbatches": 16, "recompute": "none"}
    size_bytes = max(peaks(make_plan(graph, toys(4, 1e9), Choices(schedule="gpipe", **options))))
    cluster = toys(4, 1.05 * size_bytes)
    plan = make_plan(graph, cluster, Choices(schedule="auto", memory_reserve=0.3, **options))
    assert max(peaks(plan)) <= 0.7 * cluster.devices[0].memory_bytes
    with pytest.raises(OutOfMemoryError):
        make_plan(graph, cluster, Choices(schedule="gpipe", memory_reserve=0.3, **options))


# --- models -------------------------------------------------------------------------------------------------------


def rerun_s(plan: Plan) -> float:
    counted = {"num_microbatches": plan.num_microbatches, "optimizer_bytes_per_element": 8.0}
    return sum(cost.time_s for cost in rerun_costs(plan.graph, plan.placement, plan.cluster, **counted))  # type: ignore[arg-type]


def gpt2_graph() -> Graph:
    config = transformers.GPT2Config(n_layer=4, use_cache=False, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model, ids = transformers.GPT2LMHeadModel(config).train(), torch.zeros(16, 256, dtype=torch.long)
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


def llama_graph() -> Graph:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=8000,
        use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = transformers.LlamaForCausalLM(config).train(), torch.zeros(16, 256, dtype=torch.long)
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


@pytest.mark.parametrize("make", [gpt2_graph, llama_graph])
def test_less_runs_again_by_1f1b(make: Any) -> None:
    graph = make()
    options: dict[str, Any] = {"strategy": "layer", "num_microbatches": 16, "optimizer_bytes_per_element": 0}
    roomy = make_plan(graph, gp.make_cluster("2xH100"), Choices(recompute="none", **options))
    fullest = max(roomy.memory.devices, key=lambda device: device.total_bytes)
    cluster = with_memory(roomy.cluster, fullest.total_bytes - 0.2 * fullest.saved_bytes)
    times_s: dict[str, float] = {}
    for schedule in ("gpipe", "1f1b"):
        plan = make_plan(graph, cluster, Choices(schedule=schedule, **options))
        assert max(peaks(plan)) <= cluster.devices[0].memory_bytes
        times_s[schedule] = rerun_s(plan)
    assert times_s["1f1b"] == 0 < times_s["gpipe"]


@pytest.mark.parametrize(("part", "runs_again"), [(-0.3, False), (0.25, True)])
def test_a_model_that_fits_by_1f1b_trains_as_on_one_device(part: float, runs_again: bool) -> None:
    plain, inputs = gpt2(num_layers=6, dropout=0.0)
    options: dict[str, Any] = {"strategy": "layer", "num_microbatches": 8, "optimizer_bytes_per_element": 0}
    roomy = gp.plan(copy.deepcopy(plain), 2, (), inputs, recompute="none", schedule="1f1b", **options)
    fullest = max(roomy.memory.devices, key=lambda device: device.total_bytes)
    cluster = with_memory(roomy.cluster, fullest.total_bytes - part * fullest.saved_bytes)
    parted = gp.partition(copy.deepcopy(plain), cluster, schedule="1f1b", **options)
    ours, theirs = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (parted, plain))
    for _ in range(2):
        with metered(parted) as meter:
            found = parted.train_step(**inputs, optimizer=ours)
        theirs.zero_grad()
        loss = plain(**inputs).loss
        loss.backward()
        theirs.step()
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-5, atol=0)
    weights = dict(parted.named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weights[name].detach(), weight.detach(), rtol=1e-4, atol=1e-6)
    assert bool(parted.plan.placement.recompute) == runs_again
    for device, curve in enumerate(parted.plan.memory_over_time):
        assert curve.peak.memory.total_bytes <= cluster.devices[device].memory_bytes
        saved_bytes = max(moment.memory.saved_bytes for moment in curve.moments)
        assert meter.peak_bytes[device] == pytest.approx(saved_bytes, rel=0.1)
