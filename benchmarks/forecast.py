"""One training step as simulated beside the same step as measured, on three models, two workers of one thread each.

For each model and schedule the step is forecast from data sheets, and calibrated: from the time of each task when no
other runs, from its time in steps by the other schedule, and from its time in other steps by this one. Of several
measured steps the one with the median makespan is shown. It is also simulated from the times that its own tasks took,
which is no forecast: what is missed then is the simulator's own fault. The step's time is then taken apart by device:
what tasks took more than in the steps by the other schedule, what the worker spent between tasks, and how much longer
it stood still.

    python benchmarks/forecast.py [--model gpt2 resnet branches] [--schedule gpipe 1f1b] [--rounds 7]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

import graphpart as gp
from graphpart.cost.time.calibration import Calibration
from graphpart.ir.schedule import Task

Batch = dict[str, Tensor]
BATCH = 8


class Branches(nn.Module):
    """Four unlike branches on the same input, side by side in every block; their sum goes on."""

    def __init__(self, width: int = 384, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
                for inner in (width, 2 * width, 3 * width, 4 * width)
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Squared error of ``x``, ``[batch, seq, width]``, after all blocks, against ``labels``."""
        for block in self.blocks:
            x = x + sum(branch(x) for branch in block)
        return nn.functional.mse_loss(x, labels)


def gpt2() -> tuple[nn.Module, Batch]:
    """GPT-2 with 6 layers of 384, 128 tokens a sample."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6, vocab_size=2048, n_positions=128))
    ids = torch.randint(0, 2048, (BATCH, 128))
    return model, {"input_ids": ids, "labels": ids.clone()}


def resnet() -> tuple[nn.Module, Batch]:
    """ResNet-18, 96 x 96 pixels."""
    config = ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512], num_labels=100)
    model = ResNetForImageClassification(config)
    return model, {"pixel_values": torch.randn(BATCH, 3, 96, 96), "labels": torch.randint(0, 100, (BATCH,))}


def branches() -> tuple[nn.Module, Batch]:
    """Three blocks of four branches, 384 wide, 128 tokens a sample."""
    return Branches(), {"x": torch.randn(BATCH, 128, 384), "labels": torch.randn(BATCH, 128, 384)}


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Batch]]] = {"gpt2": gpt2, "resnet": resnet, "branches": branches}


def partition(model: nn.Module, schedule: str, microbatches: int) -> Any:
    """The model over two workers, by layer, with the batch statistics of ResNet by microbatch."""
    options: dict[str, Any] = {"num_microbatches": microbatches, "schedule": schedule, "batch_norm": "microbatch"}
    return gp.partition(model.train(), 2, strategy="layer", **options)


def between_tasks_s(timeline: gp.Timeline, device: int) -> float:
    """What a worker spent neither in a task nor in a wait, between its first task and its last."""
    own = [e for e in timeline.events if e.device == device and e.kind != "send"]
    own.sort(key=lambda e: e.end_s)
    return sum(max(0.0, after.start_s - before.end_s) for before, after in pairwise(own))


def missed(forecast: gp.Timeline, measured: gp.Timeline) -> list[str]:
    """Where the time went that a forecast missed, a line a device, in parts of the measured step."""
    step_s = measured.makespan_s
    lines = []
    for device, name in enumerate(measured.names):
        parts = {
            f"{kind} took": measured.spent_s(kind)[device] - forecast.spent_s(kind)[device] for kind in measured.kinds
        }
        gaps_s = between_tasks_s(measured, device)
        parts["between tasks"] = gaps_s
        idle_s = step_s - measured.busy_s[device] - gaps_s
        parts["stood still"] = idle_s - (forecast.makespan_s - forecast.busy_s[device])
        parts["of that, sends"] = measured.spent_s("send")[device]
        lines.append(f"    {name}: " + ", ".join(f"{what} {s / step_s:+.1%}" for what, s in parts.items()))
    return lines


@dataclass
class Case:
    """One model under one schedule.

    Attributes:
        parted: the model on its workers.
        batch: what it is trained on.
        optimizer: AdamW.
        together: times of tasks while others run beside them.
        alone: times of tasks while no other runs.
    """

    parted: Any
    batch: Batch
    optimizer: torch.optim.Optimizer
    together: Calibration
    alone: Calibration

    @classmethod
    def of(cls, name: str, schedule: str, microbatches: int, rounds: int) -> Case:
        """Build and calibrate it."""
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        parted = partition(model, schedule, microbatches)
        optimizer = torch.optim.AdamW(parted.parameters(), lr=1e-5)
        for _ in range(2):
            parted.train_step(optimizer=optimizer, **batch)
        together, alone = (
            gp.calibrate(parted, optimizer=optimizer, num_rounds=rounds, alone=alone, **batch)
            for alone in (False, True)
        )
        return cls(parted, batch, optimizer, together, alone)

    def measured(self, rounds: int) -> tuple[gp.Timeline, str]:
        """Of several steps the one with the median makespan, and the span of all."""
        steps = [
            self.parted.train_step(optimizer=self.optimizer, record=True, **self.batch).timeline for _ in range(rounds)
        ]
        middle = median(step.makespan_s for step in steps)
        fastest, slowest = (pick(step.makespan_s for step in steps) * 1e3 for pick in (min, max))
        found = min(steps, key=lambda step: abs(step.makespan_s - middle))
        return found, f"{rounds} steps of {fastest:.0f} to {slowest:.0f} ms"


def report(name: str, schedules: Sequence[str], microbatches: int, rounds: int) -> None:
    """Measure one model under each schedule and print what was forecast and what came."""
    cases = {schedule: Case.of(name, schedule, microbatches, rounds) for schedule in schedules}
    for schedule, case in cases.items():
        measured, span = case.measured(rounds)
        print(f"\n{name}, {schedule}, {microbatches} microbatches: {span}")
        taken = Calibration({Task(e.kind, e.name): e.end_s - e.start_s for e in measured.events if e.is_work})
        times = {
            "data sheets": None,
            "tasks alone": case.alone,
            **{f"tasks by {other}": found.together for other, found in cases.items() if other != schedule},
            f"tasks by {schedule}": case.together,
            "as its own tasks took": taken,
        }
        forecasts = {what: gp.simulate(case.parted.plan, found) for what, found in times.items()}
        for what, forecast in forecasts.items():
            print(f"  {what}: simulated {forecast.makespan_s / measured.makespan_s:.3f} of measured")
        shown = next((f"tasks by {other}" for other in cases if other != schedule), "tasks alone")
        print("  " + str(forecasts[shown].compare(measured)).replace("\n", "\n  "))
        print(f"  where the time went that the forecast from {shown} missed:")
        print("\n".join(missed(forecasts[shown], measured)), flush=True)


def main() -> None:
    """Print a report for each model and schedule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--schedule", nargs="+", default=["gpipe", "1f1b"])
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(2)  # one for each worker
    for name in options.model:
        report(name, options.schedule, options.microbatches, options.rounds)


if __name__ == "__main__":
    main()
