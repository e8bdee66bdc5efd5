"""``benchmarks/gpu.py``: each of its parts on a CPU, what it does with failures, and what of CUDA it names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_parts import PARTS, harness  # noqa: E402
from gpu_parts.harness import Outcome, Part, Setting, Skipped, outcome_of, table_of  # noqa: E402

TINY = Setting("cpu", tiny=True)
FAST = {"fused-attention", "attention", "errors", "recompute", "offload", "async"}
THE_SAME = {"pipelines-4", "pipelines-8", "splits-4", "splits-8"}
"""Parts that are another with more workers, of which there are two when sizes are tiny."""


def cases() -> Iterator[Any]:
    for part in PARTS:
        marks = [] if part.name in FAST else [pytest.mark.slow]
        if part.name.startswith(("two-ranks", "pipelines", "splits")):
            marks.append(pytest.mark.processes)
        if part.name not in THE_SAME:
            yield pytest.param(part, id=part.name, marks=marks)


@pytest.mark.parametrize("part", list(cases()))
def test_every_part_runs_on_a_cpu(part: Part) -> None:
    found = outcome_of(part, TINY)
    assert found.status == "ok", found.traceback
    assert found.figures
    json.dumps(found.to_json())


def test_the_dry_run_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed and part.checks in printed for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert gpu.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [part.name for part in PARTS]


# --- failures -----------------------------------------------------------------------------------------------------


def fails(_: Setting) -> Any:
    raise ValueError("wrong\nin two lines")


def skips(_: Setting) -> Any:
    raise Skipped("no such thing here")


def exits(_: Setting) -> Any:
    raise SystemExit("numbers differ")


def works(_: Setting) -> Any:
    return {"seconds, ours": 1.25}


@pytest.fixture
def parts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Part, "run", property(lambda part: globals()[part.name]))


@pytest.mark.usefixtures("parts_here")
def test_a_part_that_fails_is_told_and_the_others_go_on() -> None:
    names = ("fails", "skips", "exits", "works")
    outcomes = [outcome_of(Part(name, "", f"nowhere:{name}", 1), TINY) for name in names]
    assert [found.status for found in outcomes] == ["failed", "skipped", "failed", "ok"]
    assert "in fails" in outcomes[0].traceback and outcomes[0].reason == "ValueError: wrong"
    printed = table_of(outcomes).splitlines()
    assert len(printed) == 1 + 4 + 1
    assert printed[2].split()[:2] == ["skips", "skipped"] and printed[2].endswith("no such thing here")
    assert printed[-1].strip() == "seconds, ours: 1.25"


CHILD = """
import json, sys, time
path, names = sys.argv[1], sys.argv[2:]
with open(path, "w") as answers:
    for name in names:
        print(json.dumps({"begun": name}), file=answers, flush=True)
        if name == "dies":
            print("last words", file=sys.stderr, flush=True)
            sys.exit(3)
        if name == "hangs":
            time.sleep(1.5)  # until its own watch, which knows the budget
            sys.exit(1)
        print(json.dumps({"name": name, "status": "ok"}), file=answers, flush=True)
"""


def run_with(names: Sequence[str], monkeypatch: pytest.MonkeyPatch, budget_s: float) -> list[Outcome]:
    """What the script makes of children that run no parts but do as their names say."""
    start = subprocess.Popen

    def child(command: Sequence[str], **options: Any) -> Any:
        path, only = command[command.index("--child") + 1], command[command.index("--only") + 1 :]
        return start([sys.executable, "-S", "-c", CHILD, path, *only], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", child)
    options = gpu._parse(["--device", "cpu", "--budget", str(budget_s)])
    return gpu.run_all([Part(name, "", "", 1) for name in names], options)


def test_a_part_that_takes_its_process_along_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_with(["first", "dies", "second", "third"], monkeypatch, 30)
    assert [found.status for found in outcomes] == ["ok", "failed", "ok", "ok"]
    assert "exit code 3" in outcomes[1].reason and outcomes[1].traceback == "last words"


def test_no_part_begins_once_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_with(["first", "hangs", "second"], monkeypatch, 1.0)
    assert [found.status for found in outcomes] == ["ok", "skipped", "skipped"]
    assert "budget" in outcomes[1].reason and "budget" in outcomes[2].reason


@pytest.mark.slow
def test_the_script_prints_one_table_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--json", "found.json"]
    run = subprocess.run(
        [*command, "--only", "errors", "fused-attention"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines() if " ok " in line] == [
        ["fused-attention", "ok"],
        ["errors", "ok"],
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["ok", "ok"] and found["device"] == "CPU"


# --- what is named ------------------------------------------------------------------------------------------------

KINDS = {"cuda", "nccl"}


def branches(node: ast.AST, inside: str = "") -> Iterator[str]:
    """The innermost functions (or assigned names) that do something on CUDA alone, or on CPUs alone."""
    for child in ast.iter_child_nodes(node):
        here = inside
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            here = child.name
        elif isinstance(child, ast.Assign) and not inside:
            here = ast.unparse(child.targets[0])
        is_compared = isinstance(child, ast.Compare) and any(
            isinstance(side, ast.Constant) and side.value in {*KINDS, "cpu"} for side in child.comparators
        )
        is_used = isinstance(child, ast.Attribute) and child.attr in {"cuda", "is_cuda"}
        is_named = isinstance(child, ast.Constant) and child.value in KINDS
        if is_compared or is_used or is_named or (isinstance(child, ast.keyword) and child.arg == "pin_memory"):
            yield here
        yield from branches(child, here)


def test_every_branch_of_cuda_is_named_by_a_part_and_every_name_is_there() -> None:
    named = [branch.split(": ", 1) for part in PARTS for branch in part.branches]
    for path, functions in named:
        source = (ROOT / "graphpart" / path).read_text()
        for function in functions.split(" (")[0].split(", "):
            assert function.rsplit(".", 1)[-1] in source, f"{path} has no {function}"
    for path in sorted((ROOT / "graphpart").rglob("*.py")):
        relative = path.relative_to(ROOT / "graphpart").as_posix()
        told = " ".join(functions for file, functions in named if file == relative)
        missing = {found for found in branches(ast.parse(path.read_text())) if found not in told}
        assert not missing, f"no part of benchmarks/gpu.py names {relative}: {', '.join(sorted(missing))}"


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    for part in PARTS:
        assert f"| `{part.name}` | {part.checks} | " + "<br>".join(f"`{b}`" for b in part.branches) + " |" in text
