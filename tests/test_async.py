"""Asynchronous pipelining: updates within the step, stale gradients, counted."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphpart as gp
from graphpart.errors import ArgumentError, AutogradError
from graphpart.ir.cluster import Cluster, Device, Link
from graphpart.ir.schedule import Schedule
from graphpart.ir.workload import Workload
from graphpart.order import Async, asynchronous, dry_run, in_flight, make_schedule, schedule_text, staircase
from graphpart.simulator import simulate_workload
from tests.helpers.pipelines import pipeline


def workload(num_stages: int, num_microbatches: int, **options: object) -> Workload:
    return replace(pipeline(num_stages, num_microbatches, updates=True), **options)


def layers(width: int = 16, depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]).double()


def step_of(parted: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> gp.TrainStep:
    return parted.train_step(x, target=y, loss_fn=F.mse_loss, optimizer=optimizer)


def test_staircase_of_three_devices() -> None:
    made = workload(3, 4, update_every=1)
    schedule = asynchronous(made, Async())
    dry_run(made, schedule)
    assert schedule_text(made, schedule).splitlines() == [
        "0F0 0F1 0F2 0B0 0U0 0F3 0B1 0U1 0B2 0U2 0B3 0U",
        "1F0 1F1 1B0 1U0 1F2 1B1 1U1 1F3 1B2 1U2 1B3 1U",
        "2F0 2B0 2U0 2F1 2B1 2U1 2F2 2B2 2U2 2F3 2B3 2U",
    ]
    assert in_flight(made, schedule) == (3, 2, 1)
    assert "2U0" in staircase(made, schedule)


def test_bound_in_flight_and_updates_after_several_gradients() -> None:
    made = workload(3, 6, update_every=2)
    schedule = asynchronous(made, Async(in_flight=1, update_every=2))
    assert max(in_flight(made, schedule)) == 1
    updates = [[made.texts[t] for t in line if t.kind == "U"] for line in schedule.tasks]
    assert updates == [[f"{d}U1", f"{d}U3", f"{d}U"] for d in range(3)]


@pytest.mark.parametrize(
    ("num_microbatches", "name", "makespan", "busy"), [(1, "gpipe", 6, 1 / 3), (4, "gpipe", 12, 2 / 3)]
)
def test_A1_synchronous_figures(num_microbatches: int, name: str, makespan: float, busy: float) -> None:
    made = workload(3, num_microbatches)
    timeline = unit_timeline(made, make_schedule(name, made))
    assert timeline.makespan_s == pytest.approx(makespan)
    assert 1 - timeline.bubble == pytest.approx(busy)


def test_A1_asynchronous_steady_state_is_fully_busy() -> None:
    makespans = []
    for num_microbatches in (20, 21, 200):
        made = workload(3, num_microbatches, update_every=1)
        timeline = unit_timeline(made, asynchronous(made, Async()))
        makespans.append(timeline.makespan_s)
    assert makespans[1] - makespans[0] == pytest.approx(2.0)  # an instance more takes no more than its own work
    assert 1 - timeline.bubble > 0.98


def unit_timeline(made: Workload, schedule: Schedule) -> gp.Timeline:
    devices = tuple(
        Device(f"cuda:{i}", "toy", {"float32": 1.0}, 10**9, 1e30, efficiency=1.0, overhead_s=0.0)
        for i in range(made.program.num_devices)
    )
    times = {task: 0.0 if task.kind == "U" else 1.0 for task in made.waits_for}
    return simulate_workload(made, schedule, Cluster(devices, Link(0.0, 1e30)), times=times)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("stash", [True, False])
@pytest.mark.parametrize(("in_flight_bound", "every"), [(None, 1), (2, 2), (4, 1), (None, 3)])
def test_measured_staleness_equals_the_simulators(stash: bool, in_flight_bound: int | None, every: int) -> None:
    options = gp.Async(in_flight_bound, every, stash)
    parted = gp.partition(layers(), 3, strategy="layer", num_microbatches=8, schedule=options)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.05)
    x = torch.randn(16, 16, dtype=torch.float64)
    for _ in range(3):
        found = step_of(parted, optimizer, x, x.roll(1, 1))
        assert Counter(found.staleness) == Counter(gp.simulate(parted.plan).staleness) == found.timeline.staleness
    assert max(found.staleness) > 0


def by_hand(
    plain: nn.Sequential,
    stages: list[list[int]],
    schedule: list[list[str]],
    x: torch.Tensor,
    y: torch.Tensor,
    lr: float,
) -> None:
    """PipeDream with stashed weights on one device, straight from the definition: SGD, an update a microbatch."""
    stashed: dict[tuple[int, int], nn.Sequential] = {}
    inputs: dict[tuple[int, int], torch.Tensor] = {}
    outputs: dict[tuple[int, int], torch.Tensor] = {}
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    position = [0] * len(stages)
    while any(position[s] < len(schedule[s]) for s in range(len(stages))):
        for s, own in enumerate(stages):
            if position[s] == len(schedule[s]):
                continue
            kind, m = schedule[s][position[s]][1], int(schedule[s][position[s]][2:])
            if kind == "F" and (s == 0 or (s - 1, m) in outputs):
                stashed[s, m] = copy.deepcopy(nn.Sequential(*[plain[i] for i in own]))
                source = x[2 * m : 2 * m + 2] if s == 0 else outputs[s - 1, m].detach()
                inputs[s, m] = source.requires_grad_(s > 0)
                outputs[s, m] = stashed[s, m](inputs[s, m])
            elif kind == "B" and (s == len(stages) - 1 or (s + 1, m) in gradients):
                if s == len(stages) - 1:
                    F.mse_loss(outputs[s, m], y[2 * m : 2 * m + 2]).backward()
                else:
                    outputs[s, m].backward(gradients[s + 1, m])
                if s > 0:
                    gradients[s, m] = inputs[s, m].grad
                with torch.no_grad():
                    used = nn.Sequential(*[plain[i] for i in own])
                    for parameter, of in zip(used.parameters(), stashed.pop((s, m)).parameters(), strict=True):
                        parameter -= lr * of.grad
            else:
                continue
            position[s] += 1


def test_stashed_weights_are_pipedreams() -> None:
    model = layers()
    plain = copy.deepcopy(model)
    parted = gp.partition(model, 3, strategy="layer", num_microbatches=8, schedule="async")
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    x = torch.randn(16, 16, dtype=torch.float64)
    y = x.roll(1, 1)
    step_of(parted, optimizer, x, y)
    plan = parted.plan
    device_of = {op.name: plan.placement.device(op.name) for op in plan.graph.operators}
    stages: list[list[int]] = [[], [], []]
    for op in plan.graph.operators:
        if op.module_path.isdigit():
            stages[device_of[op.name]].append(int(op.module_path))
    made, lines = plan.training.workload, plan.training.schedule.tasks
    schedule = [
        [f"{s}{t.kind}{made.microbatch_of(t)}" for t in line if t.kind in "FB" and made.microbatch_of(t) is not None]
        for s, line in enumerate(lines)
    ]
    by_hand(plain, stages, schedule, x, y, 0.1)
    for ours, theirs in zip(parted.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_one_device_has_no_stale_gradients_and_is_sgd_on_microbatches() -> None:
    model = layers(depth=2)
    plain = copy.deepcopy(model)
    parted = gp.partition(model, 1, strategy="single", num_microbatches=4, schedule="async")
    ours = torch.optim.AdamW(parted.parameters(), lr=0.01)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
    x = torch.randn(8, 16, dtype=torch.float64)
    found = step_of(parted, ours, x, x.roll(1, 1))
    for part, wanted in zip(x.chunk(4), x.roll(1, 1).chunk(4), strict=True):
        theirs.zero_grad()
        F.mse_loss(plain(part), wanted).backward()
        theirs.step()
    assert set(found.staleness) == {0}
    for a, b in zip(parted.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_tied_weights_are_updated_once_a_step() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.body = layers()
            self.head = nn.Linear(16, 11, bias=False)
            self.double()
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embed(ids)))

    torch.manual_seed(0)
    parted = gp.partition(Tied(), 2, strategy="layer", num_microbatches=4, schedule="async")
    optimizer = torch.optim.Adam(parted.parameters(), lr=0.01)
    ids = torch.randint(0, 11, (8,))
    losses = [
        float(parted.train_step(ids, target=ids.roll(1), loss_fn=F.cross_entropy, optimizer=optimizer).loss)
        for _ in range(20)
    ]
    assert losses[-1] < losses[0] / 2
    steps = {n: int(optimizer.state[p]["step"]) for n, p in parted.named_parameters()}
    assert steps["embed.weight"] == 20
    assert steps["body.0.weight"] == 80


def test_what_needs_all_gradients_is_refused() -> None:
    parted = gp.partition(layers(), 2, strategy="layer", num_microbatches=2, schedule="async")
    x = torch.randn(4, 16, dtype=torch.float64)
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
    for options in (
        {},
        {"optimizer": optimizer, "clip_grad_norm": 1.0},
        {"optimizer": optimizer, "keep_gradients": True},
    ):
        with pytest.raises(AutogradError, match="asynchronous"):
            parted.train_step(x, target=x, loss_fn=F.mse_loss, **options)
    with pytest.raises(ArgumentError, match="in_flight=0"):
        gp.Async(in_flight=0)


def test_plan_files_keep_the_choice(tmp_path) -> None:
    x = torch.randn(4, 16, dtype=torch.float64)
    plan = gp.plan(layers(), 2, (x,), strategy="layer", num_microbatches=2, schedule=gp.Async(2, 2, False))
    assert gp.Plan.load(plan.save(tmp_path / "plan.json")).schedule == gp.Async(2, 2, False)


class ReadsSlices(nn.Module):
    """What it computes of weights alone (slices, a norm, a product) is computed once a step, not once a microbatch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Parameter(torch.randn(32, 8))
        self.gain, self.direction = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.randn(8, 8))
        self.body, self.unread = nn.Linear(8, 4), nn.Linear(8, 4)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.positions[: x.shape[1]]
        x = F.linear(x, self.gain * self.direction / self.direction.norm(dim=1, keepdim=True))
        return self.body(torch.tanh(x)).mean(1)


