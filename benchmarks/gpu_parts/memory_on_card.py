"""What runs again, and what waits in the host's memory meanwhile: the same numbers, less memory, at what price."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gpu_parts.harness import Figures, Setting
from gpu_parts.meters import peak_bytes, seconds, wait
from gpu_parts.models import check, difference, exact_products, parted_training, partition, words


def recompute(setting: Setting) -> Figures:
    """Blocks that run again, by call and by schedule: the same bits as without, dropout included."""
    exact_products()
    model, batch = words(setting, dropout=0.2)
    figures = {}
    schedules = ("1f1b",) if setting.tiny else ("gpipe", "1f1b", "zero-bubble")
    for schedule in schedules:
        found = []
        for wish in ("none", ["blocks.*"]):
            torch.manual_seed(1)
            choices: dict[str, Any] = {"strategy": "layer", "num_microbatches": 2, "schedule": schedule}
            parted = partition(model, setting.workers(2), recompute=wish, **choices)
            found.append(parted_training(parted, batch))
        figures[schedule] = check(schedule, difference(found[1], found[0]), 2e-4)
    return figures


@dataclass(eq=False)
class _Copy:
    """What was put away, on a CPU."""

    kept: Tensor

    def back(self) -> Tensor:
        """Another copy."""
        return self.kept.clone()


class _Shelf:
    """Puts copies away, so that what is around the copies to pinned memory runs on a CPU, too."""

    def put(self, tensor: Tensor) -> _Copy:
        """Take a copy."""
        return _Copy(tensor.clone())


@contextmanager
def _offload_here(setting: Setting) -> Iterator[None]:
    """On a CPU, offload=True is let through, to a shelf that keeps copies."""
    with ExitStack() as patched:
        if setting.device == "cpu":
            patched.enter_context(mock.patch("graphpart.api.check_offload"))
            patched.enter_context(mock.patch("graphpart.runtime.device.device_code.shelf_of", lambda _: _Shelf()))
            patched.enter_context(mock.patch("graphpart.runtime.device.offload.SMALLEST_BYTES", 0))
        yield


def offload(setting: Setting) -> Figures:
    """What blocks that run again read goes to pinned host memory: bits, memory, and how much of the way is hidden."""
    with _offload_here(setting):
        return _offload(setting)


def _offload(setting: Setting) -> Figures:
    exact_products()
    width, rows, num_blocks = setting.size(1024, 8), setting.size(16384, 4), setting.size(9, 3)
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(num_blocks)
    ]
    model = nn.Sequential(*blocks).to(setting.place)
    x = torch.randn(rows, width, device=setting.place)
    steps: dict[str, Callable[[], object]] = {}
    gradients, peaks = {}, {}
    for name, wanted in (("kept", False), ("offload", True)):
        choices: dict[str, Any] = {"strategy": "single", "recompute": ["?"], "offload": wanted}
        parted = partition(model, setting.workers(1), **choices)

        def step(parted: Any = parted) -> None:
            parted.zero_grad()
            parted(x).square().mean().backward()

        step()
        wait(setting)
        peaks[name] = peak_bytes(setting, step)
        gradients[name] = {key: p.grad.clone() for key, p in parted.named_parameters()}
        steps[name] = step
    assert difference(gradients["offload"], gradients["kept"]) == 0.0, "gradients differ in their bits"
    times = seconds(setting, steps, setting.size(8, 1))
    moved_bytes = (num_blocks - 1) * rows * width * 4
    figures: dict[str, float] = {f"seconds, {name}": time_s for name, time_s in times.items()}
    if setting.device == "cuda":
        assert peaks["offload"] < peaks["kept"] - moved_bytes // 2, f"memory at the peak: {peaks}"
        figures |= {f"peak MiB, {name}": peak / 2**20 for name, peak in peaks.items()}
        way_s = _copy_s(setting, rows * width) * (num_blocks - 1)
        figures["seconds of the copies alone, there and back"] = way_s
        figures["part of them that is hidden"] = 1 - (times["offload"] - times["kept"]) / way_s
    return figures


def _copy_s(setting: Setting, numel: int) -> float:
    """Seconds that as many floats take from the card to pinned memory and back."""
    there, host = torch.empty(numel, device="cuda:0"), torch.empty(numel, pin_memory=True)

    def move() -> None:
        host.copy_(there, non_blocking=True)
        there.copy_(host, non_blocking=True)

    return seconds(setting, {"copy": move}, 5)["copy"]
