"""What a case of the axis rules' tests is: a concrete call, and the extents that can be cut.

Extents differ within a case, so that they tell its axes apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A call to check.

    Attributes:
        target: the operator.
        cuts: extents of the axes that can be cut, those that add up with a ``+``, those that lowering
            rewrites the operator for with a ``*``; None if there is no rule.
        build: makes its arguments.
        number: tells cases of one operator apart.
        shape_only: for operators that draw numbers or leave memory as it was.
    """

    target: str
    cuts: str | None
    build: Callable[[], Arguments]
    number: int
    shape_only: bool = False

    def __str__(self) -> str:
        return f"{self.target}-{self.number}"


CASES: list[Case] = []


def case(
    target: str, cuts: str | None, build: Callable[[], tuple[Any, ...]], *, shape_only: bool = False, **kwargs: Any
) -> None:
    """Add a case; values in ``kwargs`` that are functions make tensors."""

    def arguments() -> Arguments:
        return build(), {k: v() if callable(v) else v for k, v in kwargs.items()}

    parts = target.split(".")
    full = f"aten.{target}" if parts[0] != "transformers" else target
    full += ".default" if full.count(".") == 1 else ""
    CASES.append(Case(full, cuts, arguments, len(CASES), shape_only))


def words(text: str) -> list[str]:
    return text.split()


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def p(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


def z(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128)
