"""Kernels of operators that go by how their operand lies in memory, which need not be as it was traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def as_strided(vector: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Elements of a vector, the offset counted from its beginning."""
    vector = vector.contiguous()
    return vector.as_strided(size, stride, vector.storage_offset() + offset)


def as_strided_scatter(
    vector: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int
) -> Tensor:
    """A vector with some elements replaced, the offset counted from its beginning.

    Torch's own operator gives its operand and its source wrong gradients.
    """
    written = vector.clone(memory_format=torch.contiguous_format)
    written.as_strided(size, stride, offset).copy_(source)
    return written


def view_as_complex(x: Tensor) -> Tensor:
    """Pairs of numbers as complex ones; they have to lie side by side, at even places."""
    return torch.view_as_complex(x if _in_pairs(x) else x.clone(memory_format=torch.contiguous_format))


def _in_pairs(x: Tensor) -> bool:
    return x.stride(-1) == 1 and not any(stride % 2 for stride in (x.storage_offset(), *x.stride()[:-1]))


def view_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as another type; where its size is another, they have to lie side by side."""
    return (x if dtype.itemsize == x.dtype.itemsize else x.clone(memory_format=torch.contiguous_format)).view(dtype)


STRIDED_KERNELS: Mapping[str, Callable[..., Any]] = {
    "aten.as_strided.default": as_strided,
    "aten.as_strided_scatter.default": as_strided_scatter,
    "aten.view_as_complex.default": view_as_complex,
    "aten.view.dtype": view_dtype,
}
