"""Tasks measured one at a time, and the forecast that rests on them."""

from __future__ import annotations

import copy
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpart as gp
from graphpart.cost.time.calibration import Calibration
from graphpart.errors import GraphpartError, PlanError
from graphpart.ir.schedule import Task
from graphpart.runtime.executors.processes import DistributedExecutor

pytestmark = pytest.mark.sampled(2)


class Net(nn.Module):
    """Layers with batch statistics and dropout, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Linear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def parted(schedule: str = "1f1b", devices: int = 2) -> Any:
    torch.manual_seed(0)
    options: Any = {"strategy": "layer", "num_microbatches": 4, "batch_norm": "microbatch"}
    return gp.partition(Net().train(), devices, schedule=schedule, **options)


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_every_task_has_a_time_and_the_forecast_takes_it(schedule: str, devices: int, alone: bool) -> None:
    model = parted(schedule, devices)
    calibration = gp.calibrate(model, X, optimizer=adamw(model), num_rounds=2, alone=alone)
    workload = model.plan.training.workload
    assert calibration.times_s.keys() == workload.waits_for.keys()
    assert all(time_s > 0 for time_s in calibration.times_s.values())
    forecast = gp.simulate(model.plan, calibration)
    for event in forecast.events:
        if event.is_work:
            expected = calibration.times_s[Task(event.kind, event.name)]
            assert event.end_s - event.start_s == pytest.approx(expected)
    assert forecast.peak_memory_bytes
    by_kind: dict[tuple[str, int], set[float]] = {}
    for task, time_s in calibration.times_s.items():
        if task.kind != "U" and workload.microbatch_of(task) is not None:
            segment = workload.program.segment[task.segment]
            by_kind.setdefault((task.kind, segment.level), set()).add(time_s)
    assert by_kind and all(len(times) == 1 for times in by_kind.values())


def test_one_task_runs_at_a_time() -> None:
    model = parted()
    model.train_step(X, optimizer=adamw(model))
    with model._traces.executor.one_at_a_time():
        timeline = model.train_step(X, optimizer=adamw(model), record=True).timeline
    work = sorted((e for e in timeline.events if e.is_work), key=lambda e: e.start_s)
    assert {e.device for e in work} == {0, 1} and len(work) == len(model.plan.training.workload.waits_for)
    assert all(a.end_s <= b.start_s for a, b in pairwise(work))


def test_the_model_and_its_training_are_left_as_they_were() -> None:
    models = [parted(), parted()]
    optimizers = [adamw(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(3)
        model.train_step(X, optimizer=optimizer)
        model.layers[0].weight.grad = torch.ones(16, 8)
    before = copy.deepcopy(models[0].state_dict())
    generator = torch.get_rng_state()
    gp.calibrate(models[0], X, optimizer=optimizers[0], num_rounds=1)
    assert torch.equal(torch.get_rng_state(), generator)
    assert models[0].layers[0].weight.grad.eq(1).all() and models[0].layers[4].weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[0].state_dict().items())
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(4)
        model.train_step(X, optimizer=optimizer)
    other = models[1].state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in models[0].state_dict().items())


def test_without_an_optimizer_gradients_stay_as_they_were() -> None:
    model = parted()
    assert gp.calibrate(model, X, num_rounds=1).times_s
    assert all(p.grad is None for p in model.parameters())


def test_a_calibration_of_another_plan_is_refused() -> None:
    model, other = parted("1f1b"), parted("zero-bubble")
    other.train_step(X)
    with pytest.raises(PlanError, match=r"another plan or schedule: W:\S+ is in one"):
        gp.simulate(other.plan, gp.calibrate(model, X, num_rounds=1))


@pytest.mark.parametrize("alone", [False, True])
def test_a_failure_on_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    model = parted()
    model.train_step(X)

    def step(*_: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken on purpose"):
        patch.setattr(torch.optim.SGD, "step", step)
        gp.calibrate(model, X, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), alone=alone)
    assert model.train_step(X).loss.isfinite()


def test_devices_of_other_processes_take_no_turns() -> None:
    model = parted()
    model._traces.executor = object.__new__(DistributedExecutor)
    with pytest.raises(GraphpartError, match="devices of one process"):
        gp.calibrate(model, X, alone=True)


def test_times_of_one_schedule_serve_another_with_the_same_tasks() -> None:
    model, other = parted("gpipe"), parted("1f1b")
    other.train_step(X)
    calibration = gp.calibrate(model, X, num_rounds=1)
    events = [e for e in gp.simulate(other.plan, calibration).events if e.is_work]
    assert len(events) == len(calibration.times_s)
    assert all(e.end_s - e.start_s == pytest.approx(calibration.times_s[Task(e.kind, e.name)]) for e in events)


def test_times_are_medians() -> None:
    model = parted()
    model.train_step(X)
    workload, timeline = model.plan.training.workload, model.plan.training.timeline
    found = Calibration.of(workload, [timeline] * 3)
    for event in timeline.events:
        if event.is_work:
            assert found.times_s[Task(event.kind, event.name)] == pytest.approx(event.end_s - event.start_s)
