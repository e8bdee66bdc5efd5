"""Parts of ``gpu.py``: what one is, how one is run, and the table of what came of them."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Figures = Mapping[str, float | int | str]
"""What a part measured, by name with its unit."""


class Skipped(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What parts run on.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: whether sizes are for a test of the part itself.
    """

    device: str
    tiny: bool = False

    @property
    def place(self) -> str:
        """Where tensors of the plain model lie."""
        return "cuda:0" if self.device == "cuda" else "cpu"

    def workers(self, count: int) -> list[str]:
        """Names of so many workers: of one card, or of the CPU."""
        return [f"cuda:0#{i}" if self.device == "cuda" else f"cpu:{i}" for i in range(count)]

    def size(self, full: int, tiny: int) -> int:
        """A size by its value on a card and in a test."""
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: for ``--only``.
        checks: what it shows, for people.
        where: ``module:function`` in this package, which is imported when the part runs.
        limit_s: seconds on a card after which it counts as hung.
        branches: code that only CUDA runs and that this part runs, as ``file: function``.
    """

    name: str
    checks: str
    where: str
    limit_s: int
    branches: tuple[str, ...] = ()

    @property
    def run(self) -> Callable[[Setting], Figures]:
        """The function behind it."""
        module, _, function = self.where.partition(":")
        found: Callable[[Setting], Figures] = getattr(importlib.import_module(f"gpu_parts.{module}"), function)
        return found


@dataclass(frozen=True)
class Outcome:
    """What came of a part.

    Attributes:
        name: of the part.
        status: ``ok``, ``failed`` or ``skipped``.
        reason: why it was skipped, or the last line of the error.
        time_s: seconds it took.
        figures: what it measured.
        traceback: of the error.
    """

    name: str
    status: str
    reason: str = ""
    time_s: float = 0.0
    figures: Figures = field(default_factory=dict)
    traceback: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def outcome_of(part: Part, setting: Setting) -> Outcome:
    """Run a part here; whatever it raises is its outcome."""
    start_s = time.perf_counter()

    def outcome(status: str, reason: str = "", **more: Any) -> Outcome:
        return Outcome(part.name, status, reason, round(time.perf_counter() - start_s, 2), **more)

    try:
        return outcome("ok", figures=dict(part.run(setting)))
    except Skipped as reason:
        return outcome("skipped", str(reason))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a benchmark ends by SystemExit where numbers differ
        return outcome("failed", f"{type(error).__name__}: {error}".split("\n")[0], traceback=traceback.format_exc())


def table_of(outcomes: Iterable[Outcome]) -> str:
    """One line a part, and one for each of its figures."""
    lines = [f"{'part':<22}{'status':<9}{'seconds':>8}  what came of it"]
    for found in outcomes:
        lines.append(f"{found.name:<22}{found.status:<9}{found.time_s:>8.1f}  {found.reason[:150]}".rstrip())
        lines += [f"{'':<41}{name}: {_shown(value)}" for name, value in found.figures.items()]
    return "\n".join(lines)


def _shown(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dry_table(parts: Iterable[Part]) -> str:
    """What each part would do, and the code of GPUs alone that it would run."""
    lines = []
    for part in parts:
        lines.append(f"{part.name:<22}{part.limit_s:>4} s  {part.checks}")
        lines += [f"{'':<30}{branch}" for branch in part.branches]
    return "\n".join(lines)
