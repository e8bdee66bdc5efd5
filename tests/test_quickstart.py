"""The examples run as the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str, path: str | None = None) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"} | ({} if path is None else {"PATH": path})
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = ("--steps", "4", "--layers", "2", "--width", "32", "--batch", "4", "--microbatches", "2")


@pytest.mark.slow
def test_quickstart_trains_to_the_loss_of_one_device(tmp_path: Path) -> None:
    printed = run("quickstart.py", *SMALL, "--out", str(tmp_path))
    assert re.search(r"GPT2LMHeadModel: \d+ operators.* 2 devices \(2 × CPU\)", printed), printed
    found = re.search(r"largest of any step: +(\S+)", printed)
    assert found, printed
    assert float(found[1]) < 1e-4
    losses = [float(x) for x in re.findall(r"loss (?:split over devices|on one device): +(\S+)", printed)]
    assert len(losses) == 2
    assert abs(losses[0] - losses[1]) < 1e-4
    assert "plan.svg" in printed
    assert (tmp_path / "plan.svg").exists() or (tmp_path / "plan.dot").exists()
    assert (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_quickstart_in_fused_steps_is_the_same(tmp_path: Path) -> None:
    printed = run("quickstart.py", *SMALL, "--schedule", "1f1b", "--out", str(tmp_path))
    found = re.search(r"largest of any step: +(\S+)", printed)
    assert found, printed
    assert float(found[1]) < 1e-4


ASYNC_MARGIN = 0.1
"""How much higher the loss of an asynchronous run may be at equal steps (nats a byte, of about 3)."""


@pytest.mark.slow
def test_quickstart_trains_asynchronously_as_well(tmp_path: Path) -> None:
    options = ("--steps", "40", "--layers", "2", "--width", "64", "--batch", "16", "--schedule", "async")
    printed = run("quickstart.py", *options, "--out", str(tmp_path))
    split, control = (float(x) for x in re.findall(r"loss (?:split over devices|on one device): +(\S+)", printed))
    assert split < control + ASYNC_MARGIN, printed
    assert control < 4.0  # it has learned something


@pytest.mark.slow
def test_quickstart_goes_on_without_graphviz(tmp_path: Path) -> None:
    printed = run("quickstart.py", *SMALL, "--no-control", "--devices", "1", "--out", str(tmp_path), path=str(tmp_path))
    assert "No picture: Graphviz's 'dot' program is not installed" in printed
    assert "apt install graphviz" in printed
    assert not (tmp_path / "plan.svg").exists()
    assert "loss on one device" not in printed


@pytest.mark.slow
def test_own_model_is_checked_and_a_slip_is_refused(tmp_path: Path) -> None:
    printed = run("own_model.py", "--out", str(tmp_path))
    assert "Checked against the plain model" in printed
    assert "three readers and crosses 3 times" in printed
    assert "Refused, as it should be: pattern 'wrods*'" in printed
