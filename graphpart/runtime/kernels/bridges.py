"""Kernels of what bridges do to values: cut, join, add."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_CHUNKS = 64
"""Parts that interleave in more runs than this are joined and then sorted."""


def slice_region(tensor: Tensor, runs: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """The sub-tensor at the given runs of each dimension: a view where every dimension has one run."""
    for dim, found in enumerate(runs):
        if len(found) < 2:
            start, stop = found[0] if found else (0, 0)
            if (start, stop) != (0, tensor.shape[dim]):
                tensor = tensor.narrow(dim, start, stop - start)
        else:
            index = torch.cat([torch.arange(a, b, device=tensor.device) for a, b in found])
            tensor = tensor.index_select(dim, index)
    return tensor


def concat(parts: Sequence[Tensor], dim: int, order: Sequence[int] | None) -> Tensor:
    """Parts joined along a dimension; ``order`` sorts indices that interleave."""
    if order is None:
        return torch.cat(list(parts), dim)
    sizes, places = _chunks(tuple(order), tuple(part.shape[dim] for part in parts))
    if len(places) > _MOST_CHUNKS:
        joined = torch.cat(list(parts), dim)
        return joined.index_select(dim, torch.tensor(order, device=joined.device))
    # Views of runs, copied once: cheaper than a concatenation that is then sorted.
    chunks = [
        chunk
        for part, own in zip(parts, sizes, strict=True)
        for chunk in (part.split(list(own), dim) if len(own) > 1 else (part,))
    ]
    return torch.cat([chunks[place] for place in places], dim)


@functools.lru_cache(maxsize=1024)
def _chunks(order: tuple[int, ...], extents: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Parts as runs that stay together: the sizes of each part's runs, and the runs' order in the result."""
    ends = set(itertools.accumulate(extents))
    starts = [at for before, at in itertools.pairwise((-2, *order)) if at != before + 1 or at in ends]
    bounds = [*sorted(starts), len(order)]
    sizes, begin = [], 0
    for extent in extents:
        own = itertools.pairwise(bounds[bounds.index(begin) : bounds.index(begin + extent) + 1])
        sizes.append(tuple(b - a for a, b in own))
        begin += extent
    return sizes, [bounds.index(at) for at in starts]


def sum_parts(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The sum of partial values, from the first to the last; in the value's dtype, if the parts are wider."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total if dtype is None else total.to(dtype)


def split(tensor: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Pieces that tile a dimension; their gradients are joined by one concatenation."""
    return torch.split(tensor, list(sizes), dim)
