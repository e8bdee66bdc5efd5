"""How values lie in memory.

The same product, reduction or activation function gives other last digits for other strides: kernels of products go by
them, and whole vectors are computed in another way than elements apart. MKL promises the same bits only for arrays of
the same alignment, too (oneMKL Developer Guide, "Obtaining Numerically Reproducible Results"). So what may have come
from elsewhere lies the same way, wherever it came from.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64
"""Of memory that PyTorch allocates on a CPU (``c10::gAlignment``); GPUs have a multiple of it."""


def settled(tensor: Tensor) -> Tensor:
    """The same values as a message's receiver has them: contiguous, in memory made for them; itself if it lies so."""
    if tensor.layout != torch.strided:
        return tensor
    tensor = tensor.contiguous()
    if 1 in tensor.shape:  # may have any stride there
        later = (max(1, extent) for extent in reversed(tensor.shape[1:]))
        strides = [*itertools.accumulate(later, operator.mul, initial=1)][::-1]
        tensor = tensor.as_strided(tensor.shape, strides)
    return tensor if _is_aligned(tensor) else tensor.clone()


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, so that every dtype travels alike.

    Args:
        tensor: settled.
    """
    return tensor.reshape(-1).view(torch.uint8)


def laid(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values in memory with given strides, as if made for them; itself if it lies so.

    Args:
        tensor: without gradient.
        strides: without gaps or overlaps.
    """
    if tensor.layout != torch.strided or (tensor.stride() == strides and _is_aligned(tensor)):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def laid_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The same values as a copy of another tensor lies in memory: with its strides, but for gaps and overlaps."""
    is_usual = tensor.layout == torch.strided and tensor.is_contiguous() and like.is_contiguous()
    return settled(tensor) if is_usual else laid(tensor, torch.empty_like(like, device="meta").stride())


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.data_ptr() % _ALIGNMENT_BYTES == 0
