"""Every strategy and every schedule on workers that share a card, and on a card beside the CPU."""

from __future__ import annotations

from typing import Any

import torch

import graphpart as gp
from gpu_parts.harness import Figures, Setting
from gpu_parts.models import (
    check,
    cut_by_hand,
    difference,
    exact_products,
    parted_training,
    partition,
    pictures,
    plain_training,
    words,
)

STRATEGIES = ("single", "layer", "batch", "feature", "hybrid", "free", "spatial", "auto")
SCHEDULES = ("gpipe", "1f1b", "zero-bubble", "interleaved", "list", "auto")
TOLERANCE = 2e-4


def calls(setting: Setting) -> Figures:
    """Loss, gradients and buffers of a call by each strategy, on 2, 3 and 4 workers."""
    exact_products()
    largest = 0.0
    for i, strategy in enumerate(STRATEGIES):
        model, batch = pictures(setting) if strategy == "spatial" else words(setting, dropout=0.1)
        counts = (2 + i % 2,) if setting.tiny else (2, 3 + i % 2)
        for count in counts:
            parted = partition(model, setting.workers(count), strategy=strategy)
            report = parted.verify(**batch)
            largest = max(largest, *report.differences.values())
    return {"largest difference": largest}


def schedules(setting: Setting) -> Figures:
    """Two fused steps by each pair of a strategy and a schedule, against eager steps."""
    exact_products()
    splits = [name for name in STRATEGIES if name not in ("single", "auto")]
    pairs = [(strategy, schedule) for strategy in splits for schedule in SCHEDULES]
    if setting.tiny:
        pairs = list(zip(splits, SCHEDULES, strict=True))
    expected: dict[str, Any] = {}
    largest = 0.0
    for i, (strategy, schedule) in enumerate(pairs):
        kind = "pictures" if strategy == "spatial" else "words"
        model, batch = pictures(setting) if kind == "pictures" else words(setting)
        if kind not in expected:
            expected[kind] = plain_training(model, batch)
        options: dict[str, Any] = {"strategy": strategy, "schedule": schedule, "num_microbatches": 2}
        if schedule == "interleaved" and strategy == "layer":
            options["strategy_options"] = {"chunks": 2}
        found = parted_training(partition(model, setting.workers(2 + i % 3), **options), batch)
        largest = max(largest, check(f"{strategy}, {schedule}", difference(found, expected[kind]), TOLERANCE))
    return {"steps compared": len(pairs), "largest difference": largest}


def asynchronous(setting: Setting) -> Figures:
    """Steps with updates while microbatches are under way: other numbers, but a loss that falls, and its staleness."""
    model, batch = words(setting)
    parted = partition(
        model, setting.workers(2), strategy="layer", schedule="async", num_microbatches=setting.size(8, 4)
    )
    optimizer = torch.optim.SGD(parted.parameters(), lr=0.05)
    steps = [parted.train_step(optimizer=optimizer, **batch) for _ in range(setting.size(10, 3))]
    first, last = float(steps[0].loss), float(steps[-1].loss)
    assert last < first, f"the loss went from {first} to {last}"
    assert steps[-1].staleness
    return {"first loss": first, "last loss": last, "most updates behind": max(steps[-1].staleness)}


def mixes(setting: Setting) -> Figures:
    """A card beside workers of the CPU: unlike devices, uneven shares, parameters in parts on both."""
    exact_products()
    first = setting.workers(2)[:1] if setting.device == "cpu" else ["cuda:0"]
    host = ["cpu:1", "cpu:2"] if setting.device == "cpu" else ["cpu:0", "cpu:1"]
    figures: dict[str, float] = {}
    by_layer = {"embedding": 0, "blocks.0": 0, "blocks.1.*": 1, "head": 1}
    cases: list[tuple[list[str], Any]] = [([*first, host[0]], cut_by_hand()), ([host[0], *first], by_layer)]
    if not setting.tiny:
        shared = ["cuda:0#0", "cuda:0#1"] if setting.device == "cuda" else first
        cases += [([*first, host[0]], "batch"), ([*first, *host], "hybrid"), ([*shared, host[0]], "free")]
        cases += [([*first, host[0]], "feature")]
    for devices, strategy in cases:
        model, batch = words(setting)
        expected = plain_training(model, batch)
        parted = partition(model, devices, strategy=strategy, num_microbatches=2)
        name = f"{strategy if isinstance(strategy, str) else 'by hand'} on {' '.join(devices)}"
        if not isinstance(strategy, str):
            parted.verify(**batch)
            assert {s.device for s in parted.plan.program.segments} == {0, 1}
        figures[name] = check(name, difference(parted_training(parted, batch), expected), TOLERANCE)
    if setting.device == "cuda":
        model, batch = words(setting)  # what a user has who leaves the moving to the library
        parted = partition(model.cpu(), ["cuda:0#0", "cuda:0#1"], strategy="layer")
        parted.verify(**{name: tensor.cpu() for name, tensor in batch.items()})
    return figures


def uneven(setting: Setting) -> Figures:
    """Shares of samples and of columns that differ, by hand."""
    exact_products()
    model, batch = words(setting)
    expected = plain_training(model, batch)
    figures: dict[str, float] = {}
    for name, constraint in {
        "samples, 2 : 1 : 1": gp.split("blocks.*.mlp.*", 0, {0: 2, 1: 1, 2: 1}),
        "columns, 5 : 2 : 1": gp.split("blocks.*.mlp.0", "n", {0: 5, 1: 2, 2: 1}),
    }.items():
        parted = partition(model, setting.workers(3), strategy=[constraint])
        figures[name] = check(name, difference(parted_training(parted, batch), expected), TOLERANCE)
    return figures
