"""Everything that needs CUDA, in parts: what is correct on a card, and what it costs there. One table at the end.

    python benchmarks/gpu.py [--only PART ...] [--device cuda|cpu] [--tiny] [--json FILE] [--budget SECONDS]
    python benchmarks/gpu.py --list        # names of the parts
    python benchmarks/gpu.py --dry-run     # what each part covers

Parts run one after another in a process of their own, the most worthwhile first. A part that fails, hangs or takes the
process with it costs itself alone: the others go on in a new process. No part starts once the budget is spent.
Nothing has to be installed: torch, transformers, numpy, scipy and networkx do, and the package lies beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from gpu_parts import PARTS  # noqa: E402
from gpu_parts.harness import Outcome, Part, Setting, dry_table, outcome_of, table_of  # noqa: E402

BUDGET_S = 285
"""So that all is over within five minutes."""

PATIENCE = 5
"""How much longer than a card's host a CPU may take that is busy with other things, too."""

POISONED = ("CUDA error", "cuBLAS error", "CUBLAS_STATUS", "cuDNN error", "illegal memory access", "device-side assert")
"""What an error says after which a process can no longer use its card."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts, print the table and the tracebacks; 1 if a part has failed."""
    options = _parse(arguments)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    if options.list:
        print("\n".join(part.name for part in parts))
        return 0
    if options.dry_run:
        print(dry_table(parts))
        return 0
    if options.child is not None:
        return _child(parts, options)
    outcomes = run_all(parts, options)
    print(table_of(outcomes))
    failed = [found for found in outcomes if found.status == "failed"]
    for found in failed:
        print(f"\n--- {found.name} ---\n{found.traceback.rstrip()}")
    if options.json:
        _write_json(outcomes, options)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS], default=[])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the parts themselves work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes there")
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=BUDGET_S)
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--dry-run", action="store_true", help="print what each part covers")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # where a child writes its outcomes
    return parser.parse_args(arguments)


def run_all(parts: Sequence[Part], options: argparse.Namespace) -> list[Outcome]:
    """Run parts in children: as many as it takes for each part to have had its turn."""
    give_up_s = time.monotonic() + options.budget
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(len(parts)):
            left_s = give_up_s - time.monotonic()
            left = [part for part in parts if part.name not in outcomes]
            if not left or left_s <= 0:
                break
            found = _run_child(left, Path(folder) / str(number), left_s, options)
            outcomes.update((outcome.name, outcome) for outcome in found)
    spent = f"the budget of {options.budget:g} s is spent"
    return [outcomes.get(part.name, Outcome(part.name, "skipped", spent)) for part in parts]


def _run_child(parts: Sequence[Part], stem: Path, left_s: float, options: argparse.Namespace) -> list[Outcome]:
    """What a child says of the parts it came to; the one it died in has failed."""
    answers, said = stem.with_suffix(".json"), stem.with_suffix(".log")
    command = [sys.executable, str(HERE / "gpu.py"), "--child", str(answers), "--budget", str(left_s)]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else []), "--only", *(p.name for p in parts)]
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    start_s = time.monotonic()
    with said.open("w") as log:
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        try:
            code = _followed(child, answers)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it started
    lines = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
    outcomes = [Outcome(**line) for line in lines if "status" in line]
    begun = [line["begun"] for line in lines if "begun" in line]
    dead = begun[-1] if len(begun) > len(outcomes) else parts[0].name if not begun and code else None
    spent_s = time.monotonic() - start_s
    if dead is not None and spent_s >= left_s:
        outcomes.append(Outcome(dead, "skipped", "stopped: the budget was spent", round(spent_s, 2)))
    elif dead is not None:
        tail = "\n".join(said.read_text(errors="replace").splitlines()[-200:])
        reason = f"hung, or its process died: exit code {code}"
        outcomes.append(Outcome(dead, "failed", reason, round(spent_s, 2), traceback=tail))
    return outcomes


def _followed(child: subprocess.Popen[bytes], answers: Path) -> int:
    """Wait for a child, and say what it has said: a run that is cut short has shown what it came to."""
    shown = 0
    while True:
        code = child.poll()
        lines = answers.read_text().split("\n")[:-1] if answers.exists() else []  # those that are complete
        for line in map(json.loads, lines[shown:]):
            if "status" in line:
                print(f"{line['name']}: {line['status']} {line.get('reason', '')[:100]}", file=sys.stderr, flush=True)
        shown = len(lines)
        if code is not None:
            return code
        time.sleep(0.2)


def _child(parts: Sequence[Part], options: argparse.Namespace) -> int:
    """Run parts here until the budget is spent, saying of each that it begins and what came of it."""
    give_up_s = time.monotonic() + options.budget
    setting = Setting(options.device, options.tiny)
    with options.child.open("w") as answers:
        for part in parts:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                break
            print(json.dumps({"begun": part.name}), file=answers, flush=True)
            # Writes where every thread stands, and ends the process: what hangs may hold any lock.
            limit_s = part.limit_s * (1 if options.device == "cuda" else PATIENCE)
            faulthandler.dump_traceback_later(min(limit_s, left_s), exit=True)
            outcome = outcome_of(part, setting)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(outcome.to_json()), file=answers, flush=True)
            if any(sign in outcome.traceback for sign in POISONED):
                break
    sys.stdout.flush()
    os._exit(0)  # a part that failed may have left threads behind that never end


def _write_json(outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    import torch

    card = torch.cuda.get_device_name(0) if options.device == "cuda" and torch.cuda.is_available() else "CPU"
    about = {"device": card, "torch": torch.__version__, "tiny": options.tiny, "date": time.strftime("%Y-%m-%d")}
    options.json.write_text(json.dumps({**about, "parts": [o.to_json() for o in outcomes]}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
