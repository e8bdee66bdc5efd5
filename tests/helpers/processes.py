"""Run a function in several processes that form a group on Gloo.

They are forked from a server that has imported what they need, and has no threads: importing takes most of the time of
a process that runs a small model.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["graphpart.api", "graphpart.module.traces", "graphpart.runtime.executors.processes", "tests.helpers.zoo"]
"""What the server imports before it forks; it leaves out what cannot be imported."""


@contextlib.contextmanager
def process_group(rank: int, world: int, folder: str) -> Iterator[None]:
    """One process of a group that meets in a folder; errors are written there, where the test reads them.

    What libraries say on standard error goes there, too, and where a process was when it is aborted.
    """
    said = open(f"{folder}/rank{rank}.stderr", "w")  # noqa: SIM115  # until the process ends
    os.dup2(said.fileno(), 2)
    faulthandler.enable(said)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
        yield
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/rank{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def forking() -> mp.context.ForkServerContext:
    """Makes processes that need not import anything."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context  # type: ignore[no-any-return]


def run_processes(target, world: int, *args, timeout_s: float = 120) -> Path:  # type: ignore[no-untyped-def]
    """Run ``target(rank, world, *args, folder)`` in processes of their own; returns the folder they wrote to."""
    folder = tempfile.mkdtemp()
    context = forking()
    processes = [context.Process(target=target, args=(r, world, *args, folder)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    alive = [p for p in processes if p.is_alive()]
    for process in alive:
        process.kill()
    errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
    said = [f"{path.name}:\n{path.read_text()}" for path in sorted(Path(folder).glob("*.stderr"))]
    assert not errors, "\n".join([*errors, *said])
    assert not alive, f"{len(alive)} processes hang"
    assert [p.exitcode for p in processes] == [0] * world, "\n".join(said)
    return Path(folder)
