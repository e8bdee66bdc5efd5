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
    return weight[labels[counted]].sum(dtype=dtype)


def logsumexp_part(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The logsumexp of a tile's classes, with a dimension in front for the tile: ``[1, ...]``."""
    return torch.logsumexp(scores.to(dtype), dim).unsqueeze(0)


def pick_class(
    scores: Tensor,
    labels: Tensor,
    dim: int,
    num_classes: int,
    ignore_index: int,
    dtype: torch.dtype,
    runs: Sequence[tuple[int, int]],
) -> Tensor:
    """The score of each label that is among a tile's classes, else 0.

    Args:
        scores: of the tile's classes.
        labels: in the numbering of all classes.
        dim: the dimension of classes.
        num_classes: of all tiles.
        ignore_index: the label that counts for nothing.
        dtype: of the result.
        runs: which classes the tile has.

    Raises:
        IndexError: if a label is none of all classes, nor ignored (on CPU; CUDA asserts).
    """
    place = torch.full_like(labels, -1)
    offset = 0
    for start, stop in runs:
        place = torch.where((labels >= start) & (labels < stop), labels - start + offset, place)
        offset += stop - start
    known = ((labels >= 0) & (labels < num_classes)) | (labels == ignore_index)
    if labels.device.type == "cpu" and not known.all():
        raise IndexError(f"Target {int(labels[~known][0])} is out of bounds.")  # as one device says it
    own = place.clamp(min=0).where(known, offset)  # which a GPU's gather refuses
    found = scores.gather(dim, own.unsqueeze(dim)).squeeze(dim).to(dtype)
    return torch.where(place >= 0, found, torch.zeros((), dtype=found.dtype, device=found.device))


def class_losses(total: Tensor, picked: Tensor, labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Minus the log-probability of each label; 0 where it is ignored."""
    losses = torch.where(
        labels == ignore_index, torch.zeros((), dtype=total.dtype, device=total.device), total - picked
    )
    return losses.to(dtype)
