"""Layer splits in rounds over the devices, and the interleaved schedule on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import groupby, product

import pytest
import torch

import graphpart as gp
from graphpart.cost import forecast_memory
from graphpart.cost.time.task_times import task_times
from graphpart.errors import OutOfMemoryError, PlacementError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.workload import Workload
from graphpart.lower import backward_of, terms_of
from graphpart.order import dry_run, make_schedule, start_times
from graphpart.planning.choices import Choices
from graphpart.planning.make import make_plan
from graphpart.strategies import layer, plan_layers
from graphpart.strategies.stages.blocks import operator_order
from graphpart.trace import trace
from tests.helpers.models import gpt2_example
from tests.oracle import compare, make_optimizer, train_step
from tests.test_layer_partition import equal_cluster, naive_loads, random_cluster, random_graph

pytestmark = pytest.mark.xdist_group("chunks")  # its tests share a fixture that takes long


def rounds(graph, placement):
    """The devices in the order of operators, each run once; masks and positions go where they are read."""
    free = operator_order(graph).free
    return [device for device, _ in groupby(placement.device(op.name) for op in graph.operators if op.name not in free)]


@pytest.fixture(scope="module")
def gpt2():
    example = gpt2_example(8, torch.float64)
    return example, trace(example.model, example.args, example.kwargs).graph


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "chunks"), [(2, 1), (2, 2), (3, 2), (2, 4)])
def test_gpt2_goes_round_the_devices(gpt2, num_devices, chunks):
    _, graph = gpt2
    plan = make_plan(
        graph, gp.make_cluster(num_devices), Choices(strategy="layer", strategy_options={"chunks": chunks})
    )
    assert rounds(graph, plan.placement) == [*range(num_devices)] * chunks


@pytest.mark.slow
def test_gpt2_in_rounds_trains_as_the_plain_model(gpt2):
    example, _ = gpt2
    model = copy.deepcopy(example.model)
    plain, _ = train_step(model, example, lambda r: r["loss"], make_optimizer("adamw", model))
    parted = gp.partition(
        copy.deepcopy(example.model), 2, strategy="layer", strategy_options={"chunks": 2}, num_microbatches=4
    )
    ours, _ = train_step(parted, example, lambda r: r["loss"], make_optimizer("adamw", parted))
    assert len(rounds(parted.plan.graph, parted.plan.placement)) == 4
    assert compare(ours, plain) == []


@pytest.mark.slow
def test_interleaving_pays_on_gpt2_in_rounds(gpt2):
    """Where work alone takes time, and the terms of the loss start their backward as soon as they are there."""
    _, graph = gpt2
    devices = tuple(
        Device(f"cpu:{i}", "toy", {"float32": 1e9}, 10**9, 1e30, efficiency=1.0, overhead_s=0.0) for i in range(2)
    )
    cluster = Cluster(devices, Link(0.0, 1e30))
    times_s = {}
    for name, chunks in (("1f1b", 1), ("interleaved", 2)):
        plan = make_plan(
            graph, cluster, Choices(strategy="layer", strategy_options={"chunks": chunks}, num_microbatches=4)
        )
        (loss,) = (name for name in plan.program.outputs if name and plan.program.wire[name].shape == ())
        terms = terms_of(plan.program, loss)
        assert len(terms) == 4
        workload = Workload(plan.program, backward_of(plan.program, terms))
        durations = task_times(workload, cluster)
        schedule = make_schedule(name, workload, durations)
        dry_run(workload, schedule)
        starts = start_times(workload, schedule, durations)
        times_s[name] = max(at + durations[task] for task, at in starts.items())
    assert times_s["interleaved"] < times_s["1f1b"]


@pytest.mark.parametrize("seed", range(8))
def test_the_slowest_interval_is_the_best_of_all_cuts(seed):
    graph, cluster = random_graph(seed, n=7, chain=True), random_cluster(seed, 2)
    plan = plan_layers(graph, cluster, chunks=2)
    assert [s.device for s in plan.stages] == [0, 1, 0, 1]
    # An interval costs what it costs as one of four devices of a chain; unlike devices come in the order of rounds.
    four = replace(cluster, devices=tuple(replace(d, name=f"cuda:{i}") for i, d in enumerate(cluster.devices * 2)))
    slowest = []
    for owners in product(range(4), repeat=7):
        if list(owners) == sorted(owners) and set(owners) == set(range(4)):
            slowest.append(max(naive(graph, four, owners)))
    assert max(s.load_s for s in plan.stages) == pytest.approx(min(slowest))
    loads = [sum(s.load_s for s in plan.stages if s.device == d) for d in (0, 1)]
    assert plan.bottleneck_s == pytest.approx(max(loads))


def naive(graph, cluster, owners):
    device_of = {op.name: owner for op, owner in zip(graph.operators, owners, strict=True)}
    return naive_loads(graph, cluster, device_of, 1)


@pytest.mark.parametrize("part", [0.55, 0.7, 1.0])
def test_each_device_holds_all_its_chunks(part):
    graph = random_graph(1, n=16, chain=True)
    whole = forecast_memory(graph, layer(graph, equal_cluster(1)), 1).peak_bytes
    cluster = equal_cluster(2, memory_bytes=int(whole * part * 1.3))
    placement = layer(graph, cluster, chunks=2)
    assert rounds(graph, placement) == [0, 1, 0, 1]
    forecast_memory(graph, placement, 2).check(graph, placement, cluster)


def test_chunks_that_do_not_fit_are_refused_with_what_may():
    with pytest.raises(OutOfMemoryError, match=r"'cuda:\d, chunk \d' .*fewer chunks may fit"):
        layer(random_graph(2, n=8), equal_cluster(2, memory_bytes=1000), chunks=2)


def test_too_few_operators_are_refused_with_how_many_chunks_there_may_be():
    with pytest.raises(PlacementError, match=r"Random has 7 operators .* chunks=4 on each of 2 devices; give chunks=3"):
        layer(random_graph(0, n=7, chain=True), equal_cluster(2), chunks=4)
    with pytest.raises(PlacementError, match="chunks=0"):
        layer(random_graph(0), equal_cluster(2), chunks=0)
