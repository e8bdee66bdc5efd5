"""Processes that are the devices of one model: one on NCCL, and two that share a card and talk on Gloo."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gpu_parts.harness import Figures, Setting
from gpu_parts.models import (
    check,
    difference,
    exact_products,
    parted_training,
    partition,
    pictures,
    plain_training,
    refusal,
    sgd,
    words,
)

TOLERANCE = 2e-4
HUNG_S = 60
"""Seconds after which a process says where it is, and ends."""


@contextlib.contextmanager
def _group(backend: str, rank: int, world: int, folder: str) -> Iterator[None]:
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def one_rank(setting: Setting) -> Figures:
    """A process group of one, on NCCL: every collective that a step, a checkpoint and a check of arguments makes."""
    exact_products()
    backend = "nccl" if setting.device == "cuda" else "gloo"
    model, batch = words(setting, dropout=0.1)
    with tempfile.TemporaryDirectory() as folder, _group(backend, 0, 1, folder):
        parted = partition(model, setting.workers(1), executor="distributed", num_microbatches=2)
        report = parted.verify(**batch)
        step = parted.train_step(optimizer=torch.optim.AdamW(parted.parameters(), lr=1e-3), clip_grad_norm=1.0, **batch)
        assert torch.isfinite(step.loss) and torch.isfinite(step.grad_norm)
        state = parted.state_dict()
        assert state.keys() == model.state_dict().keys()
        return {"backend": backend, "largest difference": max(report.differences.values())}


def two_ranks(setting: Setting) -> Figures:
    """Two processes, a worker each, whose messages go by the host: calls, schedules, cut parameters, optimizers."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(r, folder, setting), daemon=True) for r in range(2)]
        for process in ranks:
            process.start()
        give_up_s = time.monotonic() + HUNG_S + 30
        while any(process.is_alive() for process in ranks) and time.monotonic() < give_up_s:
            time.sleep(0.1)
        for process in ranks:
            process.kill()
        told = [Path(folder) / f"rank{r}.json" for r in range(2)]
        faults = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        hung = [path.read_text() for path in sorted(Path(folder).glob("*.stderr"))]
        if faults or not all(path.exists() for path in told):
            raise AssertionError("\n".join([*faults, *hung]) or "a process ended without a word")
        figures: dict[str, float | str] = json.loads(told[0].read_text())
        return figures


def _rank(rank: int, folder: str, setting: Setting) -> None:
    """One of the two: writes what it measured, or its error, to a file."""
    with open(f"{folder}/rank{rank}.stderr", "w") as said:
        faulthandler.enable(said)
        faulthandler.dump_traceback_later(HUNG_S, exit=True, file=said)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        try:
            with _group("gloo", rank, 2, folder):
                found = _cases(setting)
                dist.barrier()
            Path(f"{folder}/rank{rank}.json").write_text(json.dumps(found))
        except BaseException:
            Path(f"{folder}/rank{rank}.error").write_text(traceback.format_exc())
        os._exit(0)


def _cases(setting: Setting) -> dict[str, float | str]:
    exact_products()
    model, batch = words(setting)
    expected = plain_training(model, batch)
    figures: dict[str, float | str] = {}
    pairs = [("layer", "1f1b"), ("feature", "gpipe")]
    if not setting.tiny:
        pairs += [("batch", "auto"), ("layer", "zero-bubble"), ("hybrid", "list")]
    for strategy, schedule in pairs:
        parted = partition(model, setting.workers(2), strategy=strategy, schedule=schedule, num_microbatches=2)
        name = f"{strategy}, {schedule}"
        figures[name] = check(name, difference(parted_training(parted, batch), expected), TOLERANCE)

    def adamw(parameters: Any, **flags: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, **flags)

    by_lists = functools.partial(adamw, foreach=True)
    found = parted_training(partition(model, setting.workers(2), strategy="feature"), batch, by_lists)
    expected = plain_training(model, batch, by_lists)
    figures["cut parameters, foreach"] = check("foreach", difference(found, expected), TOLERANCE)
    parted = partition(model, setting.workers(2), strategy="feature")
    loss = parted(**batch)
    loss.backward()
    # In a fused step this would be a fault of one process that ends the others.
    figures["cut parameters, fused"] = refusal(adamw(parted.parameters(), fused=True).step)
    norm = float(torch.nn.utils.clip_grad_norm_(parted.parameters(), 1.0))
    sgd(parted.parameters()).step()
    figures["norm of cut gradients"] = norm
    if not setting.tiny:
        model, batch = pictures(setting)
        parted = partition(model, setting.workers(2), strategy="batch", num_microbatches=2)
        name = "BatchNorm"
        found = parted_training(parted, batch)
        figures[name] = check(name, difference(found, plain_training(model, batch)), TOLERANCE)
    return figures
