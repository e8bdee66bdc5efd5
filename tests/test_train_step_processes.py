"""``train_step`` in processes on Gloo gives the same bits as in threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpart as gp
from tests.helpers.meshes import in_rounds
from tests.helpers.processes import process_group, run_processes

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 5
WIDTH = 12


class Deep(nn.Module):
    """Layers for two devices in two rounds; dropout, BatchNorm, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mean(1)
        for i, layer in enumerate(self.layers):
            x = F.dropout(torch.tanh(layer(x)), 0.1, self.training) + x
            x = self.norm(x) if i == 2 else x
        return self.head(x)


CASES = {
    "1f1b": (2, {"strategy": "layer", "num_microbatches": 4}),
    "zero-bubble": (3, {"strategy": "layer", "num_microbatches": 3}),
    "interleaved": (2, {"strategy": "layer", "strategy_options": {"chunks": 2}, "num_microbatches": 4}),
    "list": (2, {"strategy": "feature", "num_microbatches": 2}),
}
"""By schedule: the number of devices, and how the model is split."""

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2 tp2 zero1": (4, {"num_microbatches": 2, "schedule": "list"}),
    "dp2 pp2": (4, {"num_microbatches": 4, "schedule": "1f1b"}),
    "tp2 pp2 vp2": (4, {"num_microbatches": 4, "schedule": "interleaved"}),
    "dp2 tp2 pp2": (8, {"num_microbatches": 2, "schedule": "zero-bubble"}),
}
"""By degrees: the number of devices, and how they are run; values go in rounds, however small."""


def train(case: str) -> dict[str, Tensor]:
    """Steps that clip, steps that only add up gradients, and plain ones; returns all that they leave behind."""
    world, options = {**CASES, **MESHES}[case]
    options = {"strategy": case, **options} if case in MESHES else {"schedule": case, **options}
    with in_rounds(case in MESHES):
        return train_steps(gp.partition(seeded(), world, **options))


def seeded() -> Deep:
    """The model, of one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Deep()


def train_steps(parted: gp.PartitionedModule) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    torch.manual_seed(1)
    found, messages = {}, 0
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        ids, labels = (torch.randint(0, 11, shape, generator=draw) for shape in ((8, 5), (8,)))
        labels[step] = -100
        last = step % 3 != 1
        done = parted.train_step(
            ids,
            target=labels,
            loss_fn=F.cross_entropy,
            optimizer=optimizer if last else None,
            clip_grad_norm=0.5 if step % 3 == 2 else None,
            return_outputs=True,
            keep_gradients=step == STEPS - 1,
        )
        found[f"loss {step}"], found[f"outputs {step}"] = done.loss, done.outputs
        if done.grad_norm is not None:
            found[f"norm {step}"] = done.grad_norm
        messages += parted.last_step.num_messages
    assert "norm 2" in found
    found |= {f"state {name}": value.clone() for name, value in parted.state_dict().items()}
    found |= {f"gradient {name}": value.clone() for name, value in parted.grad_dict().items() if value is not None}
    return {**found, "messages": torch.tensor(messages)}


def _process(rank: int, world: int, schedules: list[str], folder: str) -> None:
    with process_group(rank, world, folder):
        torch.save({schedule: train(schedule) for schedule in schedules}, f"{folder}/rank{rank}.pt")


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_fused_steps_in_processes_give_the_bits_of_threads(world: int) -> None:
    schedules = [case for case, (number, _) in {**CASES, **MESHES}.items() if number == world]
    folder = run_processes(_process, world, schedules)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    for schedule in schedules:
        expected = train(schedule)
        assert sum(int(result[schedule]["messages"]) for result in results) == int(expected.pop("messages")) > 0
        for result in results:
            found = result[schedule]
            assert found.keys() == {*expected, "messages"}
            different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
            assert not different, (schedule, different)


def train_asynchronously() -> dict[str, Tensor]:
    """Steps that update within the step: losses, staleness and weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parted = gp.partition(Deep().eval(), 2, strategy="layer", num_microbatches=4, schedule="async")
    optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-2)
    found, stale = {}, 0
    for step in range(STEPS):
        ids, labels = (torch.randint(0, 11, s, generator=torch.Generator().manual_seed(step)) for s in ((8, 5), (8,)))
        done = parted.train_step(ids, target=labels, loss_fn=F.cross_entropy, optimizer=optimizer)
        found[f"loss {step}"] = done.loss
        stale += sum(count for updates, count in done.staleness.items() if updates)
    found |= {f"state {name}": value.clone() for name, value in parted.state_dict().items()}
    return {**found, "stale": torch.tensor(stale)}


def _asynchronous(rank: int, world: int, folder: str) -> None:
    with process_group(rank, world, folder):
        torch.save(train_asynchronously(), f"{folder}/rank{rank}.pt")


def test_asynchronous_steps_in_processes_give_the_bits_of_threads() -> None:
    folder = run_processes(_asynchronous, 2)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    expected = train_asynchronously()
    assert sum(int(result.pop("stale")) for result in results) == int(expected.pop("stale")) > 0
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(result[name], value), name


def _stepped(rank: int, world: int, folder: str) -> None:
    """Notes which parameters each call of an optimizer's step has."""
    with process_group(rank, world, folder):
        torch.manual_seed(0)
        parted = gp.partition(Deep(), world, strategy="layer", num_microbatches=2, schedule="1f1b")
        optimizer = torch.optim.SGD(parted.parameters(), lr=0.1)
        sizes = []
        step = torch.optim.SGD.step

        def counted(self: torch.optim.SGD) -> None:
            sizes.append(sum(len(group["params"]) for group in self.param_groups))
            step(self)

        torch.optim.SGD.step = counted
        ids, labels = torch.randint(0, 11, (8, 5)), torch.arange(8)
        parted.train_step(ids, target=labels, loss_fn=F.cross_entropy, optimizer=optimizer)
        torch.save((sizes, sum(len(g["params"]) for g in optimizer.param_groups)), f"{folder}/rank{rank}.pt")


def test_each_process_steps_its_own_parameters() -> None:
    folder = run_processes(_stepped, 2)
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    assert sum(sum(sizes) for sizes, _ in results) == results[0][1]
    assert all(0 < sum(sizes) < everything for sizes, everything in results)


def _calibrated(rank: int, world: int, folder: str) -> None:
    """Measures tasks between two steps, and notes what the second gives."""
    with process_group(rank, world, folder):
        calibrations = []
        for calibrates in (True, False):
            torch.manual_seed(0)
            parted = gp.partition(Deep().eval(), world, strategy="layer", num_microbatches=2, schedule="1f1b")
            optimizer = torch.optim.AdamW(parted.parameters(), lr=0.1)
            batch = {"target": torch.arange(8), "loss_fn": F.cross_entropy, "optimizer": optimizer}
            ids = torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(0))
            parted.train_step(ids, **batch)
            if calibrates:
                calibration = gp.calibrate(parted, ids, num_rounds=1, **batch)
                assert calibration.times_s.keys() == parted.plan.training.workload.waits_for.keys()
                calibrations.append(dict(calibration.times_s))
            calibrations.append(float(parted.train_step(ids, **batch).loss))
        torch.save(calibrations, f"{folder}/rank{rank}.pt")


def test_processes_measure_tasks_together_and_are_left_as_they_were() -> None:
    folder = run_processes(_calibrated, 2)
    (times, after, plain), others = (torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert [times, after, plain] == others
    assert all(time_s > 0 for time_s in times.values())
    assert after == plain
