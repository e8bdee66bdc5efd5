"""The command line, as a person meets it: what it prints, what it writes and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphpart.cli import main
from graphpart.cli.models import load_example
from graphpart.cli.presets import PRESETS
from graphpart.cli.progress import Progress
from graphpart.errors import ModelError
from graphpart.planning.plan import Plan

pytestmark = pytest.mark.xdist_group("cli")  # its tests share a fixture that takes long

ROOT = Path(__file__).parent.parent
FACTORY = """
import torch
from torch import nn

def pair():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), (torch.randn(6, 8),)

def alone():
    return nn.Linear(8, 4)

def large():
    layers = (nn.Linear(30000, 30000, device="meta") for _ in range(4))
    return nn.Sequential(*layers), (torch.empty(2, 30000, device="meta"),)

class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.body(x), labels)

def with_loss():
    torch.manual_seed(1)
    return WithLoss(), (torch.randn(6, 8), torch.arange(6) % 4)

def wrong():
    return "no model"
"""


def graphpart(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphpart", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a factory, a plan of a tiny GPT-2, and what planning it printed."""
    made = tmp_path_factory.mktemp("cli")
    (made / "own.py").write_text(FACTORY)
    done = graphpart(
        *("plan", "gpt2-tiny", "--devices", "2", "--strategy", "layer", "--batch", "4x32", "--microbatches", "2"),
        *("--out", "plan.json", "--draw", "plan.dot", "--progress"),
        folder=made,
    )
    assert done.returncode == 0, done.stderr
    (made / "out.txt").write_text(done.stdout)
    (made / "err.txt").write_text(done.stderr)
    return made


def test_plan_prints_a_table_and_writes_files(folder: Path) -> None:
    text = (folder / "out.txt").read_text()
    assert text.startswith("GPT2LMHeadModel: ") and "2 microbatches, forecast" in text and "cpu:0 → cpu:1" in text
    assert json.loads((folder / "plan.json").read_text())["format"] == "graphpart-plan"
    assert (folder / "plan.dot").read_text().startswith("digraph")
    said = (folder / "err.txt").read_text()
    for part in ("tracing GPT2LMHeadModel", "planning GPT2LMHeadModel", "the plan is in plan.json", "plan.dot"):
        assert part in said, part


@pytest.mark.slow
def test_explain_says_what_plan_said_and_loads_no_torch(folder: Path) -> None:
    program = (
        "import sys; from graphpart.cli import main; code = main(); sys.exit(3 if 'torch' in sys.modules else code)"
    )
    draw = ["draw", "plan.json"]
    drawings = [[*draw, "again.dot", "--max-boxes", "5"], [*draw, "bridges.dot", "--bridges"]]
    simulation = ["simulate", "plan.json", "--draw", "step.svg", "--trace", "step.json"]
    for arguments in (["explain", "plan.json"], *drawings, simulation):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, timeout=60, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if arguments[0] == "explain":
            assert done.stdout == (folder / "out.txt").read_text() and done.stderr == ""
        if arguments is simulation:
            assert done.stdout.startswith("2 microbatches · a step takes") and "most memory" in done.stdout
            assert "step.svg" in done.stderr and "step.json" in done.stderr
    assert (folder / "again.dot").read_text().startswith("digraph")
    assert "recv #" in (folder / "bridges.dot").read_text()
    assert "GPT2LMHeadModel · layer · forecast" in (folder / "step.svg").read_text()
    kinds = {record["ph"] for record in json.loads((folder / "step.json").read_text())["traceEvents"]}
    assert kinds == {"M", "X", "s", "t", "f", "C"}


@pytest.mark.slow
def test_run_trains_and_compares_forecast_and_measurement(folder: Path) -> None:
    done = graphpart(
        *("run", "gpt2-tiny", "--plan", "plan.json", "--batch", "4x32", "--steps", "6", "--verify"), folder=folder
    )
    assert done.returncode == 0, done.stderr
    assert "verified: loss" in done.stdout and "forecast" in done.stdout.splitlines()[-1]
    line = next(line for line in done.stdout.splitlines() if line.startswith("loss "))
    first, _, last = line.split()[1:4]
    assert float(last) < float(first)
    assert done.stderr == ""  # no bar, no spinner: it is no terminal


