"""``benchmarks/twenty_steps.py``: what it says of equal, wrong and refused trainings; some steps of some models."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphpart.errors import TraceError

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import twenty_steps
from twenty_parts import MAKERS, training
from twenty_parts.report import page
from twenty_parts.training import MODES, Compared, Training, compare, train

NUM_STEPS = 3


def small() -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    batches = [{"input": torch.randn(6, 4, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    return Training(model, batches, Tensor.mean, training.adamw)


def compared(made: Training, mode: str = "layer") -> Compared:
    plain = train(copy.deepcopy(made.model), made, NUM_STEPS)
    return compare(made, plain, mode, NUM_STEPS)


@pytest.mark.parametrize("mode", ["layer", "layer, fused"])
def test_a_training_is_equal(mode: str) -> None:
    found = compared(small(), mode)
    assert found.status == "equal" and found.share == 1 and found.devices >= 2 and found.state_difference < 1e-6


def test_what_differs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = small(), training.train

    def other(*args: Any) -> training.Trained:
        found = original(*args)
        found.state["2.bias"] += 1e-2
        found.losses[1] += 1
        return found

    monkeypatch.setattr(training, "train", other)
    found = compared(made)
    assert found.status == "wrong" and found.reason == "loss of step 1 off first; at the end most: 2.bias"


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise TraceError("no such thing")

    monkeypatch.setattr(training.gp, "partition", refuses)
    assert compared(small()) == Compared("refused", reason="no such thing")


def test_what_is_equal_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, modes: list[str], _: int) -> Any:
        ran.extend(f"{name} {mode}" for mode in modes)
        return [(mode, Compared("wrong" if mode == "hybrid" else "equal", 0.0, 2e-7, 1.0, 3)) for mode in modes]

    monkeypatch.setattr(twenty_steps, "run", run)
    options = ["--only", "PINN", "--modes", "layer", "hybrid", "--out", str(tmp_path / "found.jsonl")]
    assert twenty_steps.main(options) == 1 and twenty_steps.main(options) == 1
    assert ran == ["PINN layer", "PINN hybrid", "PINN hybrid"]
    assert twenty_steps.main([*options, "--table", str(tmp_path / "page.md")]) == 0
    assert "| PINN | equal | wrong |" in (tmp_path / "page.md").read_text()


def test_the_page_says_what_is_not_equal() -> None:
    found = {("PINN", mode): Compared("equal", 1e-7, 2e-7, 1.0, 3) for mode in MODES}
    found["PINN", "hybrid"] = dataclasses.replace(found["PINN", "hybrid"], status="refused", reason="no such thing")
    text = page(found, "2026-01-01")
    assert "| PINN | equal | refused | equal | equal | equal | 1e-07 | 2e-07 | 100 % |" in text
    assert "- PINN, hybrid: refused: no such thing" in text


CASES = [
    pytest.param(name, list(MODES)[i % len(MODES)], id=name.replace(" ", "_"), marks=pytest.mark.slow)
    for i, name in enumerate(
        ("PINN", "Fourier operator", "packed LSTM", "GAT by hand", "detector with nms", "Mixtral", "wav2vec2 with CTC")
    )
]
"""Each in one of the modes, which take turns."""


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_model_trains_as_on_one_device(name: str, mode: str) -> None:
    torch.manual_seed(0)
    found = compared(MAKERS[name](), mode)
    assert found.status == "equal", found
