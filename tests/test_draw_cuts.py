"""What a plan says of cuts and collectives."""

from __future__ import annotations

import torch
from torch import nn

import graphpart as gp


def explained(strategy: object, devices: object = "3xA100") -> list[str]:
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    return gp.plan(model, devices, (torch.zeros(4, 8),), strategy=strategy).explain().splitlines()


def words(lines: list[str], start: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(start))


def test_a_plan_names_the_axes_and_sizes_of_its_cuts() -> None:
    lines = explained({"0": gp.split("n", {0: 2, 1: 1, 2: 1}), "2": gp.split("k", {0: 2, 1: 1, 2: 1})})
    rows = [line.split() for line in lines if line.startswith("linear ")]
    assert ["linear", "1", "n", "6", "+", "3", "+", "3", "cuda:0,", "cuda:1,", "cuda:2"] in rows
    assert ["linear", "1", "Σk", "6", "+", "3", "+", "3", "cuda:0,", "cuda:1,", "cuda:2"] in rows
    assert words(lines, "layer_norm")[2] == "replica"


def test_a_plan_counts_its_collectives() -> None:
    lines = explained({"0": gp.split("n", [0, 1, 2]), "2": gp.split("k", [0, 1, 2])})
    assert words(lines, "all-reduce")[1] == "1"


def test_many_devices_are_abbreviated() -> None:
    lines = explained({"0": gp.split("n", list(range(6)))}, "6xA100")
    assert any("6 × 2" in line and "cuda:0 … cuda:5 (6)" in line for line in lines)


def test_a_plan_without_cuts_says_nothing_of_them() -> None:
    assert not any("Cut" in line or "collective" in line for line in explained("layer"))
