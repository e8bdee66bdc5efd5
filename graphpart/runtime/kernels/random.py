"""Random numbers that depend on the step, the operator and the region, never on threads or timing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads seeds that differ in few bits
_MASK = (1 << 64) - 1


_LOCKS: dict[torch.device, Lock] = {}
"""By device, who may use its default generator."""


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that a device's kernels draw from if they are given none."""
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


class Draw:
    """The randomness of one operator on one region in one step.

    Equal (step seed, key) give equal numbers on any worker, so replicas agree and a run can be repeated.

    Attributes:
        is_off: whether dropout passes everything, as ``verify`` wants it.
    """

    __slots__ = ("_generators", "_seed", "is_off")

    def __init__(self, seed: int, generators: dict[torch.device, torch.Generator], is_off: bool) -> None:
        self._seed = seed
        self._generators = generators
        self.is_off = is_off

    def generator(self, device: torch.device | str) -> torch.Generator:
        """The device's own generator, seeded for this draw."""
        device = torch.device(device)
        found = self._generators.get(device)
        if found is None:
            found = self._generators[device] = torch.Generator(device)
        return found.manual_seed(self._seed)

    @contextmanager
    def on_default(self, device: torch.device) -> Iterator[torch.Generator]:
        """Within, the device's default generator is seeded for this draw; afterwards it is as it was.

        For kernels that take no generator of their own. Workers of one device enter one after another: a kernel reads
        its seed when it is launched, so no more than launches wait.
        """
        generator = default_generator(device)
        with _LOCKS.setdefault(generator.device, Lock()):
            before = generator.get_state()
            generator.manual_seed(self._seed)
            try:
                yield generator
            finally:
                generator.set_state(before)


class StepRandom:
    """Draws for one step on one worker.

    Args:
        step_seed: drawn once a step from the caller's default generator, so ``torch.manual_seed`` governs it.
        generators: the worker's own generators by device, kept between steps.
        is_off: whether dropout passes everything.
    """

    __slots__ = ("generators", "is_off", "step_seed")

    def __init__(
        self, step_seed: int, generators: dict[torch.device, torch.Generator] | None = None, is_off: bool = False
    ) -> None:
        self.step_seed = step_seed
        self.generators = generators if generators is not None else {}
        self.is_off = is_off

    def __call__(self, key: int) -> Draw:
        """The draw of one key in this step."""
        mixed = ((self.step_seed ^ key) * _MIX) & _MASK
        return Draw((mixed ^ (mixed >> 29)) & ((1 << 63) - 1), self.generators, self.is_off)


def step_seed() -> int:
    """A new step's seed: one number from the default generator, as any random operator would draw it."""
    return int(torch.empty((), dtype=torch.int64).random_().item())