ONCE = ("positions", "gain", "direction")


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("batch", gp.Async()),
        ("layer", gp.Async(update_every=2, stash_weights=False)),
        pytest.param("auto", gp.Async(), marks=pytest.mark.slow),
        pytest.param("batch", gp.Async(2, 3, False), marks=pytest.mark.slow),
        pytest.param("feature", gp.Async(), marks=pytest.mark.slow),
    ],
)
def test_weights_that_the_step_reads_once_are_updated_once_by_the_whole_batch(strategy: str, options: gp.Async) -> None:
    model = ReadsSlices()
    model.body.requires_grad_(False)  # what is left is one update of each, at the step's end, as on one device
    plain = copy.deepcopy(model)
    x, y = torch.randn(16, 12, 8, dtype=torch.float64), torch.randint(4, (16,))
    parted = gp.partition(model, 2, strategy=strategy, num_microbatches=4, schedule=options)
    optimizer = torch.optim.SGD([getattr(parted, name) for name in ONCE], lr=0.1)
    parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=optimizer)
    F.cross_entropy(plain(x), y).backward()
    torch.optim.SGD([getattr(plain, name) for name in ONCE], lr=0.1).step()
    for name in ONCE:
        torch.testing.assert_close(parted.state_dict()[name], getattr(plain, name).detach())


def test_weights_of_both_kinds_train_together() -> None:
    parted = gp.partition(ReadsSlices(), 2, strategy="batch", num_microbatches=4, schedule="async")
    optimizer = torch.optim.Adam(parted.parameters(), lr=0.01)
    x, y = torch.randn(16, 12, 8, dtype=torch.float64), torch.randint(4, (16,))
    losses = [
        float(parted.train_step(x, target=y, loss_fn=F.cross_entropy, optimizer=optimizer).loss) for _ in range(10)
    ]
    assert losses[-1] < losses[0]
    assert {int(optimizer.state[getattr(parted, name)]["step"]) for name in ONCE} == {10}
