"""Results that share memory: on one device, what is done to one in place is seen in the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A result that is a view of another result, or of an argument.

    Attributes:
        of_argument: whether it is a view of an argument.
        base: which of the flattened arguments, or of the flattened results.
        size: its shape.
        stride: its strides.
        offset: where it begins in the base, in elements.
        has_grad: whether it has a gradient.
    """

    of_argument: bool
    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    has_grad: bool

    def of(self, base: Tensor) -> Tensor:
        """The view of a base with values."""
        whole = base if self.has_grad else base.detach()
        return whole.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


def views_among(results: Sequence[Any], arguments: Sequence[Any]) -> dict[int, View]:
    """Per result that is a view, by its position, of what.

    A result that is an argument itself is none. Of results that overlap, without one that has all of their elements,
    none is a view.

    Args:
        results: flattened; tensors without values will do.
        arguments: flattened.
    """
    bases: dict[int, tuple[bool, int, Tensor]] = {}
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and _is_dense(argument):
            bases.setdefault(_storage(argument), (True, i, argument))
    order = sorted(
        (i for i, result in enumerate(results) if isinstance(result, Tensor) and result.layout is torch.strided),
        key=lambda i: (-results[i].numel(), not results[i].requires_grad, results[i].storage_offset(), i),
    )
    found: dict[int, View] = {}
    for i in order:
        result = results[i]
        if any(result is argument for argument in arguments):
            continue
        base = bases.get(_storage(result))
        if base is None:
            if _is_dense(result):
                bases[_storage(result)] = (False, i, result)
        elif _covers(base[2], result) and base[2].requires_grad >= result.requires_grad:
            offset = result.storage_offset() - base[2].storage_offset()
            size, stride = tuple(result.shape), tuple(result.stride())
            found[i] = View(base[0], base[1], size, stride, offset, result.requires_grad)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory."""
    return tensor.layout is torch.strided and tensor.numel() == _end(tensor) - tensor.storage_offset()


def _end(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) + reach(tensor.shape, tensor.stride())


def reach(size: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of memory from a tensor's first to its last, both counted; none of an empty one."""
    return 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True)) if prod(size) else 0


def _covers(base: Tensor, view: Tensor) -> bool:
    is_inside = view.storage_offset() >= base.storage_offset() and _end(view) <= _end(base)
    return is_inside and view.dtype == base.dtype
