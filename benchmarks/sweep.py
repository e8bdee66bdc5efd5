"""Real architectures, partitioned and compared with one device: transformers, timm, torchvision, diffusers, PyG.

    python benchmarks/sweep.py [--library NAME ...] [--only NAME ...] [--limit SECONDS] [--out FILE]
                               [--again STATUS ...]
    python benchmarks/sweep.py --table docs/sweep.md      # write the table of what the file has; runs nothing
    python benchmarks/sweep.py --list

Each architecture runs in a process of its own, which has a time limit. What came of it is a line of the file, and what
has a line is not run again, so that a sweep can be resumed. Nothing is installed: a library that is missing is passed
over, and said to be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from sweep_parts import LIBRARIES, architectures  # noqa: E402
from sweep_parts.harness import MODES, ModeOutcome, NotRunnable, Verdict, try_out  # noqa: E402
from sweep_parts.libraries import prepare  # noqa: E402
from sweep_parts.report import STATUSES, report  # noqa: E402

LIMIT_S = 120.0
"""Of CPU time, so that what else the machine does is not held against an architecture."""

PATIENCE = 10
"""How many times as long it may take by the clock: one that waits for ever uses no CPU."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no line yet, and count; 1 if something is wrong or raised a foreign error."""
    options = _parse(arguments)
    if options.table is not None:
        options.table.write_text(_page(options))
        return 0
    wanted = _wanted(options)
    if options.list:
        print("\n".join(f"{library}: {name}" for library, name in wanted))
        return 0
    from tqdm import tqdm

    known = {} if options.out is None else _known(options.out)
    again = set(options.again)
    left = [key for key in wanted if key not in known or known[key].status in again]
    found = [known[key] for key in wanted if key in known and key not in left]
    for library, name in (bar := tqdm(left, disable=None)):
        bar.set_description(f"{library}: {name}")
        verdict = run_one(library, name, options.limit, options.modes)
        found.append(verdict)
        bar.write(f"{library}: {name}: {verdict.status} {verdict.time_s:.0f} s {verdict.reason[:160]}", file=sys.stderr)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as lines:
                print(json.dumps(verdict.to_json()), file=lines)
    for status in (*STATUSES, "absent"):
        print(f"{status:<8}{sum(verdict.status == status for verdict in found):>5}")
    return int(any(verdict.status in ("wrong", "error") for verdict in found))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", nargs="+", metavar="NAME", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="names of architectures")
    parser.add_argument("--modes", nargs="+", metavar="MODE", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", default=LIMIT_S, help="of CPU time, for one architecture"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a line for each, as JSON; read first, to resume")
    parser.add_argument("--again", nargs="+", metavar="STATUS", default=[], help="run what came out so once more")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of --out there, and stop")
    parser.add_argument("--list", action="store_true", help="print what would be tried")
    return parser.parse_args(arguments)


def _wanted(options: argparse.Namespace) -> list[tuple[str, str]]:
    found = []
    for library in options.library:
        try:
            names = architectures(library)
        except ImportError as reason:
            print(f"{library} is missing: {reason}", file=sys.stderr)
            continue
        found += [(library, name) for name in names if not options.only or name in options.only]
    return found


def _known(path: Path) -> dict[tuple[str, str], Verdict]:
    """What a file has; of two lines of one architecture, the later."""
    lines = path.read_text().splitlines() if path.exists() else []
    verdicts = [Verdict.from_json(json.loads(line)) for line in lines]
    return {(verdict.library, verdict.name): verdict for verdict in verdicts}


def run_one(library: str, name: str, limit_s: float, modes: Sequence[str]) -> Verdict:
    """Try an architecture in a child, for so long."""
    # Forked from a server that has imported what all of them need, and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep_parts.harness", "graphpart.api", "transformers.modeling_utils"])
    ours, theirs = context.Pipe(duplex=False)
    start_s = time.monotonic()
    child = context.Process(target=_child, args=(library, name, list(modes), limit_s, theirs))
    child.start()
    theirs.close()
    outcomes: dict[str, ModeOutcome] = {}
    absent = _told(ours, start_s + PATIENCE * limit_s, outcomes)
    spent_s = time.monotonic() - start_s
    is_late = spent_s >= PATIENCE * limit_s
    if is_late:
        child.kill()
    child.join()
    if absent is None:
        absent = ""
        stopped = next((mode for mode in modes if mode not in outcomes), None)
        if stopped is not None and (is_late or child.exitcode == -signal.SIGXCPU):
            outcomes[stopped] = ModeOutcome("time", f"more than {limit_s:g} s")
        elif stopped is not None:
            outcomes[stopped] = ModeOutcome("error", f"its process died: exit code {child.exitcode}")
    return Verdict(library, name, outcomes, absent, round(spent_s, 1))


def _told(ours: Connection, until_s: float, outcomes: dict[str, ModeOutcome]) -> str | None:
    """Take in what a child says until it ends or time is up; why its model cannot be tried, if it says that."""
    while ours.poll(max(0.0, until_s - time.monotonic())):
        try:
            name, said = ours.recv()
        except EOFError:
            break
        if name is None:
            return str(said)
        outcomes[name] = said
    return None


def _child(library: str, name: str, modes: list[str], limit_s: float, theirs: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        for mode, outcome in try_out(architectures(library)[name], {mode: MODES[mode] for mode in modes}):
            theirs.send((mode, outcome))
    except NotRunnable as reason:
        theirs.send((None, str(reason)))
    theirs.close()
    os._exit(0)  # workers of a call that failed may never end


def _page(options: argparse.Namespace) -> str:
    import platform

    import torch

    versions: dict[str, Any] = {"Python": platform.python_version(), "torch": torch.__version__}
    for library in options.library:
        try:
            versions[library] = prepare(library)
        except ImportError:
            versions[library] = "absent"
    return report(
        list(_known(options.out).values()), versions, time.strftime("%Y-%m-%d"), options.limit, len(_wanted(options))
    )


if __name__ == "__main__":
    sys.exit(main())
