"""Windows that slide over positions: the geometry that convolutions and poolings share."""

from __future__ import annotations

from typing import Any

from graphpart.ir.axes import OperandDim, Window


def per_dim(given: Any, count: int) -> tuple[int, ...]:
    """One number a dimension; torch also takes one for all."""
    numbers = (given,) if isinstance(given, int) else tuple(given)
    return numbers * count if len(numbers) == 1 else numbers


def slide(window: Window, positions: int, uncut: str) -> OperandDim:
    """A window over so many positions; ``uncut``, an axis of its own, where some position sees padding alone.

    The tile of such a position would read nothing at all.
    """
    touches = window.unclipped(0, 1)[1] > 0 and window.unclipped(positions - 1, positions)[0] < window.extent
    return window if touches else (uncut,)


def shared(dims: tuple[OperandDim, ...]) -> set[str]:
    """The axes of those dimensions that are windows."""
    return {dim.axis for dim in dims if isinstance(dim, Window)}


def numbered(stem: str) -> str:
    """The operator's names for 1, 2 and 3 dimensions: ``max_pool1d max_pool2d max_pool3d``."""
    return " ".join(f"{stem}{d}d" for d in "123")


def spatial_rank(target: str) -> int:
    """On how many of the last dimensions an operator works, which its name tells."""
    return int(next(letter for letter in target if letter in "123"))
