"""One-thread workers on the machine's cores, beside ``torch.distributed.pipelining``, DTensor and DDP."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pipeline
import strategies
import torch
import transformers

from gpu_parts.harness import Figures, Setting, Skipped

SHOWN = ("threads 1f1b", "processes 1f1b", "torch 1f1b")


def pipelines(setting: Setting, workers: int) -> Figures:
    """1F1B on threads and on processes, beside torch's."""
    _need_cores(workers, setting)
    workers = setting.size(workers, 2)
    options = argparse.Namespace(
        workers=workers,
        rounds=setting.size(3, 1),
        microbatches=setting.size(2 * workers, 2),
        layers=setting.size(8, 2),
        width=setting.size(256, 64),
        batch=setting.size(4 * workers, 4),
        vocabulary=512,
        only=list(SHOWN),
    )
    transformers.logging.set_verbosity_error()
    with _one_thread():
        times, _ = pipeline.measure(options)
    figures = _medians(times)
    figures["ceiling"] = workers * pipeline.ratio(times, "one alone", "all alone")
    for name in SHOWN[:2]:
        figures[f"{name}, times as fast as torch's"] = pipeline.ratio(times, "torch 1f1b", name)
    return figures


def splits(setting: Setting, workers: int) -> Figures:
    """Feature and batch splits on threads, beside DTensor and DDP on processes."""
    _need_cores(workers, setting)
    workers = setting.size(workers, 2)
    options = argparse.Namespace(
        model="mlp",
        workers=workers,
        rounds=setting.size(5, 1),
        layers=setting.size(4, 1),
        width=setting.size(512, 32),
        batch=setting.size(1024, 16),
    )
    with _one_thread():
        times = strategies.measure(options)
    figures = _medians(times)
    figures["ceiling"] = workers * figures["seconds, eager"] / figures["seconds, ceiling"]
    for own, rival in (("feature", "dtensor"), ("batch", "ddp")):
        figures[f"{own}, times as fast as {rival}"] = figures[f"seconds, {rival}"] / figures[f"seconds, {own}"]
    return figures


def _need_cores(workers: int, setting: Setting) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores < workers and not setting.tiny:
        raise Skipped(f"{workers} workers want as many cores, and there are {cores}")


def _medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {f"seconds, {name}": statistics.median(found) for name, found in times.items() if found}


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch's operators within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


pipelines_2, pipelines_4, pipelines_8 = (functools.partial(pipelines, workers=n) for n in (2, 4, 8))
splits_2, splits_4, splits_8 = (functools.partial(splits, workers=n) for n in (2, 4, 8))