@pytest.mark.slow
def test_run_takes_a_factory_and_shows_a_step_beside_its_forecast(folder: Path) -> None:
    done = graphpart(
        *("run", "own.py:pair", "--devices", "2", "--steps", "3", "--optimizer", "sgd", "--strategy", "layer"),
        *("--timeline", "both.svg"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Sequential: " in done.stdout and "in 3 steps" in done.stdout
    assert "predicted → measured: a step takes" in done.stdout
    picture = (folder / "both.svg").read_text()
    assert "Sequential · layer · forecast" in picture and "Sequential · layer · measured" in picture


@pytest.mark.slow
def test_a_schedule_is_shown_and_run_and_compared_with_itself(folder: Path) -> None:
    choices = ("--strategy", "layer", "--microbatches", "3", "--schedule", "zero-bubble")
    done = graphpart("plan", "own.py:pair", "--devices", "2", *choices, "--out", "fused.json", folder=folder)
    assert done.returncode == 0, done.stderr
    drawn = done.stdout[done.stdout.index("Schedule zero-bubble: ") :].split("\n\n")[0].splitlines()
    assert drawn[1] == "F forward, B backward, W weights, U update; after its stage, before its microbatch"
    assert [line[:9] for line in drawn[2:]] == ["device 0:", "device 1:"]
    assert {"F", "B", "W", "U"} <= set(drawn[2]) and {"F", "B"} <= set(drawn[3])
    explained = graphpart("explain", "fused.json", folder=folder)
    assert explained.stdout == done.stdout
    simulated = graphpart("simulate", "fused.json", folder=folder)
    assert simulated.returncode == 0 and simulated.stdout.startswith("3 microbatches · a step takes")
    for how in (("--devices", "2", *choices), ("--plan", "fused.json")):
        run = graphpart("run", "own.py:pair", *how, "--steps", "4", "--timeline", "fused.svg", folder=folder)
        assert run.returncode == 0, run.stderr
        assert "\n".join(drawn) in run.stdout and "a step (forward, backward and update) takes" in run.stdout
        heads = next(line.split() for line in run.stdout.splitlines() if "idle" in line and line.startswith("device "))
        assert heads[1:6] == ["forward", "backward", "weights", "update", "idle"]
        first, _, last = next(x for x in run.stdout.splitlines() if x.startswith("loss ")).split()[1:4]
        assert float(last) < float(first)


@pytest.mark.parametrize("choices", [(), ("--microbatches", "3", "--schedule", "1f1b")], ids=["plain", "fused"])
def test_a_loss_that_forward_returns_is_what_trains(
    folder: Path, choices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    example = load_example("own.py:with_loss")
    optimizer = torch.optim.SGD(example.model.parameters(), lr=0.5)
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = example.model(*example.args)
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    run = ("run", "own.py:with_loss", "--devices", "2", "--optimizer", "sgd", "--lr", "0.5", "--steps", "3", "--verify")
    assert main([*run, "--strategy", "layer", *choices]) == 0
    said = capsys.readouterr().out
    assert f"loss {expected[0]:.4f} → {expected[-1]:.4f} in 3 steps" in said
    verified = said.partition("verified: loss ")[2].split()[0]
    assert float(verified) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(
    ("choice", "kept"), [("none", "none"), ("auto", "auto"), ("0", ["0"]), ("0,1", ["0", "1"]), ("[0-1]", ["[0-1]"])]
)
def test_what_runs_again_is_chosen_by_name_or_patterns(
    folder: Path, choice: str, kept: str | list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    model = ["own.py:pair", "--devices", "2", "--strategy", "layer", "--recompute", choice]
    assert main(["plan", *model, "--out", "again.json"]) == 0
    plan = Plan.load("again.json")
    assert plan.choices.recompute == (kept if isinstance(kept, str) else tuple(kept))
    modules = {"0": {"0"}, "0,1": {"0", "1"}, "[0-1]": {"0", "1"}}.get(choice, set())
    assert set(plan.placement.recompute.values()) == modules
    if choice == "0,1":
        assert main(["run", *model, "--steps", "2", "--verify"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "nothing.json"], "cannot read the plan 'nothing.json'"),
        (["explain", "own.py"], "not a plan"),
        (["draw", "plan.json", "picture.xyz"], "unknown suffix"),
        (["simulate", "own.py"], "not a plan"),
        (["plan", "gpt3", "--devices", "2"], "there is no model 'gpt3'"),
        (["plan", "own.py:nothing", "--devices", "2"], "has no function 'nothing'"),
        (["plan", "absent.py:make", "--devices", "2"], "there is no file 'absent.py'"),
        (["plan", "own.py:wrong", "--devices", "2"], "gives str"),
        (["plan", "own.py:pair", "--devices", "4xFOO"], "no data sheet for 'FOO'"),
        (["plan", "own.py:pair", "--devices", "2", "--strategy", "magic"], "no strategy 'magic'"),
        (["plan", "own.py:pair", "--devices", "2", "--schedule", "2f2b"], "no schedule '2f2b'"),
        (["run", "own.py:pair", "--plan", "plan.json", "--schedule", "1f1b"], "cannot be combined with plan="),
        (["run", "own.py:pair", "--plan", "plan.json", "--recompute", "0"], "cannot be combined with plan="),
        (["run", "own.py:pair", "--plan", "plan.json", "--offload"], "cannot be combined with plan="),
        (["plan", "own.py:pair", "--devices", "2", "--recompute", "body.*"], "recompute: pattern 'body.*' matches no"),
        (["plan", "own.py:pair", "--devices", "2", "--offload"], "offload=True is for GPUs"),
        (["run", "own.py:pair", "--devices", "2", "--offload"], "offload=True is for GPUs"),
        (["plan", "hf:Nothing", "--devices", "2"], "no model class 'Nothing'"),
        (["run", "own.py:pair", "--devices", "cuda:77"], "not on this host"),
    ],
)
def test_errors_are_one_line_on_standard_error(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("graphpart: ") and words in said.err
    assert "Traceback" not in said.err


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = graphpart("explain", "nothing.json", "--debug", folder=folder)
    assert done.returncode == 1 and "Traceback" in done.stderr and "PlanError" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["plan"],
        ["plan", "gpt2"],
        ["run", "gpt2-tiny"],
        ["plan", "gpt2", "--devices", "2", "--microbatches", "0"],
        ["plan", "gpt2", "--devices", "2", "--recompute", "a,,b"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage: graphpart" in capsys.readouterr().err


def test_a_model_that_does_not_fit_says_what_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{folder / 'own.py'}:large", "--devices", "2xT4", "--strategy", "layer"]) == 1
    text = capsys.readouterr().err
    for part in (
        "'cuda:0' (T4) would need 28.8 GB and has 16 GB",
        "14.4 GB of optimizer state",
        "4 devices (2 more of T4)",
    ):
        assert part in text, part
    assert main(["plan", f"{folder / 'own.py'}:large", "--devices", "2xT4", "--optimizer", "sgd"]) == 0


def test_inputs_are_generated(folder: Path) -> None:
    text = load_example("gpt2-tiny", batch="3x16", device="meta")
    assert text.kwargs["input_ids"].shape == text.kwargs["labels"].shape == (3, 16)
    assert next(text.model.parameters()).is_meta and text.model.training
    given = load_example(f"{folder / 'own.py'}:alone", inputs=["5x8"], dtype="bfloat16")
    assert given.args[0].shape == (5, 8) and str(given.args[0].dtype) == "torch.bfloat16"
    for batch in ("3xx", "1x2x3"):
        with pytest.raises(ModelError, match="batch"):
            load_example("gpt2-tiny", batch=batch)
    with pytest.raises(ModelError, match="shape"):
        load_example("gpt2-tiny", inputs=["3:nothing"])
    with pytest.raises(ModelError, match="dtype"):
        load_example("gpt2-tiny", dtype="int64")


def test_presets_have_their_published_sizes() -> None:
    published = {"gpt2": 124e6, "bert-base": 110e6, "resnet-50": 25.6e6, "vit-base": 86.6e6, "llama-70b": 70.6e9}
    for name, count in published.items():
        model = load_example(name, batch="1", device="meta").model
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.01), name
    assert set(published) <= set(PRESETS)


class Terminal:
    """A stream that says it is one."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_short_stages_leave_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    with Progress(stream=stream).stage("thinking"):  # type: ignore[arg-type]
        pass
    assert stream.text == ""
    monkeypatch.setattr("graphpart.cli.progress.PATIENCE_S", 0.01)
    with Progress(stream=stream).stage("thinking"):  # type: ignore[arg-type]
        import time

        time.sleep(0.3)
    assert "⠋ thinking …" in stream.text and stream.text.endswith(" s\n")
