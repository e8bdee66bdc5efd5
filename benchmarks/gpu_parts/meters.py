"""Time and memory of steps on a card, and of steps on a CPU for tests of the parts themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gpu_parts.harness import Setting


def wait(setting: Setting) -> None:
    """Until the card has done all that it was given."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def seconds(setting: Setting, steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step; all take turns, and a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds + 1):
        for name, step in steps.items():
            wait(setting)
            start_s = time.perf_counter()
            step()
            wait(setting)
            if round_index:
                found[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(times) for name, times in found.items()}


def peak_bytes(setting: Setting, step: Callable[[], object]) -> int:
    """The most memory that all tensors of a card take while a step runs; 0 on a CPU."""
    if setting.device != "cuda":
        step()
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
