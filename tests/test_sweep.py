"""``benchmarks/sweep.py``: what it makes of right, wrong, refused and broken models; and some of what it runs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphpart.errors import TraceError

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import sweep
import sweep_parts
from sweep_parts import harness
from sweep_parts.harness import MODES, ModeOutcome, NotRunnable, Sample, Verdict, try_out
from sweep_parts.report import report
from sweep_parts.shrink import VOCABULARY, shrunk

GOOD = ModeOutcome("right", "", 1.0, 3, 0.5)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.second(self.first(x).relu())


def sample(model: nn.Module) -> Sample:
    return Sample(model, ({"x": torch.randn(4, 8)}, {"x": torch.randn(4, 8)}))


def outcome(build: Callable[[], Sample], mode: str = "layer") -> ModeOutcome:
    ((_, found),) = try_out(build, {mode: MODES[mode]})
    return found


def test_a_model_is_right_on_its_workers() -> None:
    found = outcome(lambda: sample(Dense()))
    assert (found.status, found.share, found.reason) == ("right", 1.0, "") and found.devices >= 2


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[harness.Step]], None]) -> ModeOutcome:
    """What is said if the steps of the partitioned model were others."""
    steps = harness._steps

    def other(model: nn.Module, calls: Any) -> list[harness.Step]:
        found = steps(model, calls)
        if isinstance(model, harness.gp.PartitionedModule):
            change(found)
        return found

    monkeypatch.setattr(harness, "_steps", other)
    return outcome(lambda: sample(Dense()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda steps: steps[1].outputs[0].add_(1e-2), "output 0 off by"),
        (lambda steps: steps[1].gradients["first.weight"].mul_(1.01), "gradient of first.weight off by"),
        (lambda steps: steps[0].gradients.update({"second.bias": None}), "gradient of second.bias missing in call 1"),
        (lambda steps: steps[0].gradients.update({"unused.bias": torch.zeros(2)}), "there, but not on one device"),
        (lambda steps: steps[1].buffers["seen"].sub_(1), "buffer seen off by"),
        (lambda steps: steps[1].buffers.clear(), "buffer seen on one side only in call 2"),
        (lambda steps: steps[0].outputs.clear(), "0 outputs instead of 1 in call 1"),
    ],
)
def test_all_that_a_step_leaves_behind_is_compared(
    change: Callable[[list[harness.Step]], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = changed(monkeypatch, change)
    assert found.status == "wrong" and said in found.reason


class Random(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + next(COUNT)


COUNT = iter(range(1000))


class Broken(Dense):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this is\nbroken")


@pytest.mark.parametrize(
    ("model", "said"), [(Random, "it is random: output 0"), (Broken, "one device: this is broken")]
)
def test_what_does_not_run_on_one_device_is_not_counted(model: type[nn.Module], said: str) -> None:
    with pytest.raises(NotRunnable, match=said):
        list(try_out(lambda: sample(model()), MODES))


def test_errors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> ModeOutcome:
        def partition(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(harness.gp, "partition", partition)
        return outcome(lambda: sample(Dense()))

    refused, broken = fails(TraceError("no such thing")), fails(KeyError("x"))
    assert (refused.status, refused.reason) == ("refused", "TraceError: no such thing")
    assert (broken.status, broken.reason) == ("error", "KeyError: 'x'")


@pytest.mark.parametrize(
    ("modes", "status"),
    [
        ([GOOD, GOOD], "right"),
        ([GOOD, ModeOutcome("right", "an island", 0.79, 3)], "apart"),
        ([GOOD, ModeOutcome("right", "", 1.0, 1)], "apart"),
        ([ModeOutcome("refused"), GOOD], "refused"),
        ([ModeOutcome("refused"), ModeOutcome("wrong", "output 0")], "wrong"),
        ([GOOD, ModeOutcome("time")], "time"),
    ],
)
def test_the_worst_mode_decides(modes: list[ModeOutcome], status: str) -> None:
    verdict = Verdict("timm", "a", dict.fromkeys(MODES, GOOD) | dict(zip(MODES, modes, strict=False)))
    assert verdict.status == status
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_an_architecture_that_was_not_tried_in_all_modes_is_not_called_right() -> None:
    verdict = Verdict("timm", "a", {"layer": GOOD})
    assert verdict.status == "part" and "layer" in verdict.reason


def test_the_table_has_every_reason() -> None:
    found = [
        Verdict("timm", "a", dict.fromkeys(MODES, GOOD)),
        Verdict("timm", "b", {"layer": ModeOutcome("refused", "no | rule")}),
        Verdict("diffusers", "c", absent="not built"),
    ]
    text = report(found, {"timm": "1.0", "diffusers": "absent"}, "2026-01-01", 60, 9)
    assert "Of 9 architectures that the sweep lists, 3 have been run" in text
    assert "| timm | 2 | 1 | 0 | 0 | 1 | 0 | 0 | 0 |" in text and "- timm: a" in text
    assert "| timm: b | refused | layer: no \\| rule |" in text and "| diffusers: c | not built |" in text


def test_a_sweep_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_one(library: str, name: str, *_: Any) -> Verdict:
        ran.append(name)
        return Verdict(library, name, {"layer": ModeOutcome("refused" if name == "b" else "right", "", 1.0, 3)})

    monkeypatch.setattr(sweep, "architectures", lambda _: dict.fromkeys("abc"))
    monkeypatch.setattr(sweep, "run_one", run_one)
    out = tmp_path / "lines.jsonl"
    assert sweep.main(["--library", "timm", "--only", "a", "b", "--out", str(out)]) == 0
    assert sweep.main(["--library", "timm", "--out", str(out), "--again", "refused"]) == 0
    assert ran == ["a", "b", "b", "c"]


def test_a_missing_library_is_said_to_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert sweep.main(["--library", "timm", "--list"]) == 0
    assert "timm is missing" in capsys.readouterr().err


def test_configurations_are_shrunk_with_what_they_hold() -> None:
    from transformers import CLIPConfig, Qwen2MoeConfig

    moe, clip = shrunk(Qwen2MoeConfig), shrunk(CLIPConfig)
    assert (moe.hidden_size, moe.num_hidden_layers, moe.vocab_size, len(moe.layer_types)) == (32, 2, VOCABULARY, 2)
    assert clip.vision_config.image_size == 32 and clip.text_config.intermediate_size == 48


# --- architectures of every family --------------------------------------------------------------------------------

FAMILIES = {
    "transformers": (
        "gpt2", "llama", "bert", "t5", "vit", "resnet", "wav2vec2", "whisper", "mixtral", "clip", "detr", "bloom",
        "mamba",
    ),
    "timm": ("test_vit", "test_resnet", "test_convnext"),
    "torchvision": ("vit", "swin", "resnet18"),
    "diffusers": ("UNet2DModel", "AutoencoderKL", "PriorTransformer"),
    "torch_geometric": ("GCNConv", "GATConv", "SAGEConv"),
}  # fmt: skip
CASES = [
    pytest.param(library, name, list(MODES)[i % len(MODES)], id=f"{library}-{name}", marks=pytest.mark.slow)
    for library, names in FAMILIES.items()
    for i, name in enumerate(names)
]
"""Each in one of the modes, which take turns."""


@pytest.mark.whole
@pytest.mark.parametrize(("library", "name", "mode"), CASES)
def test_an_architecture_is_right(library: str, name: str, mode: str) -> None:
    try:
        build = sweep_parts.architectures(library)[name]
    except ImportError:
        pytest.skip(f"{library} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(build, mode)
    assert found.status == "right" and found.share >= harness.ENOUGH and found.devices >= 2, found
