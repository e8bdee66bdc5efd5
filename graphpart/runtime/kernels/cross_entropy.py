"""Kernels of cross-entropy over parts of a batch, and over parts of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def count_labels(labels: Tensor, ignore_index: int, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """Number of labels that aren't ignored, or the sum of their classes' weights."""
    counted = labels != ignore_index
    if weight is None:
        return counted.sum().to(dtype)
    return weight[labels[counted]].sum().to(dtype)


def logsumexp_part(scores: Tensor, dim: int) -> Tensor:
    """The logsumexp of a tile's classes, with a dimension in front for the tile: ``[1, ...]``."""
    return torch.logsumexp(scores, dim).unsqueeze(0)


def pick_class(scores: Tensor, labels: Tensor, dim: int, runs: Sequence[tuple[int, int]]) -> Tensor:
    """The score of each label that is among a tile's classes (the runs), else 0."""
    place = torch.full_like(labels, -1)
    offset = 0
    for start, stop in runs:
        place = torch.where((labels >= start) & (labels < stop), labels - start + offset, place)
        offset += stop - start
    found = scores.gather(dim, place.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    return torch.where(place >= 0, found, torch.zeros((), dtype=found.dtype, device=found.device))


def class_losses(total: Tensor, picked: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Minus the log-probability of each label; 0 where it is ignored."""
    return torch.where(labels == ignore_index, torch.zeros((), dtype=total.dtype, device=total.device), total - picked)
